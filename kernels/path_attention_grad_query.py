"""Backward pass of path attention, first half: the gradient of queries, one program per block of them.

The probabilities are worked out again from the logarithm of the sum of exponentials that the forward pass kept.

Letters: B batch rows, HQ query heads, HKV key-value heads, Q new (query) tokens, S slots (cached and new tokens),
D head dim.
"""

import torch

from .launch_table import training_launch
from .path_attention_forward import (
    LOG2_E,
    kernel_constants,
    load_rows,
    mask_arguments,
    stored_dtype,
    visible_entries,
)
from .path_mask import PathMask
from .triton_support import jit, on_device_of, tl


@jit
def _query_runs(
    acc,
    q,
    grad,
    lse_log2,
    delta,
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
    """Adds what the key blocks of a query block's runs give to the gradient of the queries, but for the scale."""
    for run in range(tl.load(offsets_ptr), tl.load(offsets_ptr + 1)):
        for block in range(tl.load(start_ptr + run), tl.load(end_ptr + run)):
            first = block * BLOCK_N
            k = load_rows(
                k_base, stride_kn, first, slots, branch_ptr, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, PADDED, UPCAST
            )
            v = load_rows(
                v_base, stride_vn, first, slots, branch_ptr, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED, PADDED, UPCAST
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            p = tl.exp2(scores - lse_log2[:, None])
            if MASKED:
                keys = (first + tl.arange(0, BLOCK_N))[None, :]
                seen = visible_entries(
                    rows[:, None], slots - 1, keys, hidden_start_ptr, hidden_end_ptr, slots, depth, INTERVALS
                )
                p = tl.where(seen, p, 0.0)
            grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
            grad_scores = p * (grad_p - delta[:, None])
            acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@jit(do_not_specialize=["queries", "slots", "depth"])
def grad_query_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
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
    stride_gb,
    stride_gh,
    stride_gm,
    queries,
    slots,
    depth,
    scale_log2,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr,
    PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gradient of a block of queries. Grid: (query blocks, HQ, B).

    Reads out [B, Q, HQ, D], writes grad_q [B, Q, HQ, D] and delta [B, HQ, Q], the sum over D of out * grad_out.
    """
    blocks = tl.num_programs(0)
    m_block = blocks - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)

    first = m_block * BLOCK_M
    token = first + tl.arange(0, BLOCK_M)
    inside = token < queries
    rows = tl.where(inside, token + slots - queries, -1)
    branch_ptr += batch * slots
    new_branch_ptr = branch_ptr + slots - queries
    q_base = q_ptr + batch * stride_qb + head * stride_qh
    q = load_rows(q_base, stride_qm, first, queries, new_branch_ptr, BLOCK_M, HEAD_DIM, BLOCK_D, True, PADDED, UPCAST)
    grad_base = grad_out_ptr + batch * stride_gb + head * stride_gh
    grad = load_rows(
        grad_base, stride_gm, first, queries, new_branch_ptr, BLOCK_M, HEAD_DIM, BLOCK_D, True, PADDED, UPCAST
    )
    own = (batch * queries * heads + head) * HEAD_DIM
    stride_own = heads * HEAD_DIM
    out = load_rows(
        out_ptr + own, stride_own, first, queries, new_branch_ptr, BLOCK_M, HEAD_DIM, BLOCK_D, True, False, UPCAST
    )
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    per_row = (batch * heads + head) * queries + token
    tl.store(delta_ptr + per_row, delta, mask=inside)
    # A row that sees nothing has -inf. Its probabilities are masked, whatever they come to.
    lse_log2 = tl.load(lse_ptr + per_row, mask=inside, other=0.0) * LOG2_E

    k_base = k_ptr + batch * stride_kb + head // GROUP * stride_kh
    v_base = v_ptr + batch * stride_vb + head // GROUP * stride_vh
    hidden_start_ptr += batch * depth * slots
    hidden_end_ptr += batch * depth * slots
    outer = batch * (blocks + 1) + m_block
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _query_runs(
        acc,
        q,
        grad,
        lse_log2,
        delta,
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
    acc = _query_runs(
        acc,
        q,
        grad,
        lse_log2,
        delta,
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
    column = tl.arange(0, BLOCK_D)
    tl.store(
        grad_q_ptr + own + token.to(tl.int64)[:, None] * stride_own + column[None, :],
        (acc * scale).to(grad_q_ptr.dtype.element_ty),
        mask=inside[:, None] & (column < HEAD_DIM)[None, :],
    )


def launch_grad_query(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    mask: PathMask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel for queries, which comes before the one for keys and values.

    Args:
        query, key, value, mask, scale: as for the forward kernel.
        out (`torch.Tensor` of shape `(B, HQ, Q, D)`), lse (`(B, HQ, Q)`, float32): what that returned.
        grad_out (`torch.Tensor` of shape `(B, HQ, Q, D)`): with a contiguous last axis. Not read at padding.

    Returns:
        Gradient of query, in its shape, stored token by token and 0 at padding; and for every query the sum over D of
        output times its gradient, float32 of shape `(B, HQ, Q)`.
    """
    batch, heads, queries, dim = query.shape
    launch = training_launch("grad_query", dim, query.element_size())
    runs = mask.block_runs(launch.block_m, launch.block_n)
    delta = torch.empty_like(lse)
    grad_query = torch.empty(batch, queries, heads, dim, dtype=stored_dtype(query), device=query.device)
    with on_device_of(query):
        grad_query_kernel[(-(-queries // launch.block_m), heads, batch)](
            query,
            key,
            value,
            out,
            grad_out,
            lse,
            delta,
            grad_query,
            *mask_arguments(mask),
            *runs.full,
            *runs.partial,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_out.stride()[:3],
            queries,
            mask.slots,
            mask.hidden_start.shape[1],
            scale * LOG2_E.value,
            scale,
            **kernel_constants(query, key, mask),
            **launch.arguments,
        )
    return grad_query.to(query.dtype).transpose(1, 2), delta
