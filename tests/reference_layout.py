"""The layout contract as brute force: trees by stack matching, visibility and positions by the letter of the rules.

Written from sections 3 to 5 of the contract; shares nothing with `multiverse`. Text is allowed to be malformed; where
the contract is silent, these decisions hold:

- A tag acts on the innermost block that is still open (a strict stack that only `<Parallel>` and `</Parallel>` move).
  A tag without an open block is an ordinary token.
- `</Goal>` counts only the first time, and only before the block's first path.
- `<Outline>`, `</Outline>`, `<Goal>`, `<Think>`, `</Think>` and `</Conclusion>` never affect the layout.
- `</Path>` closes the path being read, the first time; a second one is an ordinary token of that path's branch.
- `<Path>` after the block's `<Conclusion>` still opens a new sibling at the block's shared start position.
- `<Conclusion>` or `</Parallel>` while a path of the block is being read reduces: the parent goes on one past the
  largest position over ALL paths that the block has so far, each counted at its `</Path>`, or at its last token when
  it was cut off. While no path is being read they are ordinary tokens of the parent; `</Parallel>` still closes the
  block.
- Branches are numbered in the linear order in which they open, document roots included; the first root is 0.
- A document that ends leaves nothing open.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class ReferenceLayout:
    """What every token sees (`visible[i][j]`: i sees j), and its position and branch."""

    visible: list[list[bool]]
    positions: list[int]
    branches: list[int]


@dataclass
class _Block:
    first: int
    acts: list[tuple[int, str]] = field(default_factory=list)
    paths: list["_Path"] = field(default_factory=list)
    goal_close: int | None = None


@dataclass
class _Path:
    first: int
    end: int
    close: int | None


def reference_layout(
    ids: Sequence[int], token_ids: Mapping[str, int], document_starts: Iterable[int] | None = None
) -> ReferenceLayout:
    """Lays out `ids` in O(N^2) and more; `document_starts` as in `BranchLayout.from_token_ids`."""
    name_of = {token_id: tag for tag, token_id in token_ids.items()}
    names = [name_of.get(token_id, "") for token_id in ids]
    starts = sorted({0, *(document_starts or ())})
    ends = [*starts[1:], len(names)]
    document_of = [document for document, (a, b) in enumerate(zip(starts, ends, strict=True)) for _ in range(a, b)]

    blocks = [block for a, b in zip(starts, ends, strict=True) for block in _blocks_between(names, a, b)]
    memberships = _memberships(blocks, len(names))
    branches = _branches(blocks, starts, document_of, memberships)
    positions = _positions(blocks, starts, branches)
    length = len(names)
    # The tokens of a path all have one membership: a conflict is looked for once for every two of them that differ.
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    membership_of = [numbers.setdefault(tuple(around.items()), len(numbers)) for around in memberships]
    conflicts = [[_conflict(dict(one), dict(other)) for other in numbers] for one in numbers]

    def sees(i: int) -> list[bool]:
        conflict = conflicts[membership_of[i]]
        before = range(i + 1)
        return [document_of[i] == document_of[j] and not conflict[membership_of[j]] for j in before]

    visible = [sees(i) + [False] * (length - i - 1) for i in range(length)]
    return ReferenceLayout(visible=visible, positions=positions, branches=branches)


def _blocks_between(names: Sequence[str], start: int, end: int) -> list[_Block]:
    blocks: list[_Block] = []
    stack: list[_Block] = []
    for index in range(start, end):
        name = names[index]
        if name == "<Parallel>":
            blocks.append(_Block(first=index))
            stack.append(blocks[-1])
        elif name and stack:
            stack[-1].acts.append((index, name))
            if name == "</Parallel>":
                stack.pop()
    for block in blocks:
        borders = [index for index, name in block.acts if name in ("<Path>", "<Conclusion>", "</Parallel>")]
        for first in [index for index, name in block.acts if name == "<Path>"]:
            path_end = min([border for border in borders if border > first], default=end)
            closes = [index for index, name in block.acts if name == "</Path>" and first < index < path_end]
            block.paths.append(_Path(first=first, end=path_end, close=min(closes, default=None)))
        before_paths = block.paths[0].first if block.paths else end
        goals = [index for index, name in block.acts if name == "</Goal>" and index < before_paths]
        block.goal_close = min(goals, default=None)
    return blocks


def _memberships(blocks: Sequence[_Block], length: int) -> list[dict[int, int]]:
    """For every token `{block: path}`, named by their first tokens, of every path around it."""
    memberships: list[dict[int, int]] = [{} for _ in range(length)]
    for block in blocks:
        for path in block.paths:
            for index in range(path.first, path.end):
                memberships[index][block.first] = path.first
    return memberships


def _conflict(one: Mapping[int, int], other: Mapping[int, int]) -> bool:
    """Whether some block holds the two tokens under two different paths of itself."""
    return any(block in other and other[block] != path for block, path in one.items())


def _branches(
    blocks: Sequence[_Block],
    starts: Sequence[int],
    document_of: Sequence[int],
    memberships: Sequence[Mapping[int, int]],
) -> list[int]:
    path_openings = [("path", path.first) for block in blocks for path in block.paths]
    openings = [("root", start) for start in starts] + path_openings
    openings.sort(key=lambda opening: (opening[1], opening[0] == "path"))
    number = {opening: branch for branch, opening in enumerate(openings)}
    return [
        number["path", max(around.values())] if around else number["root", starts[document]]
        for document, around in zip(document_of, memberships, strict=True)
    ]


def _positions(blocks: Sequence[_Block], starts: Sequence[int], branches: Sequence[int]) -> list[int]:
    opens = {path.first: block for block in blocks for path in block.paths}
    reduces = {path.end: block for block in blocks for path in block.paths if path.end not in opens}
    positions: list[int] = []

    def last_of_branch(branch: int, before: int) -> int:
        return positions[max(index for index in range(before) if branches[index] == branch)]

    for index, branch in enumerate(branches):
        if index in starts:
            positions.append(0)
        elif index in opens:
            block = opens[index]
            if block.goal_close is not None:
                positions.append(positions[block.goal_close] + 1)
            else:
                positions.append(last_of_branch(branches[block.first], block.paths[0].first) + 1)
        elif index in reduces:
            ended = [path for path in reduces[index].paths if path.end <= index]
            positions.append(max(positions[p.end - 1 if p.close is None else p.close] for p in ended) + 1)
        else:
            positions.append(last_of_branch(branch, index) + 1)
    return positions
