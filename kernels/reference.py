"""Multiverse Attention by its definition, one query at a time: what every kernel is held to.

Shapes: B batch rows, HQ query heads, HKV key-value heads, Q new (query) tokens, S slots (cached and new tokens),
D head dim.
"""

import torch


def path_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys that each query sees. Keys that it does not see are not read at all.

    Query head h reads key-value head h // (HQ / HKV). Computed in the dtype of `query`, float64 included; autograd
    differentiates it.

    Args:
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`): new tokens.
        key, value (`torch.Tensor` of shape `(B, HKV, S, D)`): all tokens.
        visible (`torch.BoolTensor` of shape `(B, Q, S)`): which keys a query sees.
        scale (`float`, *optional*): factor of the scores, 1 / sqrt(D) by default.

    Returns:
        Output of shape `(B, HQ, Q, D)` and the logarithm of the sum of exponentials of the scores, `(B, HQ, Q)`. A
        query that sees nothing gets exactly 0 and -inf.

    Raises:
        ValueError: if the shapes do not fit.
    """
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    if visible.dtype != torch.bool or visible.shape != (batch, queries, key.shape[2]):
        raise ValueError(
            f"`visible` must be bool of shape {(batch, queries, key.shape[2])} to fit `query` and `key`, got "
            f"{visible.dtype} of shape {tuple(visible.shape)}."
        )
    if heads % kv_heads:
        raise ValueError(f"`query` has {heads} heads, `key` {kv_heads}: the first must be a multiple of the second.")
    scale = dim**-0.5 if scale is None else scale
    outputs, sums = [], []
    for row in range(batch):
        for token in range(queries):
            seen = visible[row, token].nonzero().flatten()
            keys, values = (
                each[row].index_select(1, seen).repeat_interleave(heads // kv_heads, dim=0) for each in (key, value)
            )
            scores = torch.einsum("hd,hnd->hn", query[row, :, token], keys) * scale
            outputs.append(torch.einsum("hn,hnd->hd", scores.softmax(dim=1), values))
            sums.append(scores.logsumexp(dim=1))
    output = torch.stack(outputs).view(batch, queries, heads, dim).transpose(1, 2)
    return output, torch.stack(sums).view(batch, queries, heads).transpose(1, 2)
