"""Block sizes, warps and registers of every Triton kernel, by head dim and element size.

Every row compiles for sm_80 and sm_90 without a spilled register, with asynchronous copies and within 99 KB of shared
memory, which `python -m multiverse.kernels.compile_check` verifies for keys of up to four intervals. With more, most
rows of training spill, which is not checked (README.md). Speed was not measured.
"""

import math
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block_m (`int`): rows (queries) of a block.
        block_n (`int`): keys of a block.
        warps, stages (`int`): `num_warps` and `num_stages` of Triton.
        registers (`int`, *optional*): what ptxas may use per thread, so NVIDIA only. By default it decides that by
            itself, and may spill although more are free.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def arguments(self) -> dict[str, int]:
        """Keyword arguments of a launch on this machine; the interpreter passes over those that are options."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            **self.options("hip" if torch.version.hip else "cuda"),
        }

    def options(self, backend: str) -> dict[str, int]:
        """Options with which Triton compiles a kernel.

        Args:
            backend (`str`): of the target in Triton's words: `"cuda"`, or `"hip"`, which refuses a limit of registers.
        """
        if backend == "hip":
            # AMD's GPUs have 64 KB of shared memory, in which a third stage would not always fit.
            return {"num_warps": self.warps, "num_stages": min(self.stages, 2)}
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


#: (kernel, head dim padded to a power of two, bytes per element) -> launch; for training and prefill.
TRAINING: dict[tuple[str, int, int], Launch] = {
    ("forward", 64, 2): Launch(128, 64, 8, 3),
    ("forward", 128, 2): Launch(64, 32, 8, 2),
    ("forward", 256, 2): Launch(64, 16, 8, 2),
    ("forward", 64, 4): Launch(16, 16, 8, 2),
    ("forward", 128, 4): Launch(16, 16, 8, 3, registers=255),
    ("forward", 256, 4): Launch(16, 16, 8, 2),
    ("grad_query", 64, 2): Launch(64, 32, 8, 2),
    ("grad_query", 128, 2): Launch(64, 32, 8, 2),
    ("grad_query", 256, 2): Launch(64, 16, 8, 2),
    ("grad_query", 64, 4): Launch(16, 32, 8, 2),
    ("grad_query", 128, 4): Launch(16, 16, 8, 2, registers=128),
    ("grad_query", 256, 4): Launch(16, 16, 8, 2, registers=255),
    ("grad_key_value", 64, 2): Launch(64, 32, 8, 2),
    ("grad_key_value", 128, 2): Launch(64, 32, 8, 2),
    ("grad_key_value", 256, 2): Launch(16, 32, 8, 2),
    ("grad_key_value", 64, 4): Launch(16, 32, 8, 2, registers=128),
    ("grad_key_value", 128, 4): Launch(16, 16, 16, 2, registers=128),
    ("grad_key_value", 256, 4): Launch(16, 16, 16, 2),
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a kernel works with, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def training_launch(kernel: str, head_dim: int, element_size: int) -> Launch:
    """Launch of a training kernel: `"forward"`, `"grad_query"` or `"grad_key_value"`.

    Args:
        head_dim (`int`): at most 256.
        element_size (`int`): bytes per element of queries, keys and values, 2 or 4.
    """
    return TRAINING[kernel, max(64, padded_head_dim(head_dim)), element_size]


#: Largest head dim of the kernels.
MAX_HEAD_DIM = 256

#: (head dim padded to a power of two, bytes per element) -> launches of decode, by rows: queries of a request times
#: heads of a group.
DECODE: dict[tuple[int, int], tuple[Launch, ...]] = {
    (64, 2): (Launch(16, 64, 4, 3), Launch(32, 32, 4, 4), Launch(64, 32, 4, 3), Launch(128, 32, 8, 3)),
    (128, 2): (Launch(16, 64, 4, 3), Launch(32, 32, 4, 4), Launch(64, 32, 4, 4), Launch(128, 32, 8, 4)),
    # An output block of 128 rows and 256 columns leaves too few registers for anything else.
    (256, 2): (Launch(16, 32, 4, 3), Launch(32, 32, 4, 3), Launch(64, 16, 8, 3)),
    (64, 4): (Launch(16, 32, 8, 3), Launch(32, 16, 8, 3)),
    (128, 4): (Launch(16, 32, 8, 3), Launch(32, 16, 8, 3)),
    (256, 4): (Launch(16, 16, 8, 3, registers=255), Launch(32, 16, 8, 2)),
}

#: The most that the shares of a split may add to the bytes of its keys and values.
SHARE_LIMIT = 1 / 8

#: Programs of decode per processor of the GPU that are aimed at, so that all have work to the end.
_PROGRAMS_PER_PROCESSOR = 2
_SHORTEST_SPLIT = 128
_SPLIT_MULTIPLE = 64


def decode_launch(rows: int, head_dim: int, element_size: int) -> Launch:
    """Launch of decode: the smallest block that holds all rows, or the largest there is.

    Args:
        rows (`int`): most queries of a request times the heads of a group.
        head_dim (`int`): at most 256.
        element_size (`int`): bytes per element of queries, keys and values, 2 or 4.
    """
    launches = DECODE[max(64, padded_head_dim(head_dim)), element_size]
    return next((launch for launch in launches if launch.block_m >= rows), launches[-1])


def decode_split_length(max_kv: int, rows: int, programs: int, element_size: int, processors: int) -> int:
    """Slots that one program of decode reads: few enough that all processors have work, but enough that the shares
    of the output, 4 * rows / (element_size * length) of the bytes of keys and values, stay within `SHARE_LIMIT`.

    Args:
        max_kv (`int`): most slots of a request.
        rows (`int`): most rows of a block.
        programs (`int`): programs that would run with a single split.
        element_size (`int`): bytes per element.
        processors (`int`): multiprocessors of the GPU.
    """
    splits = -(-_PROGRAMS_PER_PROCESSOR * processors // max(programs, 1))
    cheap = math.ceil(4 * rows / (element_size * SHARE_LIMIT))
    length = max(-(-max_kv // splits), cheap, _SHORTEST_SPLIT)
    return -(-length // _SPLIT_MULTIPLE) * _SPLIT_MULTIPLE


class DecodeGrid(NamedTuple):
    """How a call of decode is divided.

    Attributes:
        launch (`Launch`): of the kernel.
        m_blocks (`int`): blocks of rows per request.
        split_length, splits (`int`): slots of a split, and splits of the longest request.
    """

    launch: Launch
    m_blocks: int
    split_length: int
    splits: int


def decode_grid(
    requests: int,
    tokens: int,
    max_q: int,
    max_kv: int,
    heads: tuple[int, int],
    head_dim: int,
    element_size: int,
    processors: int,
    split_length: int | None = None,
) -> DecodeGrid:
    """How `path_decode` divides a call.

    Args:
        requests, tokens, max_q, max_kv (`int`): of the plan.
        heads (`tuple[int, int]`): of queries, and of keys and values.
        head_dim, element_size (`int`): see `decode_launch`.
        processors (`int`): multiprocessors of the GPU.
        split_length (`int`, *optional*): a length that the caller wants.
    """
    group = heads[0] // heads[1]
    launch = decode_launch(max_q * group, head_dim, element_size)
    if split_length is None:
        programs = heads[1] * max(requests, math.ceil(tokens * group / launch.block_m))
        rows = min(max_q * group, launch.block_m)
        split_length = decode_split_length(max_kv, rows, programs, element_size, processors)
    m_blocks = max(1, math.ceil(max_q * group / launch.block_m))
    return DecodeGrid(launch, m_blocks, split_length, max(1, math.ceil(max_kv / split_length)))
