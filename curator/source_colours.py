"""Which sentences of an original went where, and the colours that show it."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from multiverse.curator.records import Draft, Node
from multiverse.hub_card.drawings import ROOT_COLOUR, branch_colour


class Piece(NamedTuple):
    """A stretch of the original.

    Attributes:
        start, end (`int`): its characters, `end` exclusive.
        label (`str`, *optional*): of the step that it went to; `None` where that is not known.
    """

    start: int
    end: int
    label: str | None


def coloured_pieces(trajectory: str, draft: Draft | None) -> list[Piece]:
    """The original in pieces, in order and without a gap.

    Args:
        trajectory (`str`): the original.
        draft (`Draft`, *optional*): whose `texts` were cut out of it; blanks may differ.
    """
    pieces, at = [], 0
    for label in _labels(draft) if draft is not None else ():
        assert draft is not None
        found = _find(draft.texts[label], trajectory, at)
        if found is None:
            continue
        if at < found[0]:
            pieces.append(Piece(at, found[0], None))
        pieces.append(Piece(*found, label))
        at = found[1]
    return [*pieces, Piece(at, len(trajectory), None)] if at < len(trajectory) else pieces


def step_colours(draft: Draft) -> dict[str, str]:
    """Colour of every step: that of the path that it is in, as the drawn tree has it.

    Before there is a structure, steps are told apart by colours in turn.
    """
    leaves = _labels(draft) or [leaf.label for step in draft.steps for leaf in step.leaves()]
    if not draft.structure:
        return {label: branch_colour(number) for number, label in enumerate(leaves, start=1)}
    colours: dict[str, str] = {}
    paths = 0

    def walk(nodes: Iterable[Node], colour: str) -> None:
        nonlocal paths
        for node in nodes:
            if node.kind is None:
                colours[node.label] = colour
                walk(node.children, colour)
                continue
            # A branch is numbered where its <Path> stands in the text: before those of the blocks in it.
            for path in node.children:
                paths += 1
                own = branch_colour(paths)
                colours[path.label] = own
                walk(path.children, own)

    walk(draft.structure, ROOT_COLOUR)
    for label in leaves:
        colours.setdefault(label, colours.get(label.partition(".")[0], ROOT_COLOUR))
    return colours


def _labels(draft: Draft) -> list[str]:
    """Labels of the texts in the order of the original: "2", "2.1", "10"."""
    return sorted(draft.texts, key=lambda label: [int(part) for part in re.findall(r"\d+", label)])


def _find(text: str, within: str, start: int) -> tuple[int, int] | None:
    """Where the words of a text stand."""
    text = text.strip()
    if not text:
        return None
    exact = within.find(text, start)
    if exact >= 0:
        return exact, exact + len(text)
    match = re.compile(r"\s+".join(map(re.escape, text.split()))).search(within, start)
    return match.span() if match else None
