"""Attention of one step of the engine: the new tokens of every request over that request's own slots.

All linear layers of the model see one flat row of tokens; attention alone tells the requests apart, as a row of one
request has nothing to read in another's slots. The function is registered with transformers under `PATH_ATTENTION` and
gets its `StepPlan` as a keyword argument of the model's forward.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from multiverse.kernels.decode_plan import DecodePlan
from multiverse.kernels.dispatch import TRITON, run_path_attention
from multiverse.kernels.folded import folded_attention
from multiverse.kernels.path_decode import path_decode
from multiverse.kernels.path_mask import PathMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: Name of the attention function in `transformers.AttentionInterface`.
PATH_ATTENTION = "multiverse_paths"


@dataclass
class Segment:
    """The new tokens of one request in a step.

    Attributes:
        first, end (`int`): its columns of the flat row.
        start (`int`): first slot of the request's region.
        slots (`int`): slots in use, the new tokens' own included.
        causal (`bool`): whether the tokens are all there is and each sees those up to itself.
        mask (`torch.Tensor` or `PathMask`, *optional*): what the tokens see, in the form of the backend: the additive
            mask of `folded_attention`, a model's own, or a `PathMask` for a prompt under `"path_decode"`. `None` where
            each token sees every slot, or `causal` says it all.
    """

    first: int
    end: int
    start: int
    slots: int
    causal: bool
    mask: Any


@dataclass
class StepPlan:
    """What attention must know of a step.

    Attributes:
        segments (`list[Segment]`): one per request that runs.
        implementation (`str`): `"folded"`, `"path_decode"`, or the name of the model's own.
        decode (`DecodePlan`, *optional*): all segments at once, for the decode kernel.
    """

    segments: list[Segment]
    implementation: str
    decode: DecodePlan | None = None

    @property
    def tokens(self) -> int:
        """Columns of the flat row that hold tokens; a static shape may add others behind them."""
        return self.segments[-1].end


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
    """An attention function of transformers' interface.

    Args:
        query (`torch.Tensor` of shape `(1, heads, F, head dim)`): the flat row; columns behind the last segment's are
            filling.
        key, value (`torch.Tensor` of shape `(1, kv heads, slots, head dim)`): buffers of all requests.
        path_plan (`StepPlan`, *optional*): without one this is transformers' `sdpa`, for forward passes of the same
            model that another thread makes in the meantime.

    Returns:
        Output of shape `(1, F, heads, head dim)`, 0 for the filling, and no weights.
    """
    if path_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if path_plan.decode is not None:
        # One launch for all requests.
        tokens = query[0, :, : path_plan.tokens].transpose(0, 1)
        output, _ = path_decode(tokens, key[0], value[0], path_plan.decode, scaling)
        return _filled(output[None], query), None
    attend = _BACKENDS.get(path_plan.implementation) or _models_own(module, path_plan.implementation)
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
    return _filled(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), query), None


def _filled(output: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Zeros for the columns that a static shape adds behind the tokens."""
    missing = query.shape[2] - output.shape[1]
    return torch.nn.functional.pad(output, (0, 0, 0, 0, 0, missing)) if missing else output


def _folded(module, query, key, value, segment, scaling):
    return folded_attention(query, key, value, segment.mask, scaling, segment.causal)


def _prompt(module, query, key, value, segment, scaling):
    assert isinstance(segment.mask, PathMask)
    return run_path_attention(TRITON, query, key, value, segment.mask, scaling).transpose(1, 2)


#: Attention of one segment, returning shape `(1, tokens, heads, head dim)`.
_BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"folded": _folded, "path_decode": _prompt}


def _models_own(module: torch.nn.Module, implementation: str) -> Callable[..., torch.Tensor]:
    """The model's attention implementation, called for one segment at a time."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    function = AttentionInterface().get_interface(implementation, eager)

    def attend(module, query, key, value, segment, scaling):
        return function(module, query, key, value, segment.mask, scaling=scaling, is_causal=False)[0]

    return attend


AttentionInterface.register(PATH_ATTENTION, path_attention_forward)
AttentionMaskInterface.register(PATH_ATTENTION, sdpa_mask)
