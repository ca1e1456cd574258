"""Decode attention for CPUs: the branches of a request and the heads of a group as rows of one attention call.

A key is then read once for all of them, and never repeated for the heads that share it.

Shapes: HQ query heads, HKV key-value heads, G = HQ // HKV, n new tokens of one request, S slots, D head dim.
"""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

#: Rows times slots from which on it pays to hand every thread the same share of them.
_WORTH_SHARING = 6_144


def folded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of the new tokens of one request over its slots.

    Args:
        query (`torch.Tensor` of shape `(1, HQ, n, D)`): new tokens.
        key, value (`torch.Tensor` of shape `(1, HKV, S, D)`): the request's slots.
        mask (`torch.Tensor`, *optional*): additive, as `fold_mask` makes it; `None` where every token sees every slot,
            or `causal` says it all.
        scale (`float`, *optional*): factor of the scores, 1 / sqrt(D) by default.
        causal (`bool`): whether the new tokens are all there is (n = S), each seeing those up to itself.

    Returns:
        Shape `(1, n, HQ, D)`.
    """
    heads, tokens, dim = query.shape[1:]
    kv_heads = key.shape[1]
    if causal:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=tokens > 1, scale=scale, enable_gqa=heads != kv_heads
        )
        return output.transpose(1, 2)
    rows = heads // kv_heads * tokens
    shares = _shares(kv_heads, rows, key.shape[2])
    output = scaled_dot_product_attention(
        query.reshape(kv_heads, shares, rows // shares, dim),
        key.transpose(0, 1).expand(-1, shares, -1, -1),
        value.transpose(0, 1).expand(-1, shares, -1, -1),
        attn_mask=None if mask is None else mask.view(1, shares, rows // shares, -1),
        scale=scale,
    )
    return output.view(1, heads, tokens, dim).transpose(1, 2)


def _shares(kv_heads: int, rows: int, slots: int) -> int:
    """Shares of the rows that leave no thread idle: torch gives each thread whole heads."""
    if rows * slots < _WORTH_SHARING:
        return 1
    shares = math.lcm(kv_heads, torch.get_num_threads()) // kv_heads
    return shares if rows % shares == 0 else 1


def fold_mask(visible: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask of `folded_attention`, `(1, 1, G * n, S)`: rows repeat per head.

    Args:
        visible (`torch.BoolTensor` of shape `(n, S)`): what every new token sees.
        group (`int`): G.
        dtype (`torch.dtype`): of the queries.
    """
    additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return additive.repeat(group, 1)[None, None]
