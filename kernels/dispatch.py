"""Which attention runs where: the backends of Multiverse Attention, their names, and what each needs.

`attn_implementation` names the backend of a model's forward passes (training, prefill), and
`generation_config.decode_attention` that of decode steps. The automatic choices go by the device; a backend that is
asked for by name runs or raises.

Attention is registered with transformers' `AttentionInterface`. The branch structure comes as the keyword argument
`path_mask`, or as `dense_mask` for `sdpa` on a CPU, both built by the backbone of a Multiverse model. Where neither is
given, the names that transformers knows run what transformers runs.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask, sdpa_mask

from .dense import DenseMask, dense_path_attention, dense_sdpa
from .flash_varlen import flash_varlen_attention
from .path_attention import path_attention
from .path_mask import PathMask
from .triton_support import runs_triton

#: By device: Triton where it compiles, else a dense mask.
AUTOMATIC = "multiverse"
#: The Triton kernels, or an error.
TRITON = "multiverse_triton"
FLASH = "flash_attention_2"

#: Attention implementations that take a `PathMask`, and no mask tensor.
PATH_MASK_ATTENTION = (AUTOMATIC, TRITON, FLASH)
#: Attention implementations that Multiverse models run under.
SUPPORTED_ATTENTION = ("eager", "sdpa", "flex_attention", *PATH_MASK_ATTENTION)

#: Values of `generation_config.decode_attention`.
DECODE_ATTENTION = ("auto", "folded", "path_decode", "model")


def unsupported_attention_message(implementation: str | None) -> str:
    """Says which attention implementations can express Multiverse Attention."""
    return (
        f"`attn_implementation` is {implementation!r}, which cannot express branch visibility. Use one of "
        f"{SUPPORTED_ATTENTION}, for example `model.set_attn_implementation('sdpa')`."
    )


def takes_dense_mask(implementation: str | None, mask: Any) -> bool:
    """Whether attention is given the bool `mask` of shape `(B, 1, Q, S)` as a `DenseMask` too."""
    return implementation == "sdpa" and mask.device.type == "cpu" and mask.shape[2] > 1


def automatic_backend(device: torch.device) -> str:
    """`"triton"` or `"dense"`: what `attn_implementation="multiverse"` runs on `device`."""
    return "triton" if runs_triton(device) and device.type != "cpu" else "dense"


def resolve_decode_attention(decode_attention: str, own: str | None, device: torch.device) -> str:
    """The backend of decode steps: `"folded"`, `"path_decode"`, or the name of a model's own implementation.

    Args:
        decode_attention (`str`): one of `DECODE_ATTENTION`. Automatic: under `eager` and `flex_attention` the model's
            own; else `path_decode` where Triton compiles, or under an implementation that only runs there; `folded`
            everywhere else.
        own (`str`, *optional*): the model's attention implementation.
        device (`torch.device`): where the model is.

    Raises:
        ValueError: if the model's implementation cannot express branches.
    """
    if own is None or own not in SUPPORTED_ATTENTION:
        raise ValueError(unsupported_attention_message(own))
    if decode_attention in ("folded", "path_decode"):
        return decode_attention
    if own in (TRITON, FLASH):
        return "path_decode"
    if own == AUTOMATIC or (decode_attention == "auto" and own == "sdpa"):
        return "path_decode" if automatic_backend(device) == "triton" else "folded"
    return own


def run_path_attention(
    implementation: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    path_mask: PathMask,
    scaling: float | None = None,
) -> torch.Tensor:
    """Multiverse Attention by the backend of an attention implementation that takes a `PathMask`.

    Args:
        implementation (`str`): one of `PATH_MASK_ATTENTION`.
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`), key, value (`(B, HKV, S, D)`): as in `path_attention`.

    Returns:
        Shape `(B, HQ, Q, D)`.
    """
    if implementation == FLASH:
        return flash_varlen_attention(query, key, value, path_mask, scaling)
    if implementation == TRITON or automatic_backend(query.device) == "triton":
        return path_attention(query, key, value, path_mask, scaling)
    return dense_path_attention(query, key, value, path_mask, scaling)


def _forward(implementation: str) -> Any:
    """The function that transformers' attention layers call."""

    def attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        path_mask: PathMask | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if path_mask is None:
            if implementation == FLASH:
                # Another model of the same process.
                return flash_attention_forward(
                    module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
                )
            raise ValueError(
                f"`attn_implementation` {implementation!r} serves Multiverse models only, whose backbone builds the "
                "`path_mask` that it needs. Choose another one for this model, for example 'sdpa'."
            )
        if dropout and module.training:
            raise ValueError(
                f"`config.attention_dropout` is {dropout}, which {implementation!r} does not have. Set it to 0, or "
                "use `attn_implementation='sdpa'`."
            )
        query, key, value = _of_one_dtype(query, key, value)
        return run_path_attention(implementation, query, key, value, path_mask, scaling).transpose(1, 2), None

    return attention_forward


def _sdpa_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    dense_mask: DenseMask | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` as transformers has it, and in blocks of queries where `dense_mask` says the same as `attention_mask`."""
    # The fused kernel of a CPU has no dropout; compiled code would be made anew for every mask.
    if dense_mask is None or dropout or torch.compiler.is_compiling():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    query, key, value = _of_one_dtype(query, key, value)
    return dense_sdpa(query, key, value, dense_mask, scaling).transpose(1, 2), None


def _of_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values under autocast: rotary embeddings are worked out in float32, so the first two come
    wider than the last."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(device)) for each in tensors)


AttentionInterface.register("sdpa", _sdpa_forward)
for _name in PATH_MASK_ATTENTION:
    AttentionInterface.register(_name, _forward(_name))
    # Without an entry of their own transformers would hand them no mask at all, where something bypasses the backbone.
    AttentionMaskInterface.register(_name, flash_attention_mask if _name == FLASH else sdpa_mask)
