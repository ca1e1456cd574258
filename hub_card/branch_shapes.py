"""Where the branches of a text lie in a picture, in plain numbers: bars of a timeline, and areas of an attention mask.

Drawn as SVG by `drawings.py` and with matplotlib by `multiverse.plot`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from multiverse.layout import BranchLayout
from multiverse.structure import Block

#: First and last step of a stretch in which a branch is written, both counted from 1 and both part of it.
Segment = tuple[int, int]


class Span(NamedTuple):
    """One row of a timeline.

    Attributes:
        label (`str`): name of the branch.
        segments (sequence of `(first, last)`): the steps in which it is written, counted from 1, `last` included; one
            more for every block whose paths it waits for.
        depth (`int`): branches above it; it is indented by as much.
        branch (`int`): its number, which decides its colour; 0 is the root.
        note (`str`): more about it, shown where the bar is pointed at.
    """

    label: str
    segments: Sequence[Segment]
    depth: int = 0
    branch: int = 0
    note: str = ""


class KeyRun(NamedTuple):
    """Neighbouring tokens of one branch, as keys of an attention mask.

    Attributes:
        branch (`int`): their branch.
        start, end (`int`): their linear indices, `end` exclusive. Among themselves they see by the causal rule.
        seen_by (sequence of `(start, end)`): the later tokens that see all of them, `end` exclusive.
    """

    branch: int
    start: int
    end: int
    seen_by: Sequence[tuple[int, int]]


def branch_runs(layout: BranchLayout) -> list[tuple[int, int, int]]:
    """`(branch, start, end)` of every stretch of tokens of one branch, in linear order."""
    ids = layout.branch_ids.cpu().numpy()
    starts = np.flatnonzero(np.diff(ids, prepend=-1)).tolist()
    return [(int(ids[start]), start, end) for start, end in pairwise([*starts, len(ids)])]


def mask_runs(layout: BranchLayout) -> list[KeyRun]:
    """The attention mask in as many areas as the text has runs of branches, not cell by cell.

    Args:
        layout (`BranchLayout`): of a whole text.

    Returns:
        `list[KeyRun]`: in linear order; together they cover exactly what `layout.attention_mask()` lets be seen.
    """
    runs = branch_runs(layout)
    branches = np.array([branch for branch, _, _ in runs], dtype=np.int64)
    compatible = layout.compatible.cpu().numpy()
    found = []
    for number, (branch, start, end) in enumerate(runs):
        sees = compatible[branches[number + 1 :], branch].astype(np.int8)
        edges = np.flatnonzero(np.diff(sees, prepend=0, append=0)).reshape(-1, 2) + number + 1
        found.append(KeyRun(branch, start, end, [(runs[first][1], runs[last - 1][2]) for first, last in edges]))
    return found


def path_numbers(layout: BranchLayout) -> dict[int, str]:
    """The place of every path in the tree, such as `2.1` for the first path of a block in the second path."""
    numbers: dict[int, str] = {}

    def walk(blocks: Iterable[Block], prefix: str) -> Iterator[tuple[Block, str]]:
        for block in blocks:
            for number, path in enumerate(block.paths, start=1):
                numbers[path.branch] = f"{prefix}{number}"
                yield from ((inner, f"{prefix}{number}.") for inner in path.blocks)

    level = [(block, "") for block in layout.blocks]
    while level:  # by levels, as malformed text nests deeper than Python's stack
        level = [inner for block, prefix in level for inner in walk([block], prefix)]
    return numbers


def position_spans(layout: BranchLayout, start: int = 0, labels: Mapping[int, str] | None = None) -> list[Span]:
    """The timeline that the positions of a text allow: a token's position is the earliest step that can write it.

    Siblings start together, and a conclusion follows the longest path (LAYOUT.md, section 5).

    Args:
        layout (`BranchLayout`): of the whole text.
        start (`int`): index of the first token that counts; those before it (a prompt) are there at the outset.
        labels (`Mapping[int, str]`, *optional*): names of the branches by number; by default their place in the tree.

    Returns:
        `list[Span]`: one per branch with tokens from `start` on, in linear order. The step of the earliest one is 1.
    """
    positions = layout.position_ids[start:].cpu().numpy()
    if not len(positions):
        return []
    first = int(positions.min())
    parents, numbers = layout.machine.parents, path_numbers(layout)
    names = {**numbers, **(labels or {})}
    segments: dict[int, list[Segment]] = {}
    for branch, run_start, run_end in branch_runs(layout):
        # A run may hold two documents' or two blocks' worth of positions: it ends where they stop counting up.
        own = positions[max(run_start - start, 0) : max(run_end - start, 0)] - first + 1
        breaks = [0, *(np.flatnonzero(np.diff(own) != 1) + 1).tolist(), len(own)]
        for begin, end in pairwise(breaks):
            if begin < end:
                segments.setdefault(branch, []).append((int(own[begin]), int(own[end - 1])))
    return [
        Span(names.get(branch, "root"), united(parts), _depth(parents, branch), branch)
        for branch, parts in sorted(segments.items())
    ]


def report_spans(report: Mapping[str, Any], labels: Mapping[int, str] | None = None) -> list[Span]:
    """The timeline of a generation, as it was measured.

    Args:
        report (`Mapping`): `RequestReport.to_dict()`, or the same read from JSON.
        labels (`Mapping[int, str]`, *optional*): names of the branches by number; by default those of the report.

    Returns:
        `list[Span]`: one per branch that has made tokens, in linear order. A branch stops between the step that forks
        and the one that merges, both of which it has a part in.

    Raises:
        ValueError: if `report` lacks the branches or the tree of blocks.
    """
    if not report.get("branches") or "blocks" not in report:
        raise ValueError(
            f"`report` has the fields {sorted(report)}, but it needs `branches` and `blocks`. Pass what "
            "`RequestReport.to_dict()` gives."
        )
    root, names = report["branches"][0], labels or {}
    spans: list[Span] = []

    def add(
        label: str, entry: Mapping[str, Any], blocks: Iterable[Mapping[str, Any]], depth: int, branch: int
    ) -> None:
        if entry["first_step"] is not None:
            # One path at a time, a path's header is there long before its turn comes.
            first = entry.get("first_sampled_step") or entry["first_step"]
            segments = [(int(first), int(entry["last_step"]))]
            for block in blocks:
                segments = _without(segments, _process_steps(block))
            spans.append(Span(names.get(branch, label), segments, depth, branch))
        for block in blocks:
            for path in block["paths"]:
                add(path["label"], path, path["blocks"], depth + 1, path["branch"])

    add("root", root, report["blocks"], 0, 0)
    return spans


def united(segments: Iterable[Segment]) -> list[Segment]:
    """The same steps in as few segments as possible, in order."""
    found: list[Segment] = []
    for first, last in sorted(segments):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _depth(parents: Sequence[int], branch: int) -> int:
    depth = 0
    while parents[branch] >= 0:
        branch, depth = parents[branch], depth + 1
    return depth


def _process_steps(block: Mapping[str, Any]) -> Segment | None:
    """From the fork of a block to its merge; `None` where no path of it was decoded."""
    steps = [path[name] for path in block["paths"] for name in ("first_step", "last_step") if path[name] is not None]
    inner = [_process_steps(nested) for path in block["paths"] for nested in path["blocks"]]
    steps += [step for segment in inner if segment is not None for step in segment]
    return (min(steps), max(steps)) if steps else None


def _without(segments: list[Segment], process: Segment | None) -> list[Segment]:
    """`segments` less the steps between, and not including, the ends of `process`."""
    if process is None or process[1] - process[0] < 2:
        return segments
    begin, end = process
    parts = [((first, min(last, begin)), (max(first, end), last)) for first, last in segments]
    return [part for pair in parts for part in pair if part[0] <= part[1]]
