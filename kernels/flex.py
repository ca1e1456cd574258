"""Multiverse Attention through PyTorch's FlexAttention, with a `BlockMask` made from the block runs of a `PathMask`.

`create_block_mask` evaluates the mask for all pairs of tokens, or compiles a kernel that does; the block runs say the
same. Within a partial block the predicate reads the intervals.

Shapes: B batch rows, HQ query heads, HKV key-value heads, Q new (query) tokens, S slots (cached and new tokens),
D head dim.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .block_runs import Runs, written_out
from .path_mask import PathMask

#: FlexAttention's own block size. It lists blocks by tables of (query blocks, key blocks), so that a longer text gets
#: larger blocks, and its tables stay at 262 KB.
_SMALLEST_BLOCK = 128
_MOST_BLOCKS = 128


def flex_path_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PathMask,
    scale: float | None = None,
) -> torch.Tensor:
    """Multiverse Attention by a kernel that PyTorch compiles when it first runs.

    On the CPU there is the forward pass only, and each new length compiles anew.

    Args:
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`): new tokens.
        key, value (`torch.Tensor` of shape `(B, HKV, S, D)`): all tokens.
        mask (`PathMask`): of B rows, Q queries and S slots.
        scale (`float`, *optional*): factor of the scores, 1 / sqrt(D) by default.

    Returns:
        Shape `(B, HQ, Q, D)`. A row that sees nothing is exactly 0, and what stands at padding is not read.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
        NotImplementedError: on the CPU, if a gradient is wanted.
    """
    mask.check(query, key, value)
    inputs: tuple[torch.Tensor, ...] = (query, key, value)
    if query.device.type == "cpu":
        if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
            raise NotImplementedError(
                "FlexAttention has no backward pass on the CPU. Train there with the attention implementation 'sdpa' "
                "or 'eager', or run the model under `torch.no_grad()`."
            )
        inputs = tuple(each.detach() for each in inputs)
    return _compiled(query.device.type)(*mask.without_padding(*inputs), flex_block_mask(mask), scale)


def flex_block_mask(mask: PathMask) -> BlockMask:
    """The mask in FlexAttention's form, made once per mask and kept with it."""
    return mask.derived("flex", lambda: _KeptBlockMask.of(mask)).block_mask


class _KeptBlockMask(NamedTuple):
    """A `BlockMask` that knows its size."""

    block_mask: BlockMask
    nbytes: int

    @classmethod
    def of(cls, mask: PathMask) -> "_KeptBlockMask":
        block = _SMALLEST_BLOCK
        while max(mask.queries, mask.slots) > block * _MOST_BLOCKS:
            block *= 2
        query_blocks, key_blocks = -(-mask.queries // block), -(-mask.slots // block)
        keys, queries = mask.block_runs(block, block), mask.block_runs_transposed(block, block)
        tables = (
            *_table(keys.partial, key_blocks),
            *_table(keys.full, key_blocks),
            *_table(queries.partial, query_blocks),
            *_table(queries.full, query_blocks),
        )
        block_mask = BlockMask(
            (mask.queries, mask.slots), *tables, BLOCK_SIZE=(block, block), mask_mod=_predicate(mask)
        )
        return cls(block_mask, sum(table.nbytes for table in tables))


def _table(runs: Runs, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of `runs` as FlexAttention lists them: how many there are for every outer block, `(B, 1, outer)`, and
    which, `(B, 1, outer, columns)`, of which the first so many count; int32."""
    batch, outer = runs.offsets.shape[0], runs.offsets.shape[1] - 1
    lengths = runs.end - runs.start
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))[runs.offsets]
    counts = bounds.diff(dim=1)
    total = int(counts.sum())
    blocks = written_out(runs.start, runs.end, total)
    # Block number i of the list belongs to place i - (first of its outer block) of a row of the table.
    rows = torch.arange(batch * outer, dtype=torch.int32, device=blocks.device)
    shift = rows * columns - bounds[:, :-1].flatten()
    places = torch.arange(total, dtype=torch.int32, device=blocks.device)
    places += torch.repeat_interleave(shift, counts.flatten(), output_size=total)
    table = blocks.new_zeros(batch * outer * columns).scatter_(0, places.long(), blocks)
    return counts[:, None], table.view(batch, 1, outer, columns)


def _predicate(mask: PathMask) -> Callable[..., torch.Tensor]:
    """FlexAttention's `mask_mod`: whether a query, counted from the first new token, sees a key."""
    hidden_start, hidden_end, first_row = mask.hidden_start, mask.hidden_end, mask.slots - mask.queries

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        row = query + first_row
        visible = key <= row
        for level in range(hidden_start.shape[1]):
            before, after = row < hidden_start[batch, level, key], row >= hidden_end[batch, level, key]
            visible = visible & (before | after)
        return visible

    return sees


@cache
def _compiled(device_type: str) -> Callable[..., torch.Tensor]:
    """The attention compiled for a kind of device.

    On the CPU for one shape at a time: PyTorch 2.13 writes wrong C++ for shapes that vary. Elsewhere in one piece, as
    outside a compiled graph FlexAttention computes all scores: better an error than memory for Q * S of them.
    """

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: BlockMask, scale: float | None
    ) -> torch.Tensor:
        grouped = query.shape[1] != key.shape[1]
        return flex_attention(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=grouped)

    on_cpu = device_type == "cpu"
    return torch.compile(attend, dynamic=False if on_cpu else None, fullgraph=not on_cpu)
