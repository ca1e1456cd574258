"""A finished draft as tagged text, and tagged text as one line of thought again."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from multiverse.curator.outline import flat, nested_blocks, placeholder
from multiverse.curator.records import Draft, Node
from multiverse.layout import BranchLayout
from multiverse.problems import Problem, find_problems
from multiverse.structure import Block, StructureMachine
from multiverse.tags import TAGS

#: A label at the beginning of an outline or a path.
LABEL = re.compile(r"\A\s*(?P<label>\d+(?:\.\d+)*):(?!\d)\s*")
#: The place of a nested block, its whole line where it has one to itself.
_PLACE_BEGINS = "{{block "
PLACEHOLDER = re.compile(r"(?P<alone>^[ \t]*\{\{block \S+?\}\}[ \t]*$)|\{\{block \S+?\}\}", re.MULTILINE)

_TAG = re.compile(f"({'|'.join(map(re.escape, TAGS))})")
_TAGS = frozenset(TAGS)


def without_placeholders(text: str) -> str:
    """A text without the places of nested blocks."""
    return PLACEHOLDER.sub("", text) if _PLACE_BEGINS in text else text


def find_placeholders(text: str) -> list[re.Match[str]]:
    """The places of nested blocks in a text."""
    return list(PLACEHOLDER.finditer(text)) if _PLACE_BEGINS in text else []


@dataclass(frozen=True)
class Pieces:
    """A text cut at its tags, each piece read as one token.

    Attributes:
        pieces (`tuple[str, ...]`): tags, and the texts between them.
        machine (`StructureMachine`): has read them; its indices are those of the pieces.
    """

    pieces: tuple[str, ...]
    machine: StructureMachine

    @property
    def blocks(self) -> list[Block]:
        """Outermost blocks in order, those of `layout`."""
        return self.machine.blocks

    @cached_property
    def problems(self) -> list[Problem]:
        """What is malformed, as `BranchLayout.problems` has it. No tensor is made for it: texts are read by the
        thousand, beside models that want the processor."""
        return find_problems(self.machine.events)

    @property
    def layout(self) -> BranchLayout:
        """Branch and position of every piece."""
        return BranchLayout.from_machine(self.machine)

    def is_tag(self, index: int) -> bool:
        """Whether a piece is a tag."""
        return self.pieces[index] in _TAGS

    def text_after(self, index: int) -> str:
        """The text right after a tag, empty where another tag or nothing follows."""
        after = index + 1
        return "" if after >= len(self.pieces) or self.is_tag(after) else self.pieces[after]


def read_pieces(text: str) -> Pieces:
    """Reads the structure of a tagged text."""
    pieces = tuple(piece for piece in _TAG.split(text) if piece)
    machine = StructureMachine()
    for piece in pieces:
        if piece in _TAGS:
            machine.read_tag(piece)
        else:
            machine.read_plain(1)
    return Pieces(pieces, machine)


def render(draft: Draft) -> str:
    """The tagged text of a draft, in the form of the published data (LAYOUT.md, section 1).

    The text outside blocks is the original's. Paths are labelled by their place, `1:`, and `2.1:` in a path 2. It puts
    down what the draft says, right or wrong; `checks.check_grammar` judges it.

    Args:
        draft (`Draft`): with `structure`, `texts` and `blocks`.
    """
    return "\n".join(_lines(draft.structure, draft, ""))


def sequential_twin(text: str) -> str:
    """A tagged text without its structure: no tags, goals, outlines and labels; paths and conclusions stay, in order.

    Args:
        text (`str`): any text, malformed or cut off if need be. One without tags is given back as it is.

    Returns:
        `str`: what was left, a line apart where tags stood.
    """
    read = read_pieces(text)
    if not any(tag for _, tag in read.machine.events):
        return text
    hidden: set[int] = set()
    labelled: set[int] = set()
    for block in _blocks(read.blocks):
        hidden.update(_goal(block, len(read.pieces)))
        labelled.update(path.start + 1 for path in block.paths)
    kept = []
    for index, piece in enumerate(read.pieces):
        if index not in hidden and not read.is_tag(index):
            kept.append((LABEL.sub("", piece) if index in labelled else piece).strip("\n"))
    return "\n".join(piece for piece in kept if piece.strip())


def _lines(nodes: Iterable[Node], draft: Draft, prefix: str) -> Iterator[str]:
    run = ""
    for node in flat(nodes):
        if node.kind is None:
            run += draft.texts[node.label]
            continue
        if run.strip():
            yield run.strip()
        run = ""
        yield _block(node, draft, prefix)
    if run.strip():
        yield run.strip()


def _block(block: Node, draft: Draft, prefix: str) -> str:
    text = draft.blocks[block.label]
    lines = ["<Parallel>", "<Goal>", *filter(None, [text.goal.strip()])]
    for number, outline in enumerate(text.outlines, start=1):
        lines += ["<Outline>", f"{prefix}{number}: {outline.strip()}", "</Outline>"]
    lines.append("</Goal>")
    for number, path in enumerate(text.paths, start=1):
        label = f"{prefix}{number}"
        nodes = nested_blocks(block.children[number - 1]) if number <= len(block.children) else []
        # A path that begins with a block has its label on a line of its own.
        content = _filled(path.strip(), nodes, draft, f"{label}.")
        lines += ["<Path>", f"{label}:{chr(10) if content.startswith('<') else ' '}{content}", "</Path>"]
    return "\n".join([*lines, "<Conclusion>", text.conclusion.strip(), "</Conclusion>", "</Parallel>"])


def _filled(path: str, blocks: Sequence[Node], draft: Draft, prefix: str) -> str:
    """A path with its blocks in their places; other placeholders stay, for the checks to find."""
    inner = {placeholder(block): block for block in blocks}

    def fill(match: re.Match[str]) -> str:
        block = inner.get(match.group().strip())
        return match.group() if block is None else _block(block, draft, prefix)

    return PLACEHOLDER.sub(fill, path) if inner else path


def _goal(block: Block, length: int) -> range:
    """Pieces of a block that tell what is to be done, from its `<Parallel>` on."""
    end = block.goal_close
    if end is None:
        # The goal was cut off or never closed: it lasts until something of the block's own follows.
        following = [path.start for path in block.paths[:1]] + [block.conclusion, block.end]
        end = min((index for index in following if index is not None), default=length)
        if not block.outlines:
            end = block.start
    return range(block.start, end)


def _blocks(blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        for path in block.paths:
            yield from _blocks(path.blocks)
