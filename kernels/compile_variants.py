"""What the compile check compiles: every row of the launch table, in the variants that matter most, and the types of
the arguments that a launch would pass.

A new kernel is one more entry of `KERNELS`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .launch_table import DECODE, TRAINING, Launch, padded_head_dim

_MASK_POINTERS = {
    "branch_ptr",
    "hidden_start_ptr",
    "hidden_end_ptr",
    *(f"{runs}_{part}_ptr" for runs in ("full", "partial") for part in ("offsets", "start", "end")),
}
_PLAN_POINTERS = {
    "cu_q_ptr",
    "q_row_ptr",
    "q_limit_ptr",
    "slot_index_ptr",
    "idx_start_ptr",
    "idx_len_ptr",
    "slot_bits_ptr",
    "q_request_ptr",
}


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is compiled.

    Attributes:
        kernel (`str`): key of `KERNELS`.
        head_dim (`int`): D.
        dtype (`str`): Triton's name for that of queries, keys and values: `"fp16"`, `"bf16"` or `"fp32"`.
        launch (`Launch`): row of the launch table.
        constants (`dict[str, int | bool]`): compile-time arguments.
    """

    kernel: str
    head_dim: int
    dtype: str
    launch: Launch
    constants: dict[str, int | bool]


@dataclass(frozen=True)
class Kernel:
    """A kernel and the arguments that it is launched with.

    Attributes:
        module (`str`): file in this folder.
        function (`str`): name in it.
        variants (`Callable[[str], Iterator[Variant]]`): called with the key in `KERNELS`.
        int32, float32 (`frozenset[str]`): pointers to such entries, as far as the kernel has them. Other pointers are
            to entries of the variant's dtype. Numbers are int32, but for those named `scale...`, which are float32.
        ones (`frozenset[str]`): numbers that are 1, which Triton compiles in.
        copies (`bool`): whether its loop should copy asynchronously.
    """

    module: str
    function: str
    variants: Callable[[str], Iterator[Variant]]
    int32: frozenset[str]
    float32: frozenset[str]
    ones: frozenset[str] = frozenset()
    copies: bool = True


def call_signature(
    kernel: Kernel, variant: Variant, names: Sequence[str]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and attributes of a call, in the form that `triton.compiler.ASTSource` takes.

    As in a launch, pointers and strides are divisible by 16.

    Args:
        names (`Sequence[str]`): arguments of the kernel, in order.
    """
    constants = {**variant.constants, **dict.fromkeys(kernel.ones, 1)}
    types, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            types[name] = "constexpr"
            continue
        if name.endswith("_ptr"):
            entry = "i32" if name in kernel.int32 else "fp32" if name in kernel.float32 else variant.dtype
            types[name] = f"*{entry}"
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
        if name.endswith("_ptr") or name.startswith("stride_"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


#: Dtype, intervals per key, whether there is padding, and query heads per key-value head. Four intervals are three
#: levels and a document that follows, one is plain causal text. The kernels differ by the size of an element rather
#: than by its format, so both formats of 16 bits share the variants.
_TRAINING_CASES = {
    2: (("bf16", 4, True, 4), ("fp16", 4, False, 3), ("bf16", 1, False, 1)),
    4: (("fp32", 4, True, 4), ("fp32", 1, False, 1)),
}

#: Dtype, words of branch bits and query heads per key-value head.
_DECODE_CASES = {2: (("bf16", 1, 4), ("fp16", 2, 3)), 4: (("fp32", 1, 3),)}


def _dims(padded: int) -> tuple[int, ...]:
    """Head dims that run with a row of the launch table: the width of a block, and one that must be padded to it."""
    return (128, 96) if padded == 128 else (padded,)


def _cases(cases: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    """Those of a head dim: all at 128, that of most models, and fewer where compiling takes long or matters less."""
    return cases[: {128: 3, 64: 2}.get(dim, 1)]


def _training(kernel: str) -> Iterator[Variant]:
    for (name, padded, size), launch in TRAINING.items():
        for dim in _dims(padded) if name == kernel else ():
            for dtype, intervals, with_padding, group in _cases(_TRAINING_CASES[size], dim):
                constants = {
                    "GROUP": group,
                    "HEAD_DIM": dim,
                    "BLOCK_D": padded_head_dim(dim),
                    "BLOCK_M": launch.block_m,
                    "BLOCK_N": launch.block_n,
                    "INTERVALS": intervals,
                    "PADDED": with_padding,
                    "UPCAST": False,
                }
                yield Variant(kernel, dim, dtype, launch, constants)


def _decode(kernel: str) -> Iterator[Variant]:
    for (padded, size), launches in DECODE.items():
        for launch in launches:
            for dim in _dims(padded):
                for dtype, words, group in _cases(_DECODE_CASES[size], dim):
                    constants = {
                        "GROUP": group,
                        "HEAD_DIM": dim,
                        "BLOCK_D": padded_head_dim(dim),
                        "BLOCK_M": launch.block_m,
                        "BLOCK_N": launch.block_n,
                        "WORDS": words,
                        "UPCAST": False,
                    }
                    yield Variant(kernel, dim, dtype, launch, constants)


def _merge(kernel: str) -> Iterator[Variant]:
    for dim in sorted({padded for padded, _ in DECODE}):
        constants = {"HEAD_DIM": dim, "BLOCK_D": padded_head_dim(dim), "BLOCK_S": 16}
        yield Variant(kernel, dim, "bf16", Launch(1, 16, warps=4, stages=3), constants)


KERNELS: dict[str, Kernel] = {
    "forward": Kernel(
        "path_attention_forward",
        "forward_kernel",
        _training,
        int32=frozenset(_MASK_POINTERS),
        float32=frozenset({"lse_ptr"}),
    ),
    "grad_query": Kernel(
        "path_attention_grad_query",
        "grad_query_kernel",
        _training,
        int32=frozenset(_MASK_POINTERS),
        float32=frozenset({"lse_ptr", "delta_ptr"}),
    ),
    "grad_key_value": Kernel(
        "path_attention_grad_key_value",
        "grad_key_value_kernel",
        _training,
        int32=frozenset(_MASK_POINTERS),
        float32=frozenset({"lse_ptr", "delta_ptr"}),
    ),
    "decode_split": Kernel(
        "path_decode",
        "_split_kernel",
        _decode,
        int32=frozenset(_PLAN_POINTERS),
        float32=frozenset({"out_ptr", "lse_ptr"}),
        ones=frozenset({"stride_qd", "stride_kd", "stride_vd"}),
    ),
    "decode_merge": Kernel(
        "path_decode",
        "_merge_kernel",
        _merge,
        int32=frozenset(_PLAN_POINTERS),
        float32=frozenset({"share_ptr", "share_lse_ptr", "lse_ptr"}),
        copies=False,
    ),
}


def all_variants(names: Sequence[str] = tuple(KERNELS)) -> list[Variant]:
    """Everything that the check compiles of the kernels `names`, keys of `KERNELS`."""
    return [variant for name in names for variant in KERNELS[name].variants(name)]
