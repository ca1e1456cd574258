"""Streams: an ordinary streamer in linear order, and one that is shown every branch."""

from collections.abc import Iterator, Sequence

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
        self._tokens: Iterator[Token | None] | None = None

    def put_step(self, requests: Sequence[Request]) -> None:
        """Passes on what has become certain."""
        if self._tokens is None:
            self._tokens = _settled_tokens(requests[0].root)
        while (token := next(self._tokens)) is not None:
            self.streamer.put(torch.tensor([token.id]))


def _settled_tokens(branch: Branch) -> Iterator[Token | None]:
    """Yields tokens in linear order, and `None` wherever more may still come before the next one."""
    index = 0
    while True:
        for item in branch.items[index:]:
            index += 1
            if isinstance(item, Token):
                yield item
                continue
            for child in item.children:
                yield from _settled_tokens(child)
        if index == len(branch.items):
            if branch.status is BranchStatus.FINISHED:
                return
            yield None
