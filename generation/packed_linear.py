"""Linear layers of a CPU model in oneDNN's own weight layout, while the engine decodes.

A decode step multiplies few rows with every weight, which torch's general matrix product does slowly; on weights that
were reordered once it takes little longer than reading them. The copies double the memory of the weights and would go
stale if these changed, so every call checks them against the weights in full.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear

#: Weights below this size gain nothing.
_LEAST_ELEMENTS = 1 << 15
#: Rows that the layout is chosen for. Prompts gain by it too, if less: a third at 200 rows, a fifth at 1,000.
_ROWS_HINT = 8
#: Rows up to which the plain product in float32 is faster than one on packed weights, by the processor's vendor: on an
#: Intel Xeon MKL takes 23 and 27 ms for one and two rows through SmolLM2-135M, where packed weights take 30. On an AMD
#: EPYC they win from the first row on. It is a rule, and not a measurement at run time, since both products differ in
#: their last bits: a text must not depend on how busy the machine was.
_PLAIN_ROWS = {"GenuineIntel": 2}
#: Layers of one parent module that transformers' decoder layers call on the same tensor, in this order.
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class _Packed:
    """Weights of the layers of one group in oneDNN's layout, and what they were made from."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    checksums: tuple[int, ...]
    addresses: tuple[int, ...]


_packs: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], _Packed]]" = weakref.WeakKeyDictionary()


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
    linears = _linears(model)
    groups = _groups(linears)
    for names in set(kept) - set(groups):
        del kept[names]
    forwards: dict[nn.Linear, Callable[[torch.Tensor], torch.Tensor]] = {}
    for names in groups:
        modules = [linears[name] for name in names]
        checksums = tuple(_checksum(module.weight.detach()) for module in modules)
        addresses = tuple(module.weight.data_ptr() for module in modules)
        packed = kept.get(names)
        if packed is None or packed.checksums != checksums or packed.addresses != addresses:
            weights = [module.weight.detach() for module in modules]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
            packed = kept[names] = _Packed(reordered, None, checksums, addresses)
        # Small, so it is taken anew at every call and cannot go stale.
        biases = [module.bias.detach() for module in modules if module.bias is not None]
        packed.bias = torch.cat(biases) if biases else None
        forwards |= dict(zip(modules, _SharedInput(modules, packed).forwards(), strict=True))
    return forwards


class _SharedInput:
    """Layers that are given the same tensor one after another: the first call computes them all in one product.

    A layer that is given another tensor, as when two threads run the model at once, computes its own product.
    """

    def __init__(self, modules: list[nn.Linear], packed: _Packed) -> None:
        self.modules, self.packed = modules, packed
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def forwards(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """The replacement for the `forward` of each layer."""
        ends = list(accumulate(module.out_features for module in self.modules))
        starts = [0, *ends[:-1]]
        return [self._forward(number, starts[number], end) for number, end in enumerate(ends)]

    def _forward(self, number: int, start: int, end: int) -> Callable[[torch.Tensor], torch.Tensor]:
        module, packed = self.modules[number], self.packed
        weight, bias = module.weight, module.bias
        dtype, columns = weight.dtype, module.in_features
        plain_rows = _plain_rows(dtype)
        alone, first, last = len(self.modules) == 1, number == 0, number == len(self.modules) - 1

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            # Another dtype means autocast, which casts the weight too.
            few = inputs.numel() <= plain_rows * columns
            if few or inputs.dtype != dtype or torch.is_autocast_enabled("cpu"):
                return linear(inputs, weight, bias)
            if alone or first:
                output = torch.ops.mkldnn._linear_pointwise(inputs, packed.weight, packed.bias, "none", [], "")
                if alone:
                    return output
                self._last = (inputs, output)
            else:
                shared = self._last
                if shared is None or shared[0] is not inputs:
                    return linear(inputs, weight, bias)
                output = shared[1]
                if last:
                    self._last = None
            return output[..., start:end]

        return forward


def _groups(linears: dict[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Names of the layers to pack, those that share their input and their kind together."""
    groups: dict[tuple, list[str]] = {}
    for name, module in linears.items():
        parent, _, leaf = name.rpartition(".")
        shared = next((number for number, leaves in enumerate(_SHARED_INPUTS) if leaf in leaves), name)
        kind = (parent, shared, module.in_features, module.weight.dtype, module.bias is None)
        groups.setdefault(kind, []).append(name)
    return [tuple(names) for names in groups.values()]


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


def _plain_rows(dtype: torch.dtype) -> int:
    """Rows up to which packed weights are slower than plain ones."""
    return _PLAIN_ROWS.get(_vendor(), 0) if dtype == torch.float32 and torch.backends.mkl.is_available() else 0


@cache
def _vendor() -> str:
    """The processor's vendor, such as `GenuineIntel`; empty where Linux does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _checksum(weight: torch.Tensor) -> int:
    """Sum of the weight's bits, rows weighted by their place: a change anywhere shows in it, also rows that move."""
    # The widest integers that divide a row: the sum is then as fast as memory.
    row = weight.shape[1] * weight.element_size()
    bits = weight.view(torch.int64 if row % 8 == 0 else torch.int32 if row % 4 == 0 else torch.int16)
    rows = bits.sum(dim=1, dtype=torch.int64)
    return int((rows * torch.arange(1, 2 * len(rows), 2)).sum())


def _free_memory() -> int:
    """Bytes that are free; none where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
