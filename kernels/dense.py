"""Multiverse Attention with a dense mask: what every device and dtype can do, at a memory of Q * S per batch row.

Shapes: B batch rows, HQ query heads, HKV key-value heads, G = HQ // HKV, Q new (query) tokens, S slots (cached and new
tokens), D head dim.
"""

from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention

from .path_mask import PathMask

IMPLEMENTATIONS = ("sdpa", "eager")

#: Queries of one SDPA call on a CPU. Smaller blocks leave more out, larger ones run faster.
QUERY_BLOCK = 256


class DenseMask:
    """What every query sees, with what SDPA reads of it: worked out once, by the first layer that asks.

    A softmax over nothing is NaN, so a query that sees nothing gets to see all keys, and its output is replaced.

    Args:
        visible (`torch.BoolTensor` of shape `(B, Q, S)`): True where the query may attend to the slot.
    """

    def __init__(self, visible: torch.Tensor) -> None:
        self.visible = visible
        self._additive: dict[torch.dtype, torch.Tensor] = {}

    @cached_property
    def blind(self) -> torch.Tensor | None:
        """Bool of shape `(B, Q)`, True for queries that see nothing; `None` if there are none."""
        blind = ~self.visible.any(2)
        return blind if blind.any() else None

    @cached_property
    def open(self) -> torch.Tensor:
        """`visible`, with all keys for queries that see nothing."""
        return self.visible if self.blind is None else self.visible | self.blind[:, :, None]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """For every block of `QUERY_BLOCK` queries the slots `[start, end)` outside which none of them sees any."""
        spans = []
        for block in self.visible.split(QUERY_BLOCK, dim=1):
            seen = block.any(0).any(0).nonzero().flatten()
            spans.append((int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1))
        return spans

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the scores, shape `(B, 1, Q, S)`, made once per `dtype`: SDPA turns a bool mask into this
        anew in every layer, and autograd would keep each of them."""
        if dtype not in self._additive:
            seen, hidden = (
                torch.full((), value, dtype=dtype, device=self.visible.device) for value in (0, -torch.inf)
            )
            self._additive[dtype] = torch.where(self.open, seen, hidden)[:, None]
        return self._additive[dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that it keeps."""
        kept = {id(each): each for each in (self.visible, *vars(self).values(), *self._additive.values())}
        return sum(each.nbytes for each in kept.values() if isinstance(each, torch.Tensor))


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
    dense = mask.derived("dense", lambda: DenseMask(mask.visible()))
    query, key, value = mask.without_padding(query, key, value)
    if implementation == "sdpa":
        return dense_sdpa(query, key, value, dense, scale)
    return _without_blind(_eager(query, key, value, dense.open, scale), dense)


def dense_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: DenseMask, scale: float | None = None
) -> torch.Tensor:
    """PyTorch's fused attention under a dense mask. Shapes as in `dense_path_attention`.

    Told that a mask is causal, it never looks above the diagonal; given the mask as a tensor, it computes every score.
    A CPU starts a call at no cost to speak of, so there each block of queries gets a call of its own, over the slots
    that it sees any of: no more work than under the causal rule, and less where documents are packed.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.device.type != "cpu":
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=mask.open[:, None], scale=scale, enable_gqa=grouped
        )
        return _without_blind(output, mask)
    blocks = query.split(QUERY_BLOCK, dim=2), mask.additive(query.dtype).split(QUERY_BLOCK, dim=2), mask.spans
    outputs = [
        scaled_dot_product_attention(
            queries,
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=added[..., start:end],
            scale=scale,
            enable_gqa=grouped,
        )
        for queries, added, (start, end) in zip(*blocks, strict=True)
    ]
    # Heads beside each other, as the layer's last projection wants them and the calls leave them.
    output = (
        outputs[0] if len(outputs) == 1 else torch.cat([each.transpose(1, 2) for each in outputs], 1).transpose(1, 2)
    )
    return _without_blind(output, mask)


def _without_blind(output: torch.Tensor, mask: DenseMask) -> torch.Tensor:
    return output if mask.blind is None else output.masked_fill(mask.blind[:, None, :, None], 0)


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
