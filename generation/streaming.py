"""Streams: an ordinary streamer in linear order, and two that tell the branches apart."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .branch import Branch, BranchStatus, Token
from .request import Request


class BranchStreamer(BaseStreamer, ABC):
    """A streamer that sees the branches grow side by side. Pass a subclass as `generate(streamer=...)`.

    `put_step` is called after every sequential step with the live requests; `request.branches()` lists their branches,
    each with its `label`, `items` and `status`. [`EventStreamer`] says what happened, in events.
    """

    def put(self, value: torch.Tensor) -> None:
        """Gets the prompt, shape `(B, prompt)`, before decoding starts."""

    @abstractmethod
    def put_step(self, requests: Sequence[Request]) -> None:
        """Gets all requests after a step.

        Args:
            requests (`Sequence[Request]`): one per row, finished ones included.
        """

    def end(self) -> None:
        """Called once when all requests have come to their end."""


@dataclass(frozen=True)
class BranchEvent:
    """Something that happened to one branch in a step.

    Attributes:
        request (`int`): row of the batch.
        path (`str`): label of the path, such as `1.2`; empty for the root.
        kind (`str`): `"opened"` by a fork, `"text"` written, `"closed"` at its end, `"merged"` into its parent.
        token_ids (`tuple[int, ...]`): the new tokens, for `"text"`.
        text (`str`): what they read, for `"text"`; bytes of a character that is still incomplete come with its end.
    """

    request: int
    path: str
    kind: Literal["opened", "text", "closed", "merged"]
    token_ids: tuple[int, ...] = ()
    text: str = ""


class EventStreamer(BranchStreamer):
    """Turns the growth of the branches into [`BranchEvent`]s. Subclasses define `on_event`.

    The texts of a branch's events, put together, are the text of the branch; a branch is opened before anything else
    happens to it, closed once, and merged once all its siblings are closed.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        skip_special_tokens (`bool`): whether tags and other special tokens are left out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = False) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._rows: list[dict[Branch, _Progress]] = []

    @abstractmethod
    def on_event(self, event: BranchEvent) -> None:
        """Gets every event as it happens."""

    def put_step(self, requests: Sequence[Request]) -> None:
        if not self._rows:
            self._rows = [{request.root: _Progress()} for request in requests]
        for number, (request, known) in enumerate(zip(requests, self._rows, strict=True)):
            self._follow(number, request.root, known)

    def end(self) -> None:
        self._rows = []

    def _follow(self, number: int, branch: Branch, known: "dict[Branch, _Progress]") -> None:
        progress = known[branch]
        while True:
            # Everything before a fork, the paths of the fork, everything after it.
            written = []
            while progress.items < len(branch.items) and isinstance(branch.items[progress.items], Token):
                written.append(branch.items[progress.items].id)  # type: ignore[union-attr]
                progress.items += 1
            if written:
                text = progress.read(written, self.tokenizer, self.skip_special_tokens)
                self.on_event(BranchEvent(number, branch.label, "text", tuple(written), text))
            if progress.items == len(branch.items):
                break
            fork = branch.forks[progress.forks]
            for child in fork.children:
                if child not in known:
                    known[child] = _Progress()
                    self.on_event(BranchEvent(number, child.label, "opened"))
                self._follow(number, child, known)
            if branch.items[-1] is fork:
                break  # the branch waits for them
            for child in fork.children:
                del known[child]
                self.on_event(BranchEvent(number, child.label, "merged"))
            progress.items += 1
            progress.forks += 1
        if branch.status is BranchStatus.FINISHED and not progress.closed:
            progress.closed = True
            self.on_event(BranchEvent(number, branch.label, "closed"))


@dataclass
class _Progress:
    """How much of a branch has been shown."""

    items: int = 0
    forks: int = 0
    closed: bool = False
    ids: list[int] = field(default_factory=list)

    def read(self, new: list[int], tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> str:
        """Text of `new`, as it reads after what came before it."""
        before = str(tokenizer.decode(self.ids, skip_special_tokens=skip_special_tokens))
        text = str(tokenizer.decode(self.ids + new, skip_special_tokens=skip_special_tokens))
        if text.endswith("\ufffd"):
            self.ids += new
            return ""
        # Pieces are read in the light of the last few tokens only, or a long text would be read over and over.
        piece = text[len(before.rstrip("\ufffd")) :]
        self.ids = (self.ids + new)[-8:]
        return piece


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
