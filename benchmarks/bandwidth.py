"""The memory-bandwidth floor: what a forward pass must read of the weights, and how fast this machine reads it.

A decode step of few tokens does little arithmetic for each weight, so it can take no less time than its weights take
to come from memory. Keys and values are not counted: they differ between the ways to decode.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import paired

#: Columns of the matrix that a buffer is read as by a product with a vector.
_COLUMNS = 1024


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one forward pass reads: all parameters, each once.

    Of input embeddings that are not tied to the head, only the rows of the tokens are read; they are left out.
    """
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    # Tied weights are one parameter, which comes up once.
    read = [each for each in model.parameters() if each is not embeddings or embeddings is head]
    return sum(each.numel() * each.element_size() for each in read)


def gguf_weight_bytes(path: str | Path) -> dict[str, int]:
    """The same of a GGUF file, by the type of its tensors, such as `Q4_1`.

    Raises:
        ValueError: if there is no such file.
    """
    from gguf import GGUFReader

    if not Path(path).is_file():
        raise ValueError(f"`path` is {str(path)!r}, where there is no file. Give a GGUF file.")
    tensors = GGUFReader(path).tensors
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tied or tensor.name != "token_embd.weight":
            kind = tensor.tensor_type.name
            sizes[kind] = sizes.get(kind, 0) + int(tensor.n_bytes)
    return sizes


def new_buffer(size: int) -> torch.Tensor:
    """A float32 matrix of at least `size` bytes, rounded up to whole rows.

    Raises:
        ValueError: if `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1 byte, got {size}.")
    # Written to, or its pages would all be one page of zeros.
    return torch.ones(-(-size // (4 * _COLUMNS)), _COLUMNS)


def readings(buffer: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Ways to read `buffer` once from its first byte to its last, by name; each returns a sum over all of it."""
    vector, integers = torch.ones(buffer.shape[1]), buffer.view(torch.int64)
    return {
        "product with a vector": lambda: (buffer @ vector).sum(),
        "sum of numbers": lambda: buffer.sum(),
        "sum of bits": lambda: integers.sum(),
    }


def fastest_reading(size: int, repeats: int = 5) -> tuple[Callable[[], torch.Tensor], dict[str, float]]:
    """The quickest of `readings` of a buffer of `size` bytes, and the median seconds of each.

    Args:
        size (`int`): bytes.
        repeats (`int`): timed runs of each, in turns.
    """
    ways = readings(new_buffer(size))
    seconds = {name: statistics.median(times) for name, times in paired(ways, repeats, warm_up=1).items()}
    return ways[min(seconds, key=seconds.__getitem__)], seconds
