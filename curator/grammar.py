"""The grammar check: a tagged text against the structure that it was made from, or by itself."""

from collections.abc import Sequence

from multiverse.curator.outline import MAX_DEPTH, nested_blocks
from multiverse.curator.records import Node, StageFailure
from multiverse.curator.rendering import LABEL, Pieces, find_placeholders, read_pieces
from multiverse.structure import Block

_STAGE = "branches"


def check_grammar(text: str, structure: Sequence[Node] | None = None) -> None:
    """A tagged text is well-formed (LAYOUT.md, section 1) and complete.

    It has no problems by the rules of `BranchLayout`, as many paths as outlines, no empty outline, path or conclusion,
    labels that count from `1:` (`2.1:` in a path 2), and blocks at most two deep.

    Args:
        text (`str`): the tagged text.
        structure (`Sequence[Node]`, *optional*): whose blocks and paths it must have, no more and no fewer.

    Raises:
        StageFailure: if it is not; the model that wrote the texts of the blocks is to write them again.
    """
    if found := find_placeholders(text):
        raise _failure(f"{found[0].group()} stands in the text where no block belongs")
    read = read_pieces(text)
    if read.problems:
        problem = read.problems[0]
        raise _failure(f"{problem.kind}: {problem.message}")
    if not read.blocks:
        raise _failure("there is no <Parallel> block")
    wanted = None if structure is None else nested_blocks(Node("", children=tuple(structure)))
    _check_blocks(read, read.blocks, "", wanted, "the text", 1)


def _check_blocks(
    read: Pieces, blocks: Sequence[Block], prefix: str, wanted: Sequence[Node] | None, where: str, depth: int
) -> None:
    if blocks and depth > MAX_DEPTH:
        raise _failure(f"{where} nests blocks {depth} deep; at most {MAX_DEPTH} are allowed")
    if wanted is not None and len(blocks) != len(wanted):
        raise _failure(f"{where} has {len(blocks)} blocks where the structure has {len(wanted)}")
    for number, block in enumerate(blocks):
        node = wanted[number] if wanted is not None else None
        name = f"block {node.label}" if node else f"block {number + 1} of {where}"
        outlines, paths = block.outlines, [path.start for path in block.paths]
        if len(outlines) != len(paths) or (node and len(paths) != len(node.children)):
            expected = f" for {len(node.children)} parts" if node else ""
            raise _failure(f"{name} has {len(outlines)} outlines and {len(paths)} paths{expected}")
        for kind, starts in (("outline", outlines), ("path", paths)):
            for place, start in enumerate(starts, start=1):
                _check_labelled(read, start, f"{prefix}{place}", f"{kind} {place} of {name}")
        assert block.conclusion is not None
        if not read.text_after(block.conclusion).strip():
            raise _failure(f"{name} has an empty conclusion")
        for place, path in enumerate(block.paths, start=1):
            inner = nested_blocks(node.children[place - 1]) if node else None
            _check_blocks(read, path.blocks, f"{prefix}{place}.", inner, f"path {place} of {name}", depth + 1)


def _check_labelled(read: Pieces, start: int, label: str, where: str) -> None:
    text = read.text_after(start)
    found = LABEL.match(text)
    if found is None or found["label"] != label:
        raise _failure(f"{where} must begin with {label + ':'!r}, not with {text.strip()[:20]!r}")
    # A path may begin with a block.
    begins_block = start + 2 < len(read.pieces) and read.pieces[start + 2] == "<Parallel>"
    if not text[found.end() :].strip() and not begins_block:
        raise _failure(f"{where} is empty")


def _failure(fault: str) -> StageFailure:
    # A block is named first where one is known, so that only it is blamed.
    return StageFailure(_STAGE, f"The rendered text is malformed: {fault}.")
