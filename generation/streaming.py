"""Streams: an ordinary streamer in linear order, and one that is shown every branch."""

from collections.abc import Sequence

import torch
from transformers.generation.streamers import BaseStreamer

from .branch import Branch, BranchStatus, Token
from .request import Request


class BranchStreamer(BaseStreamer):
    """A streamer that sees the branches grow side by side. Pass a subclass as `generate(streamer=...)`.

    `put_step` is called after every sequential step with the live requests; `request.branches()` lists their branches,
    each with its `label`, `items` and `status`.
    """

    def put(self, value: torch.Tensor) -> None:
        """Gets the prompt, shape `(B, prompt)`, before decoding starts."""

    def put_step(self, requests: Sequence[Request]) -> None:
        """Gets all requests after a step.

        Args:
            requests (`Sequence[Request]`): one per row, finished ones included.
        """
        raise NotImplementedError("A BranchStreamer must define `put_step(requests)`.")

    def end(self) -> None:
        """Called once when all requests have come to their end."""


class LinearFeed:
    """Feeds an ordinary streamer (`TextStreamer`, ...) in linear order.

    A token is passed on once nothing can come before it any more: root tokens at once, the first path while it is
    decoded, later paths as soon as the ones before them have ended.

    Args:
        streamer (`BaseStreamer`): gets tensors of shape `(tokens,)`.
    """

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer
        self.passed = 0

    def put_step(self, requests: Sequence[Request]) -> None:
        """Passes on what has become certain."""
        request = requests[0]
        settled: list[int] = []
        _settled_tokens(request.root, settled, everything=request.finished)
        for token_id in settled[self.passed :]:
            self.streamer.put(torch.tensor([token_id]))
        self.passed = len(settled)


def _settled_tokens(branch: Branch, found: list[int], everything: bool) -> bool:
    """Collects token ids up to the first place where another token may still come; False if there is one."""
    for item in branch.items:
        if isinstance(item, Token):
            found.append(item.id)
        elif not all(_settled_tokens(child, found, everything) for child in item.children):
            return False
    return everything or branch.status is BranchStatus.FINISHED
