"""Triton as an optional dependency: what kernel files import in its place, so that they load without it.

`tl` and `jit` are Triton's own where it is installed. Where it is not, they are stand-ins that let a kernel be defined
but not launched; `check_device` says so before a launch.
"""

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

    class tl:  # type: ignore[no-redef]
        """The names of `triton.language` that are looked up when a kernel is defined."""

        constexpr = staticmethod(lambda value=None: value)


#: Whether kernels run in Triton's interpreter, on CPU tensors. Triton decides it when a kernel is defined.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`triton.jit`, with or without options; returns the function as it is where there is no Triton."""
    if triton is None:
        return function if function is not None else lambda function: function
    return triton.jit(**options) if function is None else triton.jit(function)


#: Context in which kernels go to the GPU of a tensor; of no effect for one on the CPU.
on_device_of = torch.cuda.device_of


def runs_triton(device: torch.device) -> bool:
    """Whether the kernels run on tensors of `device`."""
    return triton is not None and device.type == ("cpu" if INTERPRETED else "cuda")


def check_device(tensor: torch.Tensor, name: str) -> None:
    """Raises unless a kernel can run on the device of `tensor`.

    Args:
        name (`str`): what the caller calls `tensor`.

    Raises:
        ImportError: if Triton is not installed.
        ValueError: if the tensor is on the CPU and kernels are compiled, or on a device while they are interpreted.
    """
    if triton is None:
        raise ImportError(
            "Triton kernels need the package `triton`: pip install 'multiverse-transformers[kernels]' (Linux), or "
            "choose another attention implementation."
        )
    on_cpu = tensor.device.type == "cpu"
    if on_cpu and not INTERPRETED:
        raise ValueError(
            f"`{name}` is on the CPU, where Triton kernels do not run: move it to a GPU, or choose another attention "
            "implementation. For tests, set TRITON_INTERPRET=1 in the environment before Python starts."
        )
    if INTERPRETED and not on_cpu:
        raise ValueError(
            f"`{name}` is on {tensor.device}, but TRITON_INTERPRET=1 is set, under which kernels run on the "
            "CPU alone: unset it, or move all tensors to the CPU."
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"`{name}` is on {tensor.device}, for which Triton has no compiler: move it to a GPU that has one, or "
            "choose another attention implementation."
        )
