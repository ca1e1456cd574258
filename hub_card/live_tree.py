"""A generation as it stands, for a web page: the root's text, and every block as a row of growing paths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from multiverse.generation.branch import Branch, BranchStatus, Token
from multiverse.generation.request import Request
from multiverse.hub_card.drawings import branch_colour, escaped
from transformers import PreTrainedTokenizerBase

#: What a card's corner says.
_STATUS = {
    BranchStatus.RUNNING: "writing",
    BranchStatus.WAITING: "waiting for its paths",
    BranchStatus.FINISHED: "done",
}


@dataclass
class Node:
    """One branch: its name, its number among the branches so far (for its colour), and what it holds in order.

    Attributes:
        label (`str`): of the path; empty for the root.
        number (`int`): order in which it was opened, 0 for the root.
        status (`BranchStatus`): what it does.
        parts (`list[str | list[Node]]`): stretches of text, and the paths of a block.
    """

    label: str
    number: int
    status: BranchStatus
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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._numbers: dict[Branch, int] = {}

    def read(self, request: Request) -> Node:
        """The request as it stands, without its prompt."""
        for branch in request.branches():
            self._numbers.setdefault(branch, len(self._numbers))
        return self._node(request.root)

    def _node(self, branch: Branch) -> Node:
        node = Node(branch.label, self._numbers[branch], branch.status)
        ids: list[int] = []
        for item in [*branch.items, None]:
            if isinstance(item, Token):
                ids.append(item.id)
                continue
            if ids:
                node.parts.append(str(self.tokenizer.decode(ids, skip_special_tokens=True)))
                ids = []
            if item is not None:
                node.parts.append([self._node(child) for child in item.children])
        return node


def tree_panels(root: Node) -> str:
    """The whole tree as HTML; all text of the model is escaped."""
    return f'<div class="live-root">{_parts(root)}</div>'


def _parts(node: Node) -> str:
    pieces = []
    last = len(node.parts) - 1
    for place, part in enumerate(node.parts):
        if isinstance(part, str):
            writing = place == last and node.status is BranchStatus.RUNNING
            pieces.append(_text(part, writing))
        else:
            pieces.append(f'<div class="live-paths">{"".join(_card(child) for child in part)}</div>')
    return "".join(pieces)


def _text(text: str, writing: bool) -> str:
    caret = '<span class="live-caret" aria-hidden="true"></span>' if writing else ""
    # The newest line stays in sight: the frame is filled from its end.
    return f'<div class="live-text"><div>{escaped(text.strip(chr(10)))}{caret}</div></div>'


def _card(node: Node) -> str:
    state = node.status.value
    return (
        f'<section class="live-path live-{state}" style="--mv-branch:{branch_colour(node.number)}" '
        f'aria-label="path {escaped(node.label)}, {_STATUS[node.status]}">'
        f'<header><b>path {escaped(node.label)}</b><span class="live-state">{_STATUS[node.status]}</span></header>'
        f"{_parts(node)}</section>"
    )


def running(root: Node) -> Sequence[Node]:
    """The branches that are being written."""
    return [node for node in root.nodes() if node.status is BranchStatus.RUNNING]
