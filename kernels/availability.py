"""What of Multiverse Attention runs on a machine, and what a model would use there: the facts behind
`multiverse kernels`."""

from dataclasses import dataclass

import torch
from transformers.utils import is_flash_attn_2_available

from .dispatch import AUTOMATIC, FLASH, SUPPORTED_ATTENTION, TRITON, automatic_backend, resolve_decode_attention
from .launch_table import MAX_HEAD_DIM
from .triton_support import INTERPRETED, runs_triton, triton

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine.

    Attributes:
        purpose (`str`): `"forward"` for training and prefill, `"decode"` for the steps of `generate()`.
        name (`str`): value of `attn_implementation` or `decode_attention`.
        runs (`bool`): whether it would run.
        why (`str`): what speaks for or against it.
        chosen (`bool`): whether the model would use it.
    """

    purpose: str
    name: str
    runs: bool
    why: str
    chosen: bool


def backend_report(
    implementation: str,
    decode_attention: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    sliding_window: bool = False,
) -> list[BackendStatus]:
    """Every backend, and which a model would use.

    Args:
        implementation (`str`): the model's `attn_implementation`.
        decode_attention (`str`): of its `generation_config`.
        device (`torch.device`): where the model would be.
        dtype (`torch.dtype`): of its weights.
        head_dim (`int`): of its attention.
        sliding_window (`bool`): whether any of its layers has a window, which no backend supports.

    Raises:
        ValueError: if `implementation` cannot express branches.
    """
    chosen = {"forward": implementation, "decode": resolve_decode_attention(decode_attention, implementation, device)}
    facts = [("forward", name, *_forward(name, device, dtype, head_dim)) for name in SUPPORTED_ATTENTION]
    facts.append(("decode", "folded", True, "the branches and heads of a request as rows of one SDPA call"))
    facts.append(("decode", "path_decode", *_triton(device, dtype, head_dim)))
    for name in ("eager", "sdpa", "flex_attention"):
        facts.append(("decode", name, True, "the model's own implementation, request by request"))
    if sliding_window:
        facts = [(*fact[:2], False, "the model has sliding-window layers, which have no branches") for fact in facts]
    return [BackendStatus(*fact, chosen=chosen[fact[0]] == fact[1]) for fact in facts]


def _forward(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    if name == AUTOMATIC:
        backend = automatic_backend(device)
        if backend == "triton":
            runs, why = _triton(device, dtype, head_dim)
            return runs, f"automatic: the Triton kernels, as on every GPU; {why}"
        return True, "automatic: a dense mask under SDPA, as Triton compiles for no such device"
    if name == TRITON:
        return _triton(device, dtype, head_dim)
    if name == FLASH:
        if not is_flash_attn_2_available():
            return False, "the package flash-attn is not installed, or there is no GPU"
        if dtype not in (torch.float16, torch.bfloat16):
            return False, f"flash-attn computes in float16 and bfloat16, the model is in {_short(dtype)}"
        return device.type == "cuda", "one varlen sequence per stretch of a branch"
    if name == "flex_attention":
        only = " (forward only on a CPU)" if device.type == "cpu" else ""
        return True, f"a BlockMask from the intervals, no dense mask{only}"
    return True, "a dense mask: memory grows with the square of the tokens"


def _triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    if triton is None:
        return False, "the package triton is not installed"
    if not runs_triton(device):
        return False, "TRITON_INTERPRET=1 is set" if INTERPRETED else f"Triton does not compile for a {device.type}"
    if dtype not in _TRITON_DTYPES:
        return False, f"the kernels take float16, bfloat16 and float32, the model is in {_short(dtype)}"
    if head_dim > MAX_HEAD_DIM:
        return False, f"the kernels take head dims up to {MAX_HEAD_DIM}, the model has {head_dim}"
    return True, "interpreted, for tests: slow" if INTERPRETED else "compiled for this GPU at the first call"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
