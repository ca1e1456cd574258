"""Draws a `PathMask` with the blocks that a kernel visits: `python -m multiverse.kernels.mask_picture FILE.svg`."""

import sys
from itertools import groupby
from pathlib import Path

import torch
from multiverse.structure import StructureMachine

from .block_runs import Runs
from .path_mask import PathMask

_CELL = 7
#: Colours of the keys, by branch: what a query sees of a branch is drawn in that branch's colour.
_COLOURS = ("#4c6ef5", "#f76707", "#2f9e44", "#e64980", "#1098ad", "#9c36b5", "#f59f00", "#5c940d")


def mask_svg(mask: PathMask, block_m: int, block_n: int, row: int = 0) -> str:
    """One batch row as an SVG: a bar for the visible keys of a branch, and a white field for every block that is
    visited, framed if all of it is visible; grey is never read.

    Args:
        mask (`PathMask`): rows are drawn downwards, keys to the right.
        block_m, block_n (`int`): queries and keys of a block.
        row (`int`): batch row.
    """
    visible = mask.visible()[row].cpu()
    branches = mask.branch_ids[row].tolist()
    queries, slots = visible.shape
    width, height = slots * _CELL, queries * _CELL
    runs = mask.block_runs(block_m, block_n)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 {width + 2} {height + 2}" width="{width + 2}" '
        f'height="{height + 2}">',
        f'<rect width="{width}" height="{height}" fill="#dee2e6"/>',
    ]
    for kind, frame in ((runs.partial, "none"), (runs.full, "#212529")):
        for first_query, first_key in _blocks(kind, row):
            x, y = first_key * block_n * _CELL, first_query * block_m * _CELL
            size = f'width="{min(block_n * _CELL, width - x)}" height="{min(block_m * _CELL, height - y)}"'
            parts.append(f'<rect x="{x}" y="{y}" {size} fill="white" stroke="{frame}" stroke-width="1.5"/>')
    for query, seen in enumerate(visible.tolist()):
        keys = [branch if sees else None for branch, sees in zip(branches, seen, strict=True)]
        first = 0
        for branch, stretch in groupby(keys):
            count = len(list(stretch))
            if branch is not None:
                colour = _COLOURS[branch % len(_COLOURS)]
                place = f'x="{first * _CELL + 1}" y="{query * _CELL + 1}"'
                size = f'width="{count * _CELL - 2}" height="{_CELL - 2}"'
                parts.append(f'<rect {place} {size} fill="{colour}"/>')
            first += count
    return "\n".join([*parts, "</svg>", ""])


def _blocks(runs: Runs, row: int) -> list[tuple[int, int]]:
    """Every (query block, key block) of one batch row."""
    offsets, starts, ends = runs.offsets[row].tolist(), runs.start.tolist(), runs.end.tolist()
    return [
        (outer, inner)
        for outer in range(len(offsets) - 1)
        for run in range(offsets[outer], offsets[outer + 1])
        for inner in range(starts[run], ends[run])
    ]


def example_mask() -> PathMask:
    """A text with three paths, the second of which holds two of its own."""
    machine = StructureMachine()
    branches: list[int] = []

    def read(*tags: str, words: int = 0) -> None:
        for tag in tags:
            machine.read_tag(tag)
            branches.append(machine.branch)
        machine.read_plain(words)
        branches.extend([machine.branch] * words)

    read(words=6)
    read("<Parallel>", "<Goal>", "<Outline>", "</Outline>", "<Outline>", "</Outline>", "</Goal>")
    read("<Path>", words=9)
    read("</Path>", "<Path>", words=3)
    read("<Parallel>", "<Goal>", "<Outline>", "</Outline>", "</Goal>", "<Path>", words=5)
    read("</Path>", "<Path>", words=6)
    read("</Path>", "<Conclusion>", "</Conclusion>", "</Parallel>", "</Path>", "<Path>", words=9)
    read("</Path>", "<Conclusion>", words=5)
    read("</Conclusion>", "</Parallel>", words=5)
    return PathMask.from_machines([machine], torch.tensor([branches]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m multiverse.kernels.mask_picture FILE.svg")
    Path(sys.argv[1]).write_text(mask_svg(example_mask(), 8, 8))
