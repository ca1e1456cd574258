"""Multiverse Attention with a dense mask: what every device and dtype can do, at a memory of Q * S per batch row.

Shapes: B batch rows, HQ query heads, HKV key-value heads, G = HQ // HKV, Q new (query) tokens, S slots (cached and new
tokens), D head dim.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from .path_mask import PathMask

IMPLEMENTATIONS = ("sdpa", "eager")


def dense_path_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PathMask,
    scale: float | None = None,
    implementation: str = "sdpa",
) -> torch.Tensor:
    """Multiverse Attention over the dense form of `mask`, which is built once and kept with it.

    Args:
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`): new tokens.
        key, value (`torch.Tensor` of shape `(B, HKV, S, D)`): all tokens.
        mask (`PathMask`): of B rows, Q queries and S slots.
        scale (`float`, *optional*): factor of the scores, 1 / sqrt(D) by default.
        implementation (`str`): `"sdpa"` for PyTorch's fused attention, `"eager"` for plain matrix products with a
            softmax in at least float32.

    Returns:
        Shape `(B, HQ, Q, D)`. A row that sees nothing is exactly 0, and what stands at padding is not read.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or `implementation` is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` must be one of {IMPLEMENTATIONS}, got {implementation!r}.")
    mask.check(query, key, value)
    dense = mask.derived("dense", lambda: _DenseMask.of(mask))
    query, key, value = mask.without_padding(query, key, value)
    if implementation == "sdpa":
        grouped = query.shape[1] != key.shape[1]
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=dense.visible[:, None], scale=scale, enable_gqa=grouped
        )
    else:
        output = _eager(query, key, value, dense.visible, scale)
    return output if dense.blind is None else output.masked_fill(dense.blind[:, None, :, None], 0)


class _DenseMask(NamedTuple):
    """What each row sees. A softmax over nothing is NaN, so a row that sees nothing gets to see all keys here, and
    its output is replaced."""

    visible: torch.Tensor  # bool [B, Q, S]
    blind: torch.Tensor | None  # bool [B, Q]

    @classmethod
    def of(cls, mask: PathMask) -> "_DenseMask":
        visible = mask.visible()
        blind = ~visible.any(2)
        if not blind.any():
            return cls(visible, None)
        return cls(visible.logical_or_(blind[:, :, None]), blind)

    @property
    def nbytes(self) -> int:
        return self.visible.nbytes + (0 if self.blind is None else self.blind.nbytes)


def _eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Grouped heads are folded into the rows of a product, so keys and values are not repeated for them."""
    batch, heads, queries, dim = query.shape
    group = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], group * queries, dim)
    scores = (rows @ key.transpose(2, 3)) * (dim**-0.5 if scale is None else scale)
    # (B, HKV, G, Q, S), so that the mask is not repeated either
    scores = scores.unflatten(2, (group, queries)).masked_fill(~visible[:, None, None], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights.flatten(2, 3) @ value).view(batch, heads, queries, dim)
