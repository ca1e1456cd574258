"""Multiverse Attention through flash-attn's public call for sequences of varying length, gradients included.

A stretch of rows of one branch sees the same earlier keys in all its rows, and of its own those up to the row: a
causal mask that is aligned to the bottom right corner, which is what flash-attn computes for more keys than queries.
So each stretch is one sequence: its queries, against a copy of the keys that it sees and itself.

No mask exists anywhere. The price are the copies: a key is copied for every stretch that sees it, about six times in a
text of 77 branches on three levels (`VarlenPlan.keys` says how many there are), and they live until the backward pass.

Shapes: B batch rows, HQ query heads, HKV key-value heads, Q new (query) tokens, S slots (cached and new tokens),
D head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .block_runs import KeySegments, runs_of_true, written_out
from .path_mask import PathMask

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

#: Pairs of a stretch and a segment that are looked at together; bounds the temporary memory of a plan.
_CHUNK_PAIRS = 1 << 14


@dataclass
class VarlenPlan:
    """Which rows and keys make up each sequence, as ranges in the flat rows `(B * Q)` and slots `(B * S)` of a batch.

    Attributes:
        query_start, query_end (`torch.IntTensor` of shape `(sequences,)`): rows of every sequence.
        key_start, key_end (`torch.IntTensor` of shape `(ranges,)`): ranges of the keys, sequence after sequence.
        query_offsets, key_offsets (`torch.IntTensor` of shape `(sequences + 1,)`): first query and first key of every
            sequence once the ranges are written out (`cu_seqlens` of the varlen call).
        queries, keys (`int`): how many there are in all.
        max_queries, max_keys (`int`): most queries and most keys of a sequence.
    """

    query_start: torch.Tensor
    query_end: torch.Tensor
    key_start: torch.Tensor
    key_end: torch.Tensor
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    queries: int
    keys: int
    max_queries: int
    max_keys: int

    @classmethod
    def from_mask(cls, mask: PathMask) -> "VarlenPlan":
        """Finds the stretches of rows and what each sees."""
        parts = [_row_ranges(mask, row) for row in range(mask.batch_size)]
        first, last, counts, start, end = (torch.cat(each) for each in zip(*parts, strict=True))
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        queries, keys = last - first, torch.zeros_like(first).index_add_(0, owner, end - start)
        query_offsets, key_offsets = (
            torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)) for lengths in (queries, keys)
        )
        some = len(counts) > 0
        return cls(
            query_start=first.to(mask.device),
            query_end=last.to(mask.device),
            key_start=start.to(mask.device),
            key_end=end.to(mask.device),
            query_offsets=query_offsets.to(mask.device),
            key_offsets=key_offsets.to(mask.device),
            queries=int(query_offsets[-1]),
            keys=int(key_offsets[-1]),
            max_queries=int(queries.max()) if some else 0,
            max_keys=int(keys.max()) if some else 0,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in vars(self).values() if isinstance(each, torch.Tensor))

    def query_index(self) -> torch.Tensor:
        """Flat rows in the order of the varlen call, shape `(queries,)`."""
        return written_out(self.query_start, self.query_end, self.queries)

    def key_index(self) -> torch.Tensor:
        """Flat slots in the order of the varlen call, shape `(keys,)`."""
        return written_out(self.key_start, self.key_end, self.keys)


def flash_varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PathMask,
    scale: float | None = None,
    varlen: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """Exact Multiverse Attention, one varlen sequence per stretch of rows of a branch.

    Args:
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`): float16 or bfloat16 for flash-attn.
        key, value (`torch.Tensor` of shape `(B, HKV, S, D)`): in the dtype of `query`.
        mask (`PathMask`): of B rows, Q queries and S slots.
        scale (`float`, *optional*): factor of the scores, 1 / sqrt(D) by default.
        varlen (`Callable`, *optional*): a function of the contract of `flash_attn_varlen_func`, the default.

    Returns:
        Shape `(B, HQ, Q, D)`; padding rows are exactly 0, and what stands at padding is not read.

    Raises:
        ImportError: if flash-attn is not installed and no `varlen` is given.
        ValueError: if shapes, dtypes or devices do not fit.
    """
    if varlen is None:
        varlen = _installed_varlen()
        if query.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"`query` is {query.dtype}, but flash-attn computes in float16 and bfloat16 only. Load the model in "
                "one of them, or choose another attention implementation."
            )
    mask.check(query, key, value)
    plan = mask.derived("varlen_plan", lambda: VarlenPlan.from_mask(mask))
    rows, slots = plan.query_index().long(), plan.key_index()  # `index_copy` takes no int32
    batch, heads, queries, dim = query.shape
    attended = _flat(query).index_select(0, rows)
    if plan.queries:
        attended = varlen(
            attended,
            _flat(key).index_select(0, slots),
            _flat(value).index_select(0, slots),
            cu_seqlens_q=plan.query_offsets,
            cu_seqlens_k=plan.key_offsets,
            max_seqlen_q=plan.max_queries,
            max_seqlen_k=plan.max_keys,
            softmax_scale=scale,
            causal=True,
        )
    output = query.new_zeros(batch * queries, heads, dim).index_copy(0, rows, attended)
    return output.view(batch, queries, heads, dim).transpose(1, 2)


def _installed_varlen() -> Callable[..., torch.Tensor]:
    """flash-attn's function, or an error that says how to get it."""
    if flash_attn_varlen_func is None:
        raise ImportError(
            "Attention through flash-attn needs the package flash-attn, which is not installed. Run "
            "`pip install flash-attn --no-build-isolation` (CUDA only), or choose another attention implementation."
        )
    return flash_attn_varlen_func


def _row_ranges(mask: PathMask, row: int) -> tuple[torch.Tensor, ...]:
    """The sequences of one batch row: first and end query, number of key ranges; start and end of the ranges."""
    segments = mask.segments()[row]
    branches = mask.branch_ids[row].cpu()
    offset = mask.slots - mask.queries
    begins = torch.ones(mask.slots, dtype=torch.bool)
    begins[1:] = branches[1:] != branches[:-1]
    begins[:offset] = False
    begins[offset] = True
    first = begins.nonzero().flatten().int()
    last = torch.cat((first[1:], first.new_tensor([mask.slots])))
    real = branches[first] >= 0
    first, last = first[real], last[real]
    segment_end = torch.cat((segments.start[1:], segments.start.new_tensor([mask.slots])))
    step = max(1, _CHUNK_PAIRS // len(segment_end))
    parts = [
        _seen_ranges(first[begin : begin + step], last[begin : begin + step], segments, segment_end)
        for begin in range(0, len(first), step)
    ]
    empty = (first.new_empty(0),) * 3
    counts, start, end = (torch.cat(each) for each in zip(empty, *parts, strict=True))
    queries, slots = row * mask.queries - offset, row * mask.slots
    return first + queries, last + queries, counts, start + slots, end + slots


def _seen_ranges(
    first: torch.Tensor, last: torch.Tensor, segments: KeySegments, segment_end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What stretches of rows `first` to `last` (exclusive) see: number of ranges of keys, their starts and ends."""
    row = first[:, None]
    seen = segments.start <= row
    for hidden_start, hidden_end in zip(segments.hidden_start, segments.hidden_end, strict=True):
        seen &= (row < hidden_start) | (row >= hidden_end)
    counts, start, end = runs_of_true(seen)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    # The last range of a stretch holds its own keys, and may go on beyond them.
    return counts, segments.start[start], torch.minimum(segment_end[end - 1], last[owner])


def _flat(heads_first: torch.Tensor) -> torch.Tensor:
    """`(B, heads, tokens, D)` as `(B * tokens, heads, D)`."""
    return heads_first.transpose(1, 2).flatten(0, 1)
