"""Attention of one step: the new tokens of every request over that request's own slots.

All linear layers of the model see one flat row of tokens; attention alone runs request by request, as a row of one
request has nothing to read in another's slots. The function is registered with transformers under
`PATH_ATTENTION` and gets its `StepPlan` as a keyword argument of the model's forward.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Name of the attention function in `transformers.AttentionInterface`.
PATH_ATTENTION = "multiverse_paths"

#: Values of `generation_config.decode_attention`.
DECODE_ATTENTION = ("auto", "folded", "model")


@dataclass
class Segment:
    """The new tokens of one request in a step.

    Attributes:
        first, end (`int`): its columns of the flat row.
        start (`int`): first slot of the request's region.
        slots (`int`): slots in use, the new tokens' own included.
        causal (`bool`): whether the tokens are all there is and each sees those up to itself.
        mask (`torch.Tensor`, *optional*): what the tokens see, in the form of the backend: folded rows
            `(group * tokens, slots)` of an additive mask, or a model's own. `None` where each token sees every slot,
            or `causal` says it all.
    """

    first: int
    end: int
    start: int
    slots: int
    causal: bool
    mask: Any


@dataclass
class StepPlan:
    """What attention must know of a step: its segments, and the implementation that runs them."""

    segments: list[Segment]
    implementation: str


def additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where `visible`, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def path_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    path_plan: StepPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface.

    Args:
        query (`torch.Tensor` of shape `(1, heads, tokens, head dim)`): the flat row.
        key, value (`torch.Tensor` of shape `(1, kv heads, slots, head dim)`): buffers of all requests.
        path_plan (`StepPlan`, *optional*): without one this is transformers' `sdpa`, for forward passes of the same
            model that another thread makes in the meantime.

    Returns:
        Output of shape `(1, tokens, heads, head dim)`, and no weights.
    """
    if path_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    attend = folded_attention if path_plan.implementation == "folded" else _models_own(module, path_plan)
    outputs = []
    for segment in path_plan.segments:
        end = segment.start + segment.slots
        outputs.append(
            attend(
                module,
                query[:, :, segment.first : segment.end],
                key[:, :, segment.start : end],
                value[:, :, segment.start : end],
                segment,
                scaling,
            )
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def folded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    scaling: float | None,
) -> torch.Tensor:
    """Folds the query heads of a group and all tokens into the rows of one attention call per key-value head.

    A key is then read once for all branches, and never repeated for the heads that share it.

    Returns:
        Shape `(1, tokens, heads, head dim)`.
    """
    heads, tokens, dim = query.shape[1:]
    kv_heads = key.shape[1]
    if segment.causal:
        output = scaled_dot_product_attention(
            query, key, value, is_causal=tokens > 1, scale=scaling, enable_gqa=heads != kv_heads
        )
        return output.transpose(1, 2)
    rows = query.reshape(1, kv_heads, heads // kv_heads * tokens, dim)
    output = scaled_dot_product_attention(rows, key, value, attn_mask=segment.mask, scale=scaling)
    return output.view(1, heads, tokens, dim).transpose(1, 2)


def fold_mask(visible: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask of `folded_attention` for what tokens see, `(tokens, slots)`: rows repeat per head."""
    return additive_mask(visible, dtype).repeat(group, 1)[None, None]


def _models_own(module: torch.nn.Module, plan: StepPlan) -> Callable[..., torch.Tensor]:
    """The model's attention implementation, called for one segment at a time."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    function = AttentionInterface().get_interface(plan.implementation, eager)

    def attend(module, query, key, value, segment, scaling):
        return function(module, query, key, value, segment.mask, scaling=scaling, is_causal=False)[0]

    return attend


AttentionInterface.register(PATH_ATTENTION, path_attention_forward)
AttentionMaskInterface.register(PATH_ATTENTION, sdpa_mask)
