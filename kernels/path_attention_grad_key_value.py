"""Backward pass of path attention, second half: the gradients of keys and values, one program per block of them.

A program goes through all query heads that read its key-value head, so nothing is added up across programs and the
result is the same every time.

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
def _key_value_runs(
    grad_k,
    grad_v,
    k,
    v,
    keys,
    q_base,
    grad_base,
    lse_ptr,
    delta_ptr,
    stride_qm,
    stride_gm,
    offsets_ptr,
    start_ptr,
    end_ptr,
    new_branch_ptr,
    hidden_start_ptr,
    hidden_end_ptr,
    queries,
    slots,
    depth,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INTERVALS: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds what the query blocks of a key block's runs give to the gradients of keys and values."""
    for run in range(tl.load(offsets_ptr), tl.load(offsets_ptr + 1)):
        for block in range(tl.load(start_ptr + run), tl.load(end_ptr + run)):
            first = block * BLOCK_M
            q = load_rows(
                q_base, stride_qm, first, queries, new_branch_ptr, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED, PADDED, UPCAST
            )
            grad = load_rows(
                grad_base,
                stride_gm,
                first,
                queries,
                new_branch_ptr,
                BLOCK_M,
                HEAD_DIM,
                BLOCK_D,
                MASKED,
                PADDED,
                UPCAST,
            )
            token = first + tl.arange(0, BLOCK_M)
            if MASKED:
                inside = token < queries
                lse = tl.load(lse_ptr + token, mask=inside, other=0.0)
                delta = tl.load(delta_ptr + token, mask=inside, other=0.0)
            else:
                lse = tl.load(lse_ptr + token)
                delta = tl.load(delta_ptr + token)
            # Keys are rows here: both results of the block are then products with a plain second factor.
            scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
            p = tl.exp2(scores - (lse * LOG2_E)[None, :])
            if MASKED:
                rows = tl.where(inside, token + slots - queries, -1)[None, :]
                last = tl.minimum(first + BLOCK_M, queries) + slots - queries - 1
                seen = visible_entries(
                    rows, last, keys[:, None], hidden_start_ptr, hidden_end_ptr, slots, depth, INTERVALS
                )
                p = tl.where(seen, p, 0.0)
            grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision="ieee")
            grad_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
            grad_scores = p * (grad_p - delta[None, :])
            grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision="ieee")
    return grad_k, grad_v


@jit(do_not_specialize=["queries", "slots", "depth"])
def grad_key_value_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
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
    """Gradients of a block of keys and values, over all query heads that read them. Grid: (key blocks, HKV, B).

    Writes grad_k and grad_v [B, S, HKV, D].
    """
    n_block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)

    first = n_block * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    branch_ptr += batch * slots
    k_base = k_ptr + batch * stride_kb + kv_head * stride_kh
    k = load_rows(k_base, stride_kn, first, slots, branch_ptr, BLOCK_N, HEAD_DIM, BLOCK_D, True, PADDED, UPCAST)
    v_base = v_ptr + batch * stride_vb + kv_head * stride_vh
    v = load_rows(v_base, stride_vn, first, slots, branch_ptr, BLOCK_N, HEAD_DIM, BLOCK_D, True, PADDED, UPCAST)
    hidden_start_ptr += batch * depth * slots
    hidden_end_ptr += batch * depth * slots
    outer = batch * (tl.num_programs(0) + 1) + n_block

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = q_ptr + batch * stride_qb + head * stride_qh
        grad_base = grad_out_ptr + batch * stride_gb + head * stride_gh
        per_row = (batch * kv_heads * GROUP + head) * queries
        grad_k, grad_v = _key_value_runs(
            grad_k,
            grad_v,
            k,
            v,
            keys,
            q_base,
            grad_base,
            lse_ptr + per_row,
            delta_ptr + per_row,
            stride_qm,
            stride_gm,
            partial_offsets_ptr + outer,
            partial_start_ptr,
            partial_end_ptr,
            branch_ptr + slots - queries,
            hidden_start_ptr,
            hidden_end_ptr,
            queries,
            slots,
            depth,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            INTERVALS,
            True,
            PADDED,
            UPCAST,
        )
        grad_k, grad_v = _key_value_runs(
            grad_k,
            grad_v,
            k,
            v,
            keys,
            q_base,
            grad_base,
            lse_ptr + per_row,
            delta_ptr + per_row,
            stride_qm,
            stride_gm,
            full_offsets_ptr + outer,
            full_start_ptr,
            full_end_ptr,
            branch_ptr + slots - queries,
            hidden_start_ptr,
            hidden_end_ptr,
            queries,
            slots,
            depth,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            INTERVALS,
            False,
            PADDED,
            UPCAST,
        )
    column = tl.arange(0, BLOCK_D)
    target = ((batch * slots + keys)[:, None] * kv_heads + kv_head) * HEAD_DIM + column[None, :]
    stored = (keys < slots)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(grad_k_ptr + target, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=stored)
    tl.store(grad_v_ptr + target, grad_v.to(grad_v_ptr.dtype.element_ty), mask=stored)


def launch_grad_key_value(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_out: torch.Tensor,
    mask: PathMask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel for keys and values.

    Args:
        query, key, value, lse, grad_out, mask, scale: as for the kernel for queries.
        delta (`torch.Tensor` of shape `(B, HQ, Q)`): what that returned.

    Returns:
        Gradients of key and value, in their shapes and stored token by token; 0 at padding.
    """
    batch, kv_heads, slots, dim = key.shape
    launch = training_launch("grad_key_value", dim, query.element_size())
    runs = mask.block_runs_transposed(launch.block_m, launch.block_n)
    grad_key = torch.empty(batch, slots, kv_heads, dim, dtype=stored_dtype(key), device=key.device)
    grad_value = torch.empty_like(grad_key)
    with on_device_of(query):
        grad_key_value_kernel[(-(-slots // launch.block_n), kv_heads, batch)](
            query,
            key,
            value,
            grad_out,
            lse,
            delta,
            grad_key,
            grad_value,
            *mask_arguments(mask),
            *runs.full,
            *runs.partial,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *grad_out.stride()[:3],
            query.shape[2],
            slots,
            mask.hidden_start.shape[1],
            scale * LOG2_E.value,
            scale,
            **kernel_constants(query, key, mask),
            **launch.arguments,
        )
    grad_key, grad_value = grad_key.to(key.dtype), grad_value.to(key.dtype)
    return grad_key.transpose(1, 2), grad_value.transpose(1, 2)
