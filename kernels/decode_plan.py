"""What a decode step tells the kernel: whose queries are new, which cache slots they may see.

Letters: B requests, T new (query) tokens of all of them in one flat row, W words of branch bits. A slot is a place in
the one cache that all requests share; slots count from 0 over the whole cache ("absolute"). A request's branches are
numbered by the rows of its table of visible slots, as in `generation/visibility.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Table rows in one word of `slot_bits`.
ROWS_PER_WORD = 32

# Pieces of the one buffer start at multiples of 16 entries, so that every pointer is as aligned as the last step's.
_ALIGNMENT = 16


@dataclass(frozen=True)
class RequestQueries:
    """What one request adds to a step, as plain host data; all three empty for a request that has no new token.

    Attributes:
        rows (`Sequence[int]`): for each new token, the table row of its branch.
        limits (`Sequence[int]`): for each new token, the exclusive bound on the slots that it sees: its own slot + 1.
        slots (`torch.Tensor` or `Sequence[int]`): slots that at least one of the new tokens may see, their own
            included, ascending; a CPU tensor of integers, or a sequence.
    """

    rows: Sequence[int]
    limits: Sequence[int]
    slots: torch.Tensor | Sequence[int]


@dataclass(frozen=True)
class DecodePlan:
    """The visible set of every query of a step, in O(slots + T) memory.

    Query t of request b sees slot s exactly if s is listed for b in `slot_index`, `s < q_limit[t]`, and bit
    `q_row[t] % 32` of `slot_bits[q_row[t] // 32, s]` is set. `slot_index` decides what is read, the bits and limits
    what is seen: a slot that is listed though no query sees it costs its bytes and changes nothing.

    Attributes:
        cu_q (`torch.IntTensor` of shape `(B + 1,)`): first query of every request, and T.
        q_request (`torch.IntTensor` of shape `(T,)`): request of every query.
        q_row (`torch.IntTensor` of shape `(T,)`): table row of every query's branch.
        q_limit (`torch.IntTensor` of shape `(T,)`): exclusive bound on the slots that a query sees.
        slot_index (`torch.IntTensor` of shape `(total,)`): slots to read, request after request, ascending in each.
        idx_start, idx_len (`torch.IntTensor` of shape `(B,)`): where a request's stretch of `slot_index` begins, and
            how long it is.
        slot_bits (`torch.IntTensor` of shape `(W, capacity)`): bit r % 32 of word r // 32 of a slot says whether row r
            of its request's table sees it. Bits of slots that no request lists are never read.
        max_q (`int`): most queries of a request.
        max_kv (`int`): most slots of a request, 0 where nothing is to be read.
        slot_end (`int`): one past the highest slot listed.
    """

    cu_q: torch.Tensor
    q_request: torch.Tensor
    q_row: torch.Tensor
    q_limit: torch.Tensor
    slot_index: torch.Tensor
    idx_start: torch.Tensor
    idx_len: torch.Tensor
    slot_bits: torch.Tensor
    max_q: int
    max_kv: int
    slot_end: int

    @property
    def requests(self) -> int:
        """B."""
        return self.idx_len.shape[0]

    @property
    def tokens(self) -> int:
        """T."""
        return self.q_row.shape[0]

    @property
    def words(self) -> int:
        """W."""
        return self.slot_bits.shape[0]

    @classmethod
    def build(cls, requests: Sequence[RequestQueries], slot_bits: torch.Tensor) -> "DecodePlan":
        """Plan of a step, on the device of `slot_bits`.

        Everything but the bits goes to the device in one copy from pinned memory that nothing waits for. The bits stay
        where they are and are not looked at: an engine keeps them on the device and changes them there, in stream
        order, as branches open, run and merge; `pack_rows` makes them from a table of visible slots.

        Args:
            requests (`Sequence[RequestQueries]`): in the order of the flat row.
            slot_bits (`torch.IntTensor` of shape `(W, capacity)`): see the class; the second axis contiguous.

        Raises:
            ValueError: if rows and limits differ in number, or a row, limit or slot is outside `slot_bits`, or slots
                do not ascend or are not on the CPU.
        """
        _check_bits(slot_bits)
        row_limit, capacity = ROWS_PER_WORD * slot_bits.shape[0], slot_bits.shape[1]
        stretches = []
        for number, request in enumerate(requests):
            _check_queries(number, request, row_limit, capacity)
            stretches.append(_checked_slots(number, request, capacity))
        counts = torch.tensor([len(request.rows) for request in requests], dtype=torch.int32)
        lengths = torch.tensor([len(slots) for slots in stretches], dtype=torch.int32)
        pieces = {
            "cu_q": _bounds(counts),
            "q_request": torch.arange(len(requests), dtype=torch.int32).repeat_interleave(counts),
            "q_row": _flat([request.rows for request in requests]),
            "q_limit": _flat([request.limits for request in requests]),
            "slot_index": torch.cat(stretches) if stretches else lengths,
            "idx_start": _bounds(lengths)[:-1],
            "idx_len": lengths,
        }
        return cls(
            **_to_device(pieces, slot_bits.device),
            slot_bits=slot_bits,
            max_q=max((len(request.rows) for request in requests), default=0),
            max_kv=max((len(slots) for slots in stretches), default=0),
            slot_end=max((int(slots[-1]) + 1 for slots in stretches if len(slots)), default=0),
        )


def pack_rows(visible: torch.Tensor) -> torch.Tensor:
    """Words of `DecodePlan.slot_bits` from a table of visible slots.

    Args:
        visible (`torch.BoolTensor` of shape `(rows, slots)`): which slots every row of a request's table sees.

    Returns:
        Shape `(ceil(rows / 32), slots)`, int32, on the same device: bit r % 32 of word r // 32 is `visible[r]`.

    Raises:
        ValueError: if `visible` is not a bool table.
    """
    if visible.dtype != torch.bool or visible.dim() != 2:
        raise ValueError(
            f"`visible` must be a bool tensor of shape (rows, slots), got {visible.dtype} of shape "
            f"{tuple(visible.shape)}."
        )
    words = -(-visible.shape[0] // ROWS_PER_WORD)
    padded = torch.nn.functional.pad(visible, (0, 0, 0, words * ROWS_PER_WORD - visible.shape[0]))
    shifts = torch.arange(ROWS_PER_WORD, dtype=torch.int32, device=visible.device)[:, None]
    # The 32nd bit is the sign: a sum of int32 with one bit each is still exact.
    bits = padded.view(words, ROWS_PER_WORD, visible.shape[1]).to(torch.int32) << shifts
    return bits.sum(1, dtype=torch.int32)


def _check_bits(slot_bits: torch.Tensor) -> None:
    if slot_bits.dtype != torch.int32 or slot_bits.dim() != 2 or slot_bits.shape[0] < 1:
        raise ValueError(
            f"`slot_bits` must be an int32 tensor of shape (words, capacity) with at least one word, got "
            f"{slot_bits.dtype} of shape {tuple(slot_bits.shape)}; `pack_rows` makes it from a bool table."
        )
    if slot_bits.shape[1] > 1 and slot_bits.stride(1) != 1:
        raise ValueError(
            f"`slot_bits` must be contiguous along the slots, got strides {slot_bits.stride()}; call .contiguous()."
        )


def _check_queries(number: int, request: RequestQueries, row_limit: int, capacity: int) -> None:
    if len(request.rows) != len(request.limits):
        raise ValueError(
            f"`requests[{number}]` has {len(request.rows)} rows and {len(request.limits)} limits: give one of each "
            "per new token."
        )
    if len(request.rows) and not (min(request.rows) >= 0 and max(request.rows) < row_limit):
        raise ValueError(
            f"`requests[{number}].rows` must be in [0, {row_limit}), as `slot_bits` has {row_limit // ROWS_PER_WORD} "
            f"words, got {min(request.rows)} to {max(request.rows)}; add words to `slot_bits`."
        )
    if len(request.limits) and not (min(request.limits) >= 0 and max(request.limits) <= capacity):
        raise ValueError(
            f"`requests[{number}].limits` must be in [0, {capacity}], the capacity of `slot_bits`, got "
            f"{min(request.limits)} to {max(request.limits)}; a limit is an absolute slot + 1."
        )


def _checked_slots(number: int, request: RequestQueries, capacity: int) -> torch.Tensor:
    """The slots of a request as int32, none where no query would read them."""
    slots = request.slots
    if not isinstance(slots, torch.Tensor):
        slots = torch.tensor(slots, dtype=torch.int64)
    if slots.device.type != "cpu" or slots.dim() != 1 or slots.is_floating_point() or slots.dtype == torch.bool:
        raise ValueError(
            f"`requests[{number}].slots` must be one row of integers on the CPU, where they can be checked without "
            f"waiting for a device, got {slots.dtype} of shape {tuple(slots.shape)} on {slots.device}."
        )
    if len(slots) == 0 or len(request.rows) == 0:
        return torch.empty(0, dtype=torch.int32)
    if not bool((slots[1:] > slots[:-1]).all()):
        raise ValueError(f"`requests[{number}].slots` must ascend with none twice; sort them and drop repeated ones.")
    if slots[0] < 0 or slots[-1] >= capacity:
        raise ValueError(
            f"`requests[{number}].slots` must be in [0, {capacity}), the capacity of `slot_bits`, got {int(slots[0])} "
            f"to {int(slots[-1])}; slots count from 0 over the whole cache."
        )
    return slots.to(torch.int32)


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    """Where stretches of these lengths begin, and where the last one ends."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _flat(parts: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([value for part in parts for value in part], dtype=torch.int32)


def _to_device(pieces: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """One buffer, one copy, and the pieces as views of it."""
    starts: dict[str, int] = {}
    size = 0
    for name, piece in pieces.items():
        starts[name] = size
        size += -(-len(piece) // _ALIGNMENT) * _ALIGNMENT
    # Pinned pages come from PyTorch's own pool, which does not hand them out again before the copy is done.
    buffer = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
    for name, piece in pieces.items():
        buffer[starts[name] : starts[name] + len(piece)] = piece
    moved = buffer.to(device, non_blocking=True)
    return {name: moved[starts[name] : starts[name] + len(piece)] for name, piece in pieces.items()}
