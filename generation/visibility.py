"""Which cache slots every branch of a request sees, kept up to date slot by slot.

A step adds columns for its own tokens; a fork copies a row and a merge joins rows. Nothing is rebuilt, and the keys
and values themselves are never touched.
"""

from collections.abc import Sequence

import torch

from .slot_bits import SlotBits


class VisibleSlots:
    """Table of one request: a row per branch, a column per cache slot in use.

    Slots count in the order in which tokens are run, and a token is run after all it may see. So a token sees the
    slots that its branch's row allows, up to its own.

    Args:
        capacity (`int`): slots to reserve at first.
        mirror (`SlotBits`, *optional*): is told of every change, as one of `request`.
        request (`int`): number of the request.

    Attributes:
        length (`int`): slots in use.
    """

    def __init__(self, capacity: int = 64, mirror: SlotBits | None = None, request: int = 0) -> None:
        self.length = 0
        self.mirror, self.request = mirror, request
        # The slots that the rows of the last step see, and how many slots there were; kept while neither the rows nor
        # what they see has changed.
        self._union: tuple[frozenset[int], torch.Tensor, int] | None = None
        self._table = torch.zeros(4, max(capacity, 1), dtype=torch.bool)
        self._seen: list[int] = [0] * 4
        self._free = [3, 2, 1, 0]

    @property
    def rows_in_use(self) -> int:
        """Rows that belong to a branch."""
        return len(self._seen) - len(self._free)

    def open_row(self, parent: int | None = None) -> int:
        """A row for a new branch, which sees what `parent` sees now, or nothing."""
        if not self._free:
            count = len(self._seen)
            self._free = list(range(2 * count - 1, count - 1, -1))
            self._seen += [0] * count
            self._table = torch.cat([self._table, torch.zeros_like(self._table)])
        row = self._free.pop()
        if parent is None:
            self._table[row] = False
        else:
            self._table[row] = self._table[parent]
        self._seen[row] = 0 if parent is None else self._seen[parent]
        self._union = None
        if self.mirror is not None:
            self.mirror.open_row(self.request, row, parent, self.length)
        return row

    def close_row(self, row: int) -> None:
        """Gives the row of a merged branch back."""
        self._free.append(row)

    def absorb(self, row: int, other: int) -> None:
        """Lets `row` see all that `other` sees."""
        self._table[row] |= self._table[other]
        self._seen[row] = int(self._table[row].sum())
        self._union = None
        if self.mirror is not None:
            self.mirror.absorb(self.request, row, other, self.length)

    def append(self, rows: Sequence[int]) -> None:
        """Adds a slot for each of `rows`, seen by that row alone until others open from it or absorb it."""
        first, self.length = self.length, self.length + len(rows)
        self._reserve(self.length)
        self._table[list(rows), list(range(first, self.length))] = True
        for row in rows:
            self._seen[row] += 1
        if self.mirror is not None:
            self.mirror.append(self.request, rows, first)

    def append_block(self, visible: dict[int, torch.Tensor]) -> None:
        """Adds slots, as many as each tensor of `visible` has entries: by row, a bool tensor of what it sees."""
        first = self.length
        for row, sees in visible.items():
            self._reserve(first + sees.shape[0])
            self.length = first + sees.shape[0]
            self._table[row, first : self.length] = sees
            self._seen[row] += int(sees.sum())
        self._union = None
        if self.mirror is not None:
            self.mirror.append_block(self.request, visible, first)

    def seen_by_any(self, rows: Sequence[int]) -> torch.Tensor:
        """Slots that at least one of the newest tokens may see, ascending, int64 of shape `(seen,)`.

        Args:
            rows (`Sequence[int]`): the row of each of them; they stand in the last `len(rows)` slots.
        """
        live = frozenset(rows)
        if self._union is not None and self._union[0] == live and self._union[2] >= self.length - len(rows):
            seen = torch.cat([self._union[1], torch.arange(self._union[2], self.length)])
        else:
            seen = self._table[list(live), : self.length].any(dim=0).nonzero().flatten()
        self._union = (live, seen, self.length)
        return seen

    def mask(self, rows: Sequence[int]) -> torch.Tensor | None:
        """What the newest tokens see.

        Args:
            rows (`Sequence[int]`): the row of each of them; they stand in the last `len(rows)` slots.

        Returns:
            Bool tensor of shape `(len(rows), slots)`, or `None` for a single token that sees every slot.
        """
        new = len(rows)
        if new == 1 and self._seen[rows[0]] == self.length:
            return None
        mask = self._table[list(rows), : self.length]
        if new > 1:
            mask[:, self.length - new :].tril_()
        return mask

    def _reserve(self, length: int) -> None:
        capacity = self._table.shape[1]
        if length > capacity:
            extra = max(length, 2 * capacity) - capacity
            self._table = torch.nn.functional.pad(self._table, (0, extra))
