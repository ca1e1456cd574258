"""The tables of visible slots of all requests on the model's device, as words of bits that the decode kernel reads.

Forks and merges change them there, in stream order; nothing is read back.
"""

from collections.abc import Mapping, Sequence

import torch
from multiverse.kernels.decode_plan import ROWS_PER_WORD, pack_rows

from .cache import PathCache
from .transfer import on_device


class SlotBits:
    """Mirror of every request's `VisibleSlots`.

    Args:
        cache (`PathCache`): says which slots belong to which request.
        device (`torch.device`): the model's.

    Attributes:
        words (`torch.IntTensor` of shape `(W, slots)`): bit r % 32 of word r // 32 of a slot says whether row r of its
            request's table sees it.
    """

    def __init__(self, cache: PathCache, device: torch.device) -> None:
        self.cache = cache
        self.words = torch.zeros(1, cache.slots, dtype=torch.int32, device=device)
        # New slots of this step: word, slot, bit.
        self._new: tuple[list[int], list[int], list[int]] = ([], [], [])

    def move(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Goes along with regions that have grown; `moves` are `(from, to, slots)`."""
        self.flush()
        words = self.words.new_zeros(self.words.shape[0], self.cache.slots)
        for source, target, count in moves:
            words[:, target : target + count] = self.words[:, source : source + count]
        self.words = words

    def open_row(self, request: int, row: int, parent: int | None, length: int) -> None:
        """As `VisibleSlots.open_row`, over the first `length` slots of the request."""
        self.flush()
        own = self._row(request, row, length)
        own &= ~_bit(row)
        if parent is not None:
            own |= self._seen(request, parent, length) << (row % ROWS_PER_WORD)

    def absorb(self, request: int, row: int, other: int, length: int) -> None:
        """As `VisibleSlots.absorb`."""
        self.flush()
        own = self._row(request, row, length)
        own |= self._seen(request, other, length) << (row % ROWS_PER_WORD)

    def append(self, request: int, rows: Sequence[int], first: int) -> None:
        """As `VisibleSlots.append`; `first` is the first of the new slots. Takes effect with the next `flush`."""
        start = self.cache.regions[request].start + first
        self._new[0].extend(row // ROWS_PER_WORD for row in rows)
        self._new[1].extend(range(start, start + len(rows)))
        self._new[2].extend(_bit(row) for row in rows)

    def append_block(self, request: int, visible: Mapping[int, torch.Tensor], first: int) -> None:
        """As `VisibleSlots.append_block`."""
        self.flush()
        count = len(next(iter(visible.values())))
        table = torch.zeros(max(visible) + 1, count, dtype=torch.bool)
        for row, sees in visible.items():
            table[row] = sees
        packed = pack_rows(table).to(self.words.device, non_blocking=True)
        self._grow(packed.shape[0])
        start = self.cache.regions[request].start + first
        self.words[: packed.shape[0], start : start + count] |= packed

    def flush(self) -> None:
        """Writes the slots that were appended."""
        words, slots, bits = self._new
        if words:
            self._grow(max(words) + 1)
            device = self.words.device
            self.words[on_device(words, device), on_device(slots, device)] = on_device(bits, device, torch.int32)
            self._new = ([], [], [])

    def _row(self, request: int, row: int, length: int) -> torch.Tensor:
        """The words that hold the bits of `row`, shape `(length,)`, a view."""
        self._grow(row // ROWS_PER_WORD + 1)
        start = self.cache.regions[request].start
        return self.words[row // ROWS_PER_WORD, start : start + length]

    def _seen(self, request: int, row: int, length: int) -> torch.Tensor:
        """1 where `row` sees a slot, else 0."""
        return (self._row(request, row, length) >> (row % ROWS_PER_WORD)) & 1

    def _grow(self, words: int) -> None:
        missing = words - self.words.shape[0]
        if missing > 0:
            self.words = torch.cat([self.words, self.words.new_zeros(missing, self.words.shape[1])])


def _bit(row: int) -> int:
    """The bit of `row` in its word, as an int32 holds it: the 32nd is the sign."""
    bit = 1 << (row % ROWS_PER_WORD)
    return bit - (1 << 32) if bit >> 31 else bit
