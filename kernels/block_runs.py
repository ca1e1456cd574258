"""Which pairs of a query block and a key block hold anything visible, from the intervals of a `PathMask`.

Worked out for stretches of keys with the same intervals, a few blocks at a time, so that no table of all pairs exists.

Shapes: B batch rows, Q new (query) tokens, S slots (cached and new tokens), K intervals per key.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

#: Block pairs that are looked at together; bounds the temporary memory.
_CHUNK_PAIRS = 1 << 12


class Runs(NamedTuple):
    """Runs of consecutive blocks, those of every outer block after each other; int32.

    Outer block i of batch row b has the runs `offsets[b, i]` to `offsets[b, i + 1]` (exclusive), in ascending order;
    run r holds the blocks `start[r]` to `end[r]` (exclusive).
    """

    offsets: torch.Tensor  # [B, outer blocks + 1]
    start: torch.Tensor  # [total]
    end: torch.Tensor  # [total]


class BlockRuns(NamedTuple):
    """The pairs of a query block and a key block in which anything is visible.

    Attributes:
        full (`Runs`): pairs in which every query sees every key, and that lie within bounds: no mask is needed.
        partial (`Runs`): all other pairs that hold at least one visible entry.
    """

    full: Runs
    partial: Runs

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for runs in self for tensor in runs)

    def to(self, device: torch.device) -> "BlockRuns":
        """The same runs on `device`."""
        return BlockRuns(*(Runs(*(tensor.to(device) for tensor in runs)) for runs in self))


class KeySegments(NamedTuple):
    """Stretches of consecutive keys of one batch row that are hidden from the same rows; int32 on the CPU."""

    start: torch.Tensor  # [segments] first key; a segment ends where the next begins
    hidden_start: torch.Tensor  # [K, segments]
    hidden_end: torch.Tensor  # [K, segments]


def find_block_runs(
    segments: Sequence[KeySegments], slots: int, queries: int, block_m: int, block_n: int, transposed: bool
) -> BlockRuns:
    """The live pairs of blocks of `block_m` queries (the last `queries` of `slots` rows) and `block_n` keys.

    Args:
        segments (`Sequence[KeySegments]`, length B): of every batch row.
        transposed (`bool`): list runs of query blocks by key block, not runs of key blocks by query block.

    Returns:
        Tensors on the CPU.

    Raises:
        ValueError: if a block is empty.
    """
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        if block < 1:
            raise ValueError(f"`{name}` must be at least 1, got {block}.")
    blocks = (-(-queries // block_m), -(-slots // block_n))
    outer, inner = reversed(blocks) if transposed else blocks
    lists: tuple[_RunLists, _RunLists] = (_RunLists(), _RunLists())
    for row in segments:
        pieces = _Pieces.cut(row, slots, block_n)
        # Key blocks that a segment border divides count twice; few do.
        step = max(1, _CHUNK_PAIRS // (inner if transposed else len(pieces.start)))
        for begin in range(0, outer, step):
            chunk, rest = range(begin, min(begin + step, outer)), range(inner)
            pair = (rest, chunk) if transposed else (chunk, rest)
            live, full = pieces.states(*pair, slots - queries, block_m)
            for states, found in zip((full, live & ~full), lists, strict=True):
                found.append(states.T if transposed else states)
    return BlockRuns(*(found.runs(outer) for found in lists))


@dataclass
class _Pieces:
    """The keys of one batch row, cut at the borders of segments and of key blocks."""

    start: torch.Tensor  # int32 [pieces]
    end: torch.Tensor
    hidden_start: torch.Tensor  # int32 [K, pieces]
    hidden_end: torch.Tensor
    first_of_block: torch.Tensor  # int64 [key blocks + 1]
    block: int

    @classmethod
    def cut(cls, segments: KeySegments, slots: int, block: int) -> "_Pieces":
        borders = torch.arange(0, slots, block, dtype=torch.int32)
        start = torch.unique(torch.cat((segments.start, borders)))
        owner = torch.searchsorted(segments.start, start, right=True) - 1
        end = torch.cat((start[1:], start.new_tensor([slots])))
        first = torch.searchsorted(start, torch.cat((borders, borders.new_tensor([slots]))))
        return cls(start, end, segments.hidden_start[:, owner], segments.hidden_end[:, owner], first, block)

    def states(
        self, query_blocks: range, key_blocks: range, first_row: int, block_m: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which pairs of blocks are live and which are full, bool of shape `(query blocks, key blocks)` each."""
        first = self.first_of_block[key_blocks.start : key_blocks.stop + 1]
        chosen = slice(int(first[0]), int(first[-1]))
        slots = int(self.end[-1])
        row = torch.arange(query_blocks.start, query_blocks.stop, dtype=torch.int32)[:, None] * block_m + first_row
        row_end = (row + block_m).clamp(max=slots)
        row_begin = torch.maximum(row, self.start[chosen])  # the rows before see nothing of the piece: causality
        hidden = torch.zeros_like(row_begin)
        for start, end in zip(self.hidden_start[:, chosen], self.hidden_end[:, chosen], strict=True):
            # The intervals of a key are disjoint, so what they hide adds up.
            hidden += (torch.minimum(row_end, end) - torch.maximum(row_begin, start)).clamp_(min=0)
        live = row_end - row_begin > hidden
        full = (row >= self.end[chosen] - 1) & (hidden == 0)
        last = first[1:] - first[0] - 1

        def pieces_per_block(states: torch.Tensor) -> torch.Tensor:
            return torch.diff(states.cumsum(1, dtype=torch.int32)[:, last], prepend=torch.zeros_like(row), dim=1)

        key_end = torch.arange(key_blocks.start + 1, key_blocks.stop + 1) * self.block
        within = (row + block_m <= slots) & (key_end <= slots)
        return pieces_per_block(live) > 0, (pieces_per_block(full) == torch.diff(first)) & within


class _RunLists:
    """Collects the runs of True in rows of states."""

    def __init__(self) -> None:
        # Arrays, as thousands of small tensors that stay would keep the memory between them from being used again.
        self.counts, self.starts, self.ends = array("i"), array("i"), array("i")

    def append(self, states: torch.Tensor) -> None:
        for found, kept in zip(runs_of_true(states), (self.counts, self.starts, self.ends), strict=True):
            kept.frombytes(found.numpy().tobytes())

    def runs(self, outer: int) -> Runs:
        counts, start, end = (torch.tensor(kept, dtype=torch.int32) for kept in (self.counts, self.starts, self.ends))
        offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)).unfold(0, outer + 1, outer)
        return Runs(offsets.contiguous(), start, end)


def runs_of_true(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs of True in every row of `states`, `(rows, columns)`: number per row, starts and exclusive ends; int32."""
    edges = torch.diff(torch.nn.functional.pad(states.to(torch.int8), (1, 1)), dim=1)
    begins = edges == 1
    columns = (which.nonzero()[:, 1].int() for which in (begins, edges == -1))
    return begins.sum(1, dtype=torch.int32), *columns  # type: ignore[return-value]


def written_out(start: torch.Tensor, end: torch.Tensor, total: int) -> torch.Tensor:
    """All `total` numbers of int32 ranges `start` to `end` (exclusive), one range after the other."""
    lengths = end - start
    shift = start - (lengths.cumsum(0, dtype=torch.int32) - lengths)
    numbers = torch.arange(total, dtype=torch.int32, device=start.device)
    return numbers + torch.repeat_interleave(shift, lengths, output_size=total)
