"""`PathMask`: what the tokens of a batch may see, in memory that grows with their number and not with its square.

The rows that do not see a key, causality apart, are one interval per nesting level of the key's branch (the later
siblings of the path around it), one for the documents packed after its own, and one per stretch of padding. Keys that
follow each other mostly share them. Everything a kernel must know is read off these intervals.

Shapes: B batch rows, Q new (query) tokens, S slots (cached and new tokens; query i stands at row S - Q + i),
K intervals per key, R branches, D head dim.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from multiverse.structure import StructureMachine

from .block_runs import BlockRuns, KeySegments, find_block_runs

Interval = tuple[int, int]
_Derived = TypeVar("_Derived")


@dataclass(eq=False)
class PathMask:
    """Multiverse Attention in column-interval form: row i sees key j iff j <= i and i lies in no interval of j.

    Rows and keys are both numbered by slot. A padding key is hidden from every row, a padding row sees nothing.

    Attributes:
        hidden_start, hidden_end (`torch.IntTensor` of shape `(B, K, S)`): intervals `[start, end)` of the rows that do
            not see a key. Those of one key are disjoint and ascending; unused ones are empty (`start == end`).
        branch_ids (`torch.IntTensor` of shape `(B, S)`): branch of every slot, -1 for padding.
        queries (`int`): Q, the number of new tokens.

    Example:

    ```python
    >>> mask = PathMask.from_machines([layout.machine], layout.branch_ids[None])
    >>> output = path_attention(query, key, value, mask)
    ```
    """

    hidden_start: torch.Tensor
    hidden_end: torch.Tensor
    branch_ids: torch.Tensor
    queries: int
    _derived: dict[Any, Any] = field(default_factory=dict, repr=False)
    _segments: list[KeySegments] | None = field(default=None, repr=False)

    @classmethod
    def from_machines(
        cls,
        machines: Sequence[StructureMachine],
        branch_ids: torch.Tensor,
        queries: int | None = None,
        device: torch.device | str | None = None,
    ) -> "PathMask":
        """Reads the intervals off the structure of every row.

        Args:
            machines (`Sequence[StructureMachine]`, length B): each has read the tokens of its row, padding left out.
            branch_ids (`torch.Tensor` of shape `(B, S)`, integer): branch of every slot, -1 for padding, which may
                stand anywhere.
            queries (`int`, *optional*): how many of the last slots are new; all by default.
            device (`torch.device` or `str`, *optional*): where the mask goes; that of `branch_ids` by default.

        Raises:
            ValueError: if the machines do not fit `branch_ids`, or `queries` lies outside 1 to S.
        """
        if branch_ids.dim() != 2 or branch_ids.shape[0] != len(machines):
            raise ValueError(
                f"`branch_ids` must have shape (rows, slots) with a row for each of the {len(machines)} `machines`, "
                f"got {tuple(branch_ids.shape)}."
            )
        slots = branch_ids.shape[1]
        queries = slots if queries is None else queries
        if not 1 <= queries <= slots:
            raise ValueError(f"`queries` must lie between 1 and the {slots} slots of `branch_ids`, got {queries}.")
        branches = branch_ids.detach().to("cpu", torch.int32)
        tables = [_hidden_from(row, machine, branches[row]) for row, machine in enumerate(machines)]
        depth = max(1, *(len(intervals) for table in tables for intervals in table))
        hidden = torch.empty(2, len(tables), depth, slots, dtype=torch.int32)
        for row, table in enumerate(tables):
            padded = torch.tensor([intervals + [(0, 0)] * (depth - len(intervals)) for intervals in table])
            entry = branches[row] + 1
            for level, sides in enumerate(padded.int().permute(1, 2, 0)):
                for side, rows in enumerate(sides):
                    # Into its place: a copy on the way would be as large as the mask.
                    torch.index_select(rows, 0, entry, out=hidden[side, row, level])
        mask = cls(hidden[0], hidden[1], branches, queries)
        return mask.to(branch_ids.device if device is None else device)

    @property
    def batch_size(self) -> int:
        """B."""
        return self.branch_ids.shape[0]

    @property
    def slots(self) -> int:
        """S."""
        return self.branch_ids.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.branch_ids.device

    @property
    def nbytes(self) -> int:
        """Bytes of everything the mask keeps, what was derived from it included."""
        own = (self.hidden_start, self.hidden_end, self.branch_ids, *(t for s in self._segments or () for t in s))
        return sum(kept.nbytes for kept in (*own, *self._derived.values()))

    def to(self, device: torch.device | str) -> "PathMask":
        """The mask on `device`; itself if it is there already. What was derived is not taken along."""
        if torch.empty(0, device=device).device == self.device:
            return self
        start, end, branches = (each.to(device) for each in (self.hidden_start, self.hidden_end, self.branch_ids))
        # Segments are wanted on the host: going there from a device, they are found without copying back.
        return PathMask(start, end, branches, self.queries, _segments=self.segments())

    def derived(self, key: Any, build: Callable[[], _Derived]) -> _Derived:
        """What `build` makes of this mask, made once per `key`. It must have `nbytes`."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    def visible(self) -> torch.Tensor:
        """The dense mask, bool of shape `(B, Q, S)`: for references, tests and backends that know no other form."""
        first = self.slots - self.queries
        keys = torch.arange(self.slots, device=self.device)
        visible = torch.empty(self.batch_size, self.queries, self.slots, dtype=torch.bool, device=self.device)
        step = max(1, (1 << 22) // self.slots)  # the comparisons below take as much again, a few rows at a time
        for begin in range(0, self.queries, step):
            rows = torch.arange(begin, min(begin + step, self.queries), device=self.device)[:, None] + first
            part = visible[:, begin : begin + step]
            part[:] = keys <= rows
            for start, end in zip(self.hidden_start.unbind(1), self.hidden_end.unbind(1), strict=True):
                part &= (rows < start[:, None]) | (rows >= end[:, None])
        return visible

    def real_slots(self) -> torch.Tensor | None:
        """Bool of shape `(B, S)`, False for padding; `None` where there is none."""
        real: torch.Tensor = self.derived("real_slots", lambda: self.branch_ids >= 0)
        padded: torch.Tensor = self.derived("padded", lambda: (~real).any().cpu())
        return real if padded else None

    def block_runs(self, block_m: int, block_n: int) -> BlockRuns:
        """For every block of `block_m` queries the runs of blocks of `block_n` keys that it sees anything of.

        A pair of blocks is left out iff nothing in it is visible, and full iff all of it is and it lies within bounds.
        """
        return self._block_runs(block_m, block_n, transposed=False)

    def block_runs_transposed(self, block_m: int, block_n: int) -> BlockRuns:
        """The pairs of `block_runs` by key block: for each, the runs of query blocks that see anything of it."""
        return self._block_runs(block_m, block_n, transposed=True)

    def segments(self) -> list[KeySegments]:
        """The keys of every batch row, in stretches that are hidden from the same rows."""
        if self._segments is None:
            self._segments = []
            for hidden in zip(self.hidden_start.cpu(), self.hidden_end.cpu(), strict=True):
                changes = torch.zeros(self.slots, dtype=torch.bool)
                changes[0] = True
                for level in (level for side in hidden for level in side):
                    changes[1:] |= level[1:] != level[:-1]
                first = changes.nonzero().flatten()
                self._segments.append(KeySegments(first.int(), *(side[:, first] for side in hidden)))
        return self._segments

    def without_padding(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each tensor, `(B, heads, Q or S, D)`, with 0 at padding: a backend that masks scores still multiplies what
        stands there by 0, and NaN would stay NaN."""
        real = self.real_slots()
        if real is None:
            return tensors
        return tuple(each.masked_fill(~real[:, None, -each.shape[2] :, None], 0) for each in tensors)

    def check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raises `ValueError` unless query `(B, HQ, Q, D)`, key and value `(B, HKV, S, D)` fit the mask."""
        if query.dim() != 4 or query.shape[0] != self.batch_size or query.shape[2] != self.queries:
            raise ValueError(
                f"`query` must have shape (rows, heads, new tokens, head dim) with {self.batch_size} rows and "
                f"{self.queries} new tokens as in `mask`, got {tuple(query.shape)}."
            )
        batch, heads, _, dim = query.shape
        if key.dim() != 4 or (key.shape[0], key.shape[2], key.shape[3]) != (batch, self.slots, dim):
            raise ValueError(
                f"`key` must have shape (rows, kv heads, slots, head dim) with {batch} rows, {self.slots} slots as in "
                f"`mask` and the head dim {dim} of `query`, got {tuple(key.shape)}."
            )
        if value.shape != key.shape:
            raise ValueError(
                f"`value` must have the shape of `key`, {tuple(key.shape)}, got {tuple(value.shape)}. Head dims of "
                "keys and values that differ are not supported."
            )
        if heads % key.shape[1]:
            raise ValueError(
                f"`query` has {heads} heads, `key` {key.shape[1]}: the first must be a multiple of the second."
            )
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dtype != query.dtype or tensor.device != self.device:
                raise ValueError(
                    f"`{name}` is {tensor.dtype} on {tensor.device}; its dtype must be {query.dtype} as that of "
                    f"`query`, its device {self.device} as that of `mask`. Convert it, or move the mask (`mask.to`)."
                )

    def _block_runs(self, block_m: int, block_n: int, transposed: bool) -> BlockRuns:
        def build() -> BlockRuns:
            segments = self.segments()
            return find_block_runs(segments, self.slots, self.queries, block_m, block_n, transposed).to(self.device)

        return self.derived(("block_runs", block_m, block_n, transposed), build)


def _hidden_from(row: int, machine: StructureMachine, branch_ids: torch.Tensor) -> list[list[Interval]]:
    """The rows that do not see the keys of each branch, by slot. The first entry is for padding, branch -1."""
    slots = len(branch_ids)
    real = _stretches(branch_ids >= 0)
    count = sum(end - start for start, end in real)
    last_branch = int(branch_ids.max())
    if count != machine.length or last_branch >= len(machine.parents):
        raise ValueError(
            f"`branch_ids` row {row} has {count} slots that are no padding, in branches up to {last_branch}; its "
            f"machine has read {machine.length} tokens in {len(machine.parents)} branches. Give each token its "
            "branch, padding -1."
        )
    # No token stands before padding on the left, so it need not be hidden from any.
    padding = [gap for gap in _stretches(branch_ids < 0) if gap[0] > 0]
    first_tokens = [0]
    for start, end in real:
        first_tokens.append(first_tokens[-1] + end - start)

    def slot(token: int) -> int:
        stretch = bisect_right(first_tokens, token) - 1
        return real[stretch][0] + token - first_tokens[stretch]

    def rows_of(spans: Iterable[Interval]) -> list[Interval]:
        return _merged([*((slot(start), slot(end - 1) + 1) for start, end in spans if start < end), *padding])

    return [[(0, slots)], *map(rows_of, _hidden_from_branches(machine))]


def _hidden_from_branches(machine: StructureMachine) -> list[list[Interval]]:
    """For every branch the spans of tokens that come after it and do not see it, ascending; some may be empty."""
    hidden: list[list[Interval]] = [[] for _ in machine.parents]
    starts = [index for index, tag in machine.events if not tag]
    roots = [branch for branch, parent in enumerate(machine.parents) if parent < 0]
    for root, document_end in zip(roots, [*starts[1:], machine.length], strict=True):
        hidden[root] = [(document_end, machine.length)]
    blocks = list(machine.blocks)
    while blocks:
        block = blocks.pop()
        later: list[Interval] = []  # siblings after the path; one span unless a path follows the conclusion
        for path in reversed(block.paths):
            hidden[path.branch] = later + hidden[block.branch]
            later = _merged([(path.start, machine.length if path.end is None else path.end), *later])
            blocks += path.blocks
    return hidden


def _merged(intervals: list[Interval]) -> list[Interval]:
    """The same rows in as few intervals as possible, ascending."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _stretches(states: torch.Tensor) -> list[Interval]:
    """The stretches of True."""
    borders = torch.diff(torch.nn.functional.pad(states.to(torch.int8), (1, 1))).nonzero().flatten().tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))
