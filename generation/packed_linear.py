"""Linear layers of a CPU model in oneDNN's own weight layout, while the engine decodes.

A decode step multiplies few rows with every weight, which torch's general matrix product does slowly; on weights that
were reordered once it takes about as long as reading them. The copies double the memory of the weights and would go
stale if these changed, so every call checks them against the weights in full.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

#: Weights below this size gain nothing.
_LEAST_ELEMENTS = 1 << 15
#: Rows that the layout is chosen for, and up to which it is used: a prompt is better off with the plain product.
_ROWS_HINT, _MOST_ROWS = 8, 64


@dataclass
class _Packed:
    weight: torch.Tensor
    checksum: int
    address: int


_packs: "weakref.WeakKeyDictionary[nn.Module, dict[str, _Packed]]" = weakref.WeakKeyDictionary()


def can_pack() -> bool:
    """Whether this build of torch has the oneDNN operators."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_reorder_linear_weight")
        and hasattr(operators, "_linear_pointwise")
    )


def worth_packing(model: nn.Module) -> bool:
    """Whether the model has weights to pack and the machine memory for a second copy, with as much to spare."""
    if not can_pack():
        return False
    size = sum(module.weight.numel() * module.weight.element_size() for module in _linears(model).values())
    return 0 < 2 * size < _free_memory()


def packed_forwards(model: nn.Module) -> dict[nn.Linear, Callable[[torch.Tensor], torch.Tensor]]:
    """A replacement for the `forward` of every linear layer that gains by it.

    The packed weights are kept for the next call, as long as the model lives.
    """
    kept = _packs.setdefault(model, {})
    modules = _linears(model)
    for name in set(kept) - set(modules):
        del kept[name]
    forwards = {}
    for name, module in modules.items():
        weight = module.weight.detach()
        checksum, address = _checksum(weight), weight.data_ptr()
        packed = kept.get(name)
        if packed is None or packed.checksum != checksum or packed.address != address:
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
            packed = kept[name] = _Packed(reordered, checksum, address)
        forwards[module] = _forward(module, packed.weight)
    return forwards


def _forward(module: nn.Linear, packed: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = module.weight, module.bias
    columns, dtype = weight.shape[1], weight.dtype

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        # Another dtype means autocast, which casts the weight too.
        if inputs.numel() > _MOST_ROWS * columns or inputs.dtype != dtype or torch.is_autocast_enabled("cpu"):
            return linear(inputs, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")

    return forward


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Plain linear layers on the CPU, in a dtype that oneDNN packs, that nobody has wrapped."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, torch.bfloat16)
        and module.weight.is_contiguous()
        and module.weight.numel() >= _LEAST_ELEMENTS
        and "forward" not in vars(module)
    }


def _checksum(weight: torch.Tensor) -> int:
    """Sum of the weight's bits: a change anywhere shows in it."""
    bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
    return int(bits.sum(dtype=torch.int64))


def _free_memory() -> int:
    """Bytes that are free; none where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
