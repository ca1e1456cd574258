"""A generation as it stands, for a web page: the root's text, and every block as a row of growing paths."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from multiverse.generation.branch import Branch, BranchStatus, Token
from multiverse.generation.request import Request
from multiverse.generation.scheduler import branches_to_run
from multiverse.hub_card.drawings import branch_colour, escaped
from multiverse.tags import TAGS
from transformers import PreTrainedTokenizerBase

#: What a card's corner says, by the state of its branch.
_STATES = {"writing": "writing", "queued": "next in line", "waiting": "waits for its paths", "finished": "done"}


_ANY = re.compile(f"({'|'.join(TAGS)})")
_OPENED = re.compile("(<(?:Parallel|Goal|Outline|Path|Conclusion)>)\n")
_CLOSED = re.compile("\n(</(?:Outline|Path|Conclusion|Goal)>)")


@dataclass
class Node:
    """One branch: its name, its number among the branches so far (for its colour), and what it holds in order.

    Attributes:
        label (`str`): of the path; empty for the root.
        number (`int`): order in which it was opened, 0 for the root.
        state (`str`): `"writing"`, `"queued"` where other paths are written first, `"waiting"` for its own paths, or
            `"finished"`.
        parts (`list[str | list[Node]]`): stretches of text, and the paths of a block.
    """

    label: str
    number: int
    state: str
    parts: "list[str | list[Node]]" = field(default_factory=list)

    def nodes(self) -> "Iterator[Node]":
        """This one and all below it."""
        yield self
        for part in self.parts:
            for child in part if isinstance(part, list) else ():
                yield from child.nodes()


class LiveTree:
    """Follows one request; `read` may be called whenever a step has ended.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): turns tokens into text.
        width (`int`, *optional*): most branches that are written side by side; 1 for one path at a time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int | None = None) -> None:
        self.tokenizer, self.width = tokenizer, width
        self._numbers: dict[Branch, int] = {}

    def read(self, request: Request) -> Node:
        """The request as it stands, without its prompt."""
        for branch in request.branches():
            self._numbers.setdefault(branch, len(self._numbers))
        return self._node(request.root, set() if request.finished else set(branches_to_run(request, self.width)))

    def _node(self, branch: Branch, writing: set[Branch]) -> Node:
        state = branch.status.value
        if branch.status is BranchStatus.RUNNING:
            state = "writing" if branch in writing else "queued"
        node = Node(branch.label, self._numbers[branch], state)
        ids: list[int] = []
        for item in [*branch.items, None]:
            if isinstance(item, Token):
                ids.append(item.id)
                continue
            if ids:
                node.parts.append(str(self.tokenizer.decode(ids, skip_special_tokens=True)))
                ids = []
            if item is not None:
                node.parts.append([self._node(child, writing) for child in item.children])
        return node


def tree_panels(root: Node, ended: bool = False) -> str:
    """The whole tree as HTML; all text of the model is escaped.

    Args:
        root (`Node`): of the tree.
        ended (`bool`): whether nobody writes any more.
    """
    return f'<div class="live-root">{_parts(root, ended)}</div>'


def _parts(node: Node, ended: bool) -> str:
    pieces = []
    last = len(node.parts) - 1
    for place, part in enumerate(node.parts):
        if isinstance(part, str):
            pieces.append(_text(part, place == last and node.state == "writing" and not ended))
        else:
            pieces.append(f'<div class="live-paths">{"".join(_card(child, ended) for child in part)}</div>')
    return "".join(pieces)


def _text(text: str, writing: bool) -> str:
    caret = '<span class="live-caret" aria-hidden="true"></span>' if writing else ""
    # Tags that begin or end something need no line of their own.
    text = _CLOSED.sub(r" \1", _OPENED.sub(r"\1 ", text.strip("\n")))
    pieces = [
        f'<span class="live-tag">{escaped(piece)}</span>' if piece in TAGS else escaped(piece)
        for piece in _ANY.split(text)
    ]
    # The newest line stays in sight: the frame is filled from its end.
    return f'<div class="live-text"><div>{"".join(pieces)}{caret}</div></div>'


def _card(node: Node, ended: bool) -> str:
    # What is left open is closed by the engine.
    state = "finished" if ended else node.state
    return (
        f'<section class="live-path live-{state}" style="--mv-branch:{branch_colour(node.number)}" '
        f'aria-label="path {escaped(node.label)}, {_STATES[state]}">'
        f'<header><b>path {escaped(node.label)}</b><span class="live-state">{_STATES[state]}</span></header>'
        f"{_parts(node, ended)}</section>"
    )


def writing(root: Node) -> int:
    """How many branches are being written."""
    return sum(node.state == "writing" for node in root.nodes())
