"""Forward pass of path attention: one program per block of queries, over the runs of key blocks that it sees.

Letters: B batch rows, HQ query heads, HKV key-value heads, Q new (query) tokens, S slots (cached and new tokens),
D head dim, K intervals per key.
"""

import torch

from .launch_table import padded_head_dim, training_launch
from .path_mask import PathMask
from .triton_support import INTERPRETED, jit, on_device_of, tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@jit
def load_rows(
    base,
    stride,
    first,
    end,
    real_ptr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows `first` to `first + BLOCK` of a matrix whose last axis is contiguous: `[BLOCK, BLOCK_D]`.

    If `MASKED`, those from `end` on are zero; if `PADDED` too, so are those whose entry in `real_ptr` is negative.
    Otherwise all must lie within bounds.
    """
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D)
    pointers = base + first.to(tl.int64) * stride + row[:, None] * stride + column[None, :]
    if MASKED:
        wanted = first + row < end
        if PADDED:
            wanted &= tl.load(real_ptr + first + row, mask=wanted, other=-1) >= 0
        rows = tl.load(pointers, mask=wanted[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
    return rows.to(tl.float32) if UPCAST else rows


@jit
def visible_entries(rows, last, keys, hidden_start_ptr, hidden_end_ptr, slots, depth, INTERVALS: tl.constexpr):
    """Whether each row sees each key, `[rows, keys]` in the form of `rows` and `keys`, which are expanded slots.

    A row that does not exist is -1 and sees nothing; a key that does not exist comes after all rows.
    """
    seen = keys <= rows
    for i in tl.static_range(INTERVALS):
        there = (keys <= last) & (i < depth)
        start = tl.load(hidden_start_ptr + i * slots + keys, mask=there, other=0)
        end = tl.load(hidden_end_ptr + i * slots + keys, mask=there, other=0)
        seen &= (rows < start) | (rows >= end)
    return seen


@jit
def _attend_runs(
    state,
    q,
    rows,
    k_base,
    v_base,
    stride_kn,
    stride_vn,
    offsets_ptr,
    start_ptr,
    end_ptr,
    branch_ptr,
    hidden_start_ptr,
    hidden_end_ptr,
    slots,
    depth,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Takes all key blocks of a query block's runs into its running maximum, sum and output."""
    top, total, acc = state
    for run in range(tl.load(offsets_ptr), tl.load(offsets_ptr + 1)):
        for block in range(tl.load(start_ptr + run), tl.load(end_ptr + run)):
            first = block * BLOCK_N
            # A score of NaN is masked like any other, but a value would be multiplied by 0 and stay NaN.
            k = load_rows(
                k_base, stride_kn, first, slots, branch_ptr, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, False, UPCAST
            )
            v = load_rows(
                v_base, stride_vn, first, slots, branch_ptr, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, PADDED, UPCAST
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            if MASKED:
                keys = (first + tl.arange(0, BLOCK_N))[None, :]
                seen = visible_entries(
                    rows[:, None], slots - 1, keys, hidden_start_ptr, hidden_end_ptr, slots, depth, INTERVALS
                )
                scores = tl.where(seen, scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen nothing yet has no maximum to subtract.
            shift = tl.where(new_top == -float("inf"), 0.0, new_top) if MASKED else new_top
            p = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(top - shift)
            total = total * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            top = new_top
    return top, total, acc


@jit(do_not_specialize=["queries", "slots", "depth"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    branch_ptr,
    hidden_start_ptr,
    hidden_end_ptr,
    full_offsets_ptr,
    full_start_ptr,
    full_end_ptr,
    partial_offsets_ptr,
    partial_start_ptr,
    partial_end_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    queries,
    slots,
    depth,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of a block of queries. Grid: (query blocks, HQ, B). Writes out [B, Q, HQ, D] and lse [B, HQ, Q]."""
    # The last blocks see most keys, so they start first.
    blocks = tl.num_programs(0)
    m_block = blocks - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)

    token = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < queries
    rows = tl.where(inside, token + slots - queries, -1)
    branch_ptr += batch * slots
    q = load_rows(
        q_ptr + batch * stride_qb + head * stride_qh,
        stride_qm,
        m_block * BLOCK_M,
        queries,
        branch_ptr + slots - queries,
        BLOCK_M,
        HEAD_DIM,
        BLOCK_D,
        True,
        PADDED,
        UPCAST,
    )
    k_base = k_ptr + batch * stride_kb + head // GROUP * stride_kh
    v_base = v_ptr + batch * stride_vb + head // GROUP * stride_vh
    hidden_start_ptr += batch * depth * slots
    hidden_end_ptr += batch * depth * slots
    outer = batch * (blocks + 1) + m_block

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top, total, acc = _attend_runs(
        (top, total, acc),
        q,
        rows,
        k_base,
        v_base,
        stride_kn,
        stride_vn,
        partial_offsets_ptr + outer,
        partial_start_ptr,
        partial_end_ptr,
        branch_ptr,
        hidden_start_ptr,
        hidden_end_ptr,
        slots,
        depth,
        scale_log2,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        INTERVALS,
        True,
        PADDED,
        UPCAST,
    )
    top, total, acc = _attend_runs(
        (top, total, acc),
        q,
        rows,
        k_base,
        v_base,
        stride_kn,
        stride_vn,
        full_offsets_ptr + outer,
        full_start_ptr,
        full_end_ptr,
        branch_ptr,
        hidden_start_ptr,
        hidden_end_ptr,
        slots,
        depth,
        scale_log2,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        INTERVALS,
        False,
        PADDED,
        UPCAST,
    )

    some = total > 0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(total)) * LN_2, -float("inf"))
    tl.store(lse_ptr + (batch * heads + head) * queries + token, lse, mask=inside)
    column = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + ((batch * queries + token)[:, None] * heads + head) * HEAD_DIM + column[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < HEAD_DIM)[None, :],
    )


def launch_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: PathMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the forward kernel.

    Args:
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`): with a contiguous last axis, as the others.
        key, value (`torch.Tensor` of shape `(B, HKV, S, D)`): of the same dtype.
        mask (`PathMask`): on the same device.
        scale (`float`): factor of the scores.

    Returns:
        Output of shape `(B, HQ, Q, D)`, stored token by token, and the natural logarithm of the sum of exponentials,
        float32 of shape `(B, HQ, Q)`; 0 and -inf for a query that sees nothing.
    """
    batch, heads, queries, dim = query.shape
    launch = training_launch("forward", dim, query.element_size())
    runs = mask.block_runs(launch.block_m, launch.block_n)
    out = torch.empty(batch, queries, heads, dim, dtype=stored_dtype(query), device=query.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    with on_device_of(query):
        forward_kernel[(-(-queries // launch.block_m), heads, batch)](
            query,
            key,
            value,
            out,
            lse,
            *mask_arguments(mask),
            *runs.full,
            *runs.partial,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            queries,
            mask.slots,
            mask.hidden_start.shape[1],
            scale * LOG2_E.value,
            **kernel_constants(query, key, mask),
            **launch.arguments,
        )
    return out.to(query.dtype).transpose(1, 2), lse


def stored_dtype(tensor: torch.Tensor) -> torch.dtype:
    """In what the kernels store results that are to have the dtype of `tensor`.

    The interpreter truncates where it stores bfloat16, so there the rounding is left to PyTorch.
    """
    return torch.float32 if INTERPRETED and tensor.dtype == torch.bfloat16 else tensor.dtype


def mask_arguments(mask: PathMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors of a mask in the order in which kernels take them."""
    return mask.branch_ids, mask.hidden_start, mask.hidden_end


def kernel_constants(query: torch.Tensor, key: torch.Tensor, mask: PathMask) -> dict[str, int | bool]:
    """The compile-time constants of the kernels, but for those of their launches.

    Args:
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`), key (`(B, HKV, S, D)`).
    """
    dim = query.shape[3]
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_DIM": dim,
        "BLOCK_D": padded_head_dim(dim),
        # A power of two that the intervals per key fit into, so that few variants of a kernel are compiled.
        "INTERVALS": 1 << (mask.hidden_start.shape[1] - 1).bit_length(),
        "PADDED": mask.real_slots() is not None,
        # The interpreter computes nonsense in bfloat16.
        "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
    }
