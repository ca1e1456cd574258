"""Decode attention over one shared cache: every key and value is read once for all branches of a request.

The queries of a request and the heads of a group are the rows of one `tl.dot`, so that a block of keys serves all of
them. The slots that some query may see are gathered through a compact list and split over programs; each writes its
share of the output with the logarithm of its sum of exponentials, and a second kernel merges the shares.

Letters: T query tokens, HQ query heads, HKV key-value heads, D head dim, B requests. What reads how much is worked out
in `bytes_model.py`.
"""

import math

import torch

from .decode_plan import DecodePlan
from .launch_table import MAX_HEAD_DIM, decode_grid, padded_head_dim
from .triton_support import INTERPRETED, check_device, jit, on_device_of, tl

LN_2 = tl.constexpr(0.6931471805599453)

#: Splits that the merge takes at a time.
_MERGE_BLOCK = 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@jit(do_not_specialize=["tokens", "words", "m_blocks", "split_length"])
def _split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    q_row_ptr,
    q_limit_ptr,
    slot_index_ptr,
    idx_start_ptr,
    idx_len_ptr,
    slot_bits_ptr,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_bw,
    tokens,
    heads,
    words,
    m_blocks,
    split_length,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of one block of rows of one request over one split of its slots.

    Grid: (HKV * m_blocks, splits, B). Writes out [splits, T, HQ, D] and lse [splits, T, HQ].
    """
    kv_head = tl.program_id(0) // m_blocks
    m_block = tl.program_id(0) % m_blocks
    split = tl.program_id(1)
    request = tl.program_id(2)
    first = tl.load(cu_q_ptr + request)
    rows = (tl.load(cu_q_ptr + request + 1) - first) * GROUP
    if m_block * BLOCK_M >= rows:
        return
    slots = tl.load(idx_len_ptr + request)
    start = split * split_length
    # The first split writes also where there is nothing to read.
    if (split > 0) & (start >= slots):
        return
    end = tl.minimum(start + split_length, slots)

    # The heads of a group stand next to each other in memory, so they change fastest.
    row = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    query = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    table_row = tl.load(q_row_ptr + query, mask=live, other=0)
    limit = tl.load(q_limit_ptr + query, mask=live, other=0)
    word = table_row >> 5
    bit = tl.where(live, 1 << (table_row & 31), 0)

    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    query = query.to(tl.int64)
    q = tl.load(
        q_ptr + query[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :] * stride_qd,
        mask=live[:, None] & in_head[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + kv_head.to(tl.int64) * stride_kh
    v_base = v_ptr + kv_head.to(tl.int64) * stride_vh
    index_base = slot_index_ptr + tl.load(idx_start_ptr + request)

    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Slots are loaded one turn ahead. Loaded in their own turn, they would stand between the pipeline and the keys:
    # it would then hold a single block of keys and values and wait for each.
    place = start + tl.arange(0, BLOCK_N)
    slot = tl.load(index_base + place, mask=place < end, other=0)
    for n in range(start, end, BLOCK_N):
        inside = n + tl.arange(0, BLOCK_N) < end
        far = slot.to(tl.int64)
        k = tl.load(
            k_base + far[None, :] * stride_ks + d[:, None] * stride_kd,
            mask=inside[None, :] & in_head[:, None],
            other=0.0,
        )
        v = tl.load(
            v_base + far[:, None] * stride_vs + d[None, :] * stride_vd,
            mask=inside[:, None] & in_head[None, :],
            other=0.0,
        )
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        seen = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for w in tl.static_range(WORDS):
            bits = tl.load(slot_bits_ptr + w * stride_bw + far, mask=inside & (w < words), other=0)
            seen |= bits[None, :] & tl.where(word == w, bit, 0)[:, None]
        visible = (seen != 0) & (slot[None, :] < limit[:, None])
        # No branch on whether anything is visible: it would end the pipeline.
        scores = tl.where(visible, tl.dot(q, k, input_precision="ieee") * scale_log2, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to subtract.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
        # Worked out from n: carried from turn to turn, places would take registers in every layout that needs them.
        place = n + BLOCK_N + tl.arange(0, BLOCK_N)
        slot = tl.load(index_base + place, mask=place < end, other=0)

    some = total > 0
    total = tl.where(some, total, 1.0)
    acc = acc / total[:, None]
    lse = tl.where(some, (top + tl.log2(total)) * LN_2, -float("inf"))
    target = (split.to(tl.int64) * tokens + query) * heads + head
    tl.store(lse_ptr + target, lse, mask=live)
    tl.store(
        out_ptr + target[:, None] * HEAD_DIM + d[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & in_head[None, :],
    )


@jit(do_not_specialize=["tokens", "split_length"])
def _merge_kernel(
    share_ptr,
    share_lse_ptr,
    out_ptr,
    lse_ptr,
    q_request_ptr,
    idx_len_ptr,
    tokens,
    heads,
    split_length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merges the shares of one head of one query: sum of exp(lse_s - lse) * share_s. Grid: (T * HQ,)."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.load(idx_len_ptr + tl.load(q_request_ptr + row // heads))
    used = tl.maximum((slots + split_length - 1) // split_length, 1)
    stride = tokens.to(tl.int64) * heads
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM

    top = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for s in range(0, used, BLOCK_S):
        split = s + tl.arange(0, BLOCK_S)
        there = split < used
        source = split.to(tl.int64) * stride + row
        lse = tl.load(share_lse_ptr + source, mask=there, other=-float("inf"))
        share = tl.load(
            share_ptr + source[:, None] * HEAD_DIM + d[None, :],
            mask=there[:, None] & in_head[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp(lse - shift)
        fade = tl.exp(top - shift)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(weight[:, None] * share, 0)
        top = new_top

    some = total > 0
    total = tl.where(some, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + d, (acc / total).to(out_ptr.dtype.element_ty), mask=in_head)
    tl.store(lse_ptr + row, tl.where(some, top + tl.log(total), -float("inf")))


def path_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: DecodePlan,
    scale: float | None = None,
    split_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the new tokens of several requests over the slots that each of them sees.

    Nothing waits for the device. There is no sliding window: a caller whose model has one must refuse it.

    Args:
        q (`torch.Tensor` of shape `(T, HQ, D)`): float16, bfloat16 or float32; any strides. Head h reads key-value
            head h // (HQ / HKV).
        k, v (`torch.Tensor` of shape `(HKV, slots, D)`): the cache of all requests, new tokens included; any strides,
            so a cache of shape `(slots, HKV, D)` is passed transposed.
        plan (`DecodePlan`): what every query sees, on the same device.
        scale (`float`, *optional*): factor of the scores, 1 / sqrt(D) by default.
        split_length (`int`, *optional*): slots that one program reads; by default chosen by `decode_split_length`.

    Returns:
        Output of shape `(T, HQ, D)` in the dtype of `q`, and the logarithm of the sum of exponentials of the scaled
        scores, `(T, HQ)` in float32. A query that sees nothing gets exactly 0 and -inf.

    Raises:
        ImportError: if Triton is not installed.
        ValueError: if shapes, dtypes or devices do not fit, or the tensors are where no kernel can run.
    """
    _check(q, k, v, plan, split_length)
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[0]
    # The interpreter truncates where it stores bfloat16, so there the rounding is left to PyTorch.
    upcast = INTERPRETED and q.dtype == torch.bfloat16
    out = torch.empty(q.shape, dtype=torch.float32 if upcast else q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out.to(q.dtype), lse
    launch, m_blocks, split_length, splits = decode_grid(
        plan.requests,
        tokens,
        plan.max_q,
        plan.max_kv,
        (heads, kv_heads),
        head_dim,
        q.element_size(),
        _processors(q.device),
        split_length,
    )
    shares, share_lse = out, lse
    if splits > 1:
        shares = torch.empty(splits, tokens, heads, head_dim, dtype=torch.float32, device=q.device)
        share_lse = torch.empty(splits, tokens, heads, dtype=torch.float32, device=q.device)
    scale = head_dim**-0.5 if scale is None else scale
    block_d = padded_head_dim(head_dim)
    with on_device_of(q):
        _split_kernel[(kv_heads * m_blocks, splits, plan.requests)](
            q,
            k,
            v,
            shares,
            share_lse,
            plan.cu_q,
            plan.q_row,
            plan.q_limit,
            plan.slot_index,
            plan.idx_start,
            plan.idx_len,
            plan.slot_bits,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            plan.slot_bits.stride(0),
            tokens,
            heads,
            plan.words,
            m_blocks,
            split_length,
            scale / math.log(2),
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            # A power of two, so that a new word is rarely a new kernel.
            WORDS=1 << (plan.words - 1).bit_length(),
            UPCAST=upcast,
            **launch.arguments,
        )
        if splits > 1:
            _merge_kernel[(tokens * heads,)](
                shares,
                share_lse,
                out,
                lse,
                plan.q_request,
                plan.idx_len,
                tokens,
                heads,
                split_length,
                HEAD_DIM=head_dim,
                BLOCK_D=block_d,
                BLOCK_S=_MERGE_BLOCK,
                num_warps=4,
            )
    return out.to(q.dtype), lse


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter stands in for a single one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: DecodePlan, split_length: int | None) -> None:
    """Raises what `path_decode` says it raises."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            "`q` must have shape (T, HQ, D), `k` and `v` both (HKV, slots, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; transpose a cache of shape (slots, HKV, D)."
        )
    if k.shape[0] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[0]:
        raise ValueError(
            f"`q` has {q.shape[1]} heads and `k` {k.shape[0]}: the first must be a multiple of the other."
        )
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(f"The head dim of `q` must be 1 to {MAX_HEAD_DIM}, got {q.shape[2]}; use another backend.")
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"`q`, `k` and `v` must share one of the dtypes float16, bfloat16 and float32, got {q.dtype}, {k.dtype} "
            f"and {v.dtype}; cast them."
        )
    if not q.device == k.device == v.device == plan.slot_bits.device == plan.q_row.device:
        raise ValueError(
            f"`q`, `k`, `v` and `plan` must be on one device, got {q.device}, {k.device}, {v.device} and "
            f"{plan.q_row.device} with bits on {plan.slot_bits.device}; move them."
        )
    if plan.tokens != q.shape[0]:
        raise ValueError(f"`plan` is for {plan.tokens} tokens and `q` has {q.shape[0]}; build a plan for every step.")
    if plan.slot_end > k.shape[1]:
        raise ValueError(
            f"`plan` lists slot {plan.slot_end - 1} and `k` has {k.shape[1]} slots; store the new tokens' keys and "
            "values before attention."
        )
    if split_length is not None and split_length < 1:
        raise ValueError(f"`split_length` must be at least 1, got {split_length}; leave it out for the default.")
    check_device(q, "q")
