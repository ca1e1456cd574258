"""Path attention in Triton: exact attention over a tree of branches, forward and backward, for training and prefill.

A `PathMask` says what is visible; blocks of which nothing is visible are not read, and blocks of which everything is
are not masked. No object grows with the square of the tokens.

Letters: B batch rows, HQ query heads, HKV key-value heads, Q new (query) tokens, S slots (cached and new tokens),
D head dim.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .launch_table import MAX_HEAD_DIM
from .path_attention_forward import launch_forward
from .path_attention_grad_key_value import launch_grad_key_value
from .path_attention_grad_query import launch_grad_query
from .path_mask import PathMask
from .triton_support import check_device

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def path_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: PathMask,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of every new token over the slots that it sees.

    Query head h reads key-value head h // (HQ / HKV). Scores, sums and gradients are accumulated in float32. Nothing
    is added up across programs, so the same inputs give the same output and gradients, bit for bit, every time. What
    stands at padding is not read: it may be NaN, also in the gradient of the output.

    Args:
        query (`torch.Tensor` of shape `(B, HQ, Q, D)`): new tokens; float16, bfloat16 or float32, D at most 256.
        key, value (`torch.Tensor` of shape `(B, HKV, S, D)`): all tokens, in the dtype of `query`. Any strides will
            do for all three; a last axis that is not contiguous costs a copy.
        mask (`PathMask`): what is visible; on the device of the tensors.
        scale (`float`, *optional*): factor of the scores, 1 / sqrt(D) by default.

    Returns:
        Shape `(B, HQ, Q, D)`, stored token by token, so that its transpose `(B, Q, HQ, D)` is contiguous. A query that
        sees nothing (padding) gets exactly 0. Differentiable once.

    Raises:
        ImportError: if Triton is not installed.
        ValueError: if shapes, dtypes or devices do not fit each other, the mask or Triton.
    """
    _check(query, key, value, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _PathAttention.apply(query, key, value, mask, scale)


class _PathAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: PathMask, scale: float
    ) -> torch.Tensor:
        query, key, value = map(_rows, (query, key, value))
        out, lse = launch_forward(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.mask, ctx.scale = mask, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad_out, mask, scale = _rows(grad_out), ctx.mask, ctx.scale
        grad_query, delta = launch_grad_query(query, key, value, out, lse, grad_out, mask, scale)
        grad_key, grad_value = launch_grad_key_value(query, key, value, lse, delta, grad_out, mask, scale)
        return grad_query, grad_key, grad_value, None, None


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a contiguous last axis, which kernels rely on."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: PathMask) -> None:
    if query.numel() == 0 or key.numel() == 0:
        raise ValueError(
            f"`query` has shape {tuple(query.shape)}, `key` {tuple(key.shape)}: there is nothing to attend to. Leave "
            "out the call for an empty batch."
        )
    mask.check(query, key, value)
    if query.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"`query` has head dim {query.shape[-1]}; the Triton kernels take at most {MAX_HEAD_DIM}. Choose another "
            "attention implementation."
        )
    if query.dtype not in _DTYPES:
        raise ValueError(
            f"`query` is {query.dtype}; the Triton kernels take float16, bfloat16 and float32. Convert it, or choose "
            "another attention implementation."
        )
    check_device(query, "query")
