"""The compile check: what it compiles fits the kernels, and its verdicts."""

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from decode_cases import decode_inputs, whole_case
from kernel_cases import random_case, random_inputs
from multiverse.kernels import compile_check
from multiverse.kernels.compile_check import AMD_SHARED_LIMIT, SHARED_LIMIT, Compiled
from multiverse.kernels.compile_variants import KERNELS, Variant, all_variants, call_signature
from multiverse.kernels.launch_table import DECODE, TRAINING
from multiverse.kernels.path_attention import path_attention
from multiverse.kernels.path_decode import path_decode
from multiverse.kernels.triton_support import tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from typer import Typer
from typer.testing import CliRunner, Result

VARIANTS = all_variants()


@pytest.mark.parametrize("name", KERNELS)
def test_signatures_fit_the_arguments_of_the_kernels(name: str) -> None:
    kernel = KERNELS[name]
    function = getattr(importlib.import_module(f"multiverse.kernels.{kernel.module}"), kernel.function)
    names = list(function.arg_names)
    annotated = {name for name, annotation in function.fn.__annotations__.items() if annotation is tl.constexpr}
    assert kernel.ones <= set(names)
    # A pointer that is not listed as int32 or float32 is to queries, keys, values, outputs or their gradients.
    others = {each for each in names if each.endswith("_ptr")} - kernel.int32 - kernel.float32
    assert {each.removeprefix("grad_").removesuffix("_ptr") for each in others} <= {"q", "k", "v", "out"}
    variants = all_variants([name])
    assert variants
    for variant in variants:
        types, constants, attributes = call_signature(kernel, variant, names)
        assert list(types) == names
        assert set(variant.constants) == annotated
        assert set(constants) == annotated | kernel.ones == {each for each in names if types[each] == "constexpr"}
        aligned = {names[index] for (index,) in attributes}
        assert aligned == {each for each in names if types[each][0] == "*" or each.startswith("stride_")} - kernel.ones


def test_every_row_of_the_launch_table_is_compiled() -> None:
    compiled = {(each.kernel, each.launch) for each in VARIANTS}
    assert compiled >= {(kernel, launch) for (kernel, _, _), launch in TRAINING.items()}
    assert compiled >= {("decode_split", launch) for launches in DECODE.values() for launch in launches}
    for kernel in ("forward", "grad_query", "grad_key_value", "decode_split"):
        seen = {(each.head_dim, each.dtype == "fp32") for each in VARIANTS if each.kernel == kernel}
        assert seen == set(itertools.product((64, 96, 128, 256), (False, True)))


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=str)
def test_compilers_know_the_options_of_a_launch(target: GPUTarget) -> None:
    """Triton refuses to launch with any other."""
    compiler = make_backend(target)
    for launch in {each.launch for each in VARIANTS}:
        options = launch.options(target.backend)
        known = vars(compiler.parse_options(dict(options)))
        assert options == {name: known[name] for name in options}
        assert known.get("maxnreg") == (launch.registers if target.backend == "cuda" else None)


def test_limits_of_registers_can_be_had() -> None:
    limits = [(each.launch.registers, each.launch.warps) for each in VARIANTS if each.launch.registers is not None]
    assert limits
    # A thread of any GPU has at most 255, the threads of a block share 65,536.
    assert all(registers <= 255 and registers * 32 * warps <= 65536 for registers, warps in limits)


class Recorder:
    """Stands for a kernel, and notes with which keyword arguments it is launched."""

    def __init__(self) -> None:
        self.launches: list[dict[str, int]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *tensors, **arguments: self.launches.append(arguments)


@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_kernels_are_launched_as_they_were_compiled(
    dim: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4" if backend == "hip" else None)
    names = ("forward", "grad_query", "grad_key_value", "decode_split")
    recorders = {name: Recorder() for name in names}
    for name, recorder in recorders.items():
        module = importlib.import_module(f"multiverse.kernels.{KERNELS[name].module}")
        monkeypatch.setattr(module, KERNELS[name].function, recorder)
    case = random_case(0, batch=1)
    leaves = random_inputs(case, dim=dim, dtype=dtype).leaves
    torch.autograd.grad(path_attention(*leaves, case.mask).sum(), leaves)
    for queries in (1, 9, 20, 50):
        step = whole_case(queries, 64)
        path_decode(*decode_inputs(step, dim=dim, dtype=dtype), step.plan)
    for name, recorder in recorders.items():
        compiled = [
            {**each.constants, **each.launch.options(backend)}
            for each in VARIANTS
            if (each.kernel, each.head_dim, each.dtype == "fp32") == (name, dim, dtype == torch.float32)
        ]
        assert recorder.launches
        for launch in recorder.launches:
            # Those depend on the model and the text.
            own = launch.keys() - {"GROUP", "INTERVALS", "WORDS", "PADDED"}
            assert any(
                launch.keys() == each.keys() and all(launch[key] == each[key] for key in own) for each in compiled
            )


def training_variant() -> Variant:
    return next(each for each in VARIANTS if each.kernel == "forward")


def test_faults() -> None:
    good = Compiled(training_variant(), "sm_80", registers=128, shared=SHARED_LIMIT, copies=4)
    assert good.faults == []
    assert replace(good, spills=8).faults == ["spills 8"]
    assert "shared memory" in replace(good, shared=SHARED_LIMIT + 1).faults[0]
    assert replace(good, copies=0).faults == ["has no asynchronous copies"]
    amd = replace(good, copies=0, arch="gfx942", shared=AMD_SHARED_LIMIT)
    assert amd.faults == []
    assert "shared memory" in replace(amd, shared=AMD_SHARED_LIMIT + 1).faults[0]
    assert replace(good, copies=0, error="does not compile").faults == ["does not compile"]
    merge = next(each for each in VARIANTS if each.kernel == "decode_merge")
    assert replace(good, copies=0, variant=merge).faults == []


def run(arguments: list[str]) -> Result:
    app = Typer()
    app.command()(compile_check.main)
    return CliRunner().invoke(app, arguments)


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = {"sm_90"}

    def pretend(variants, archs, workers):
        for variant in variants:
            for arch in archs:
                spills = 16 if arch in spilling and variant.dtype == "fp32" else 0
                yield Compiled(variant, arch, registers=255, spills=spills, shared=4096, copies=8)

    monkeypatch.setattr(compile_check, "compile_all", pretend)
    assert run(["--arch", "sm_80"]).exit_code == 0
    failed = run(["--arch", "sm_80", "--arch", "sm_90"])
    assert failed.exit_code == 1
    assert "forward for sm_90 in fp32" in failed.output
    assert "fails" in failed.output
    reported = run(["--arch", "sm_80", "--report", "sm_90,gfx942"])
    assert reported.exit_code == 0
    assert "spills 16" in reported.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--arch", "ampere"], "--arch"), (["--report", "90"], "--report"), (["--kernel", "x"], "forward")],
)
def test_unknown_names_are_refused(arguments: list[str], words: str) -> None:
    refused = run(arguments)
    assert refused.exit_code == 2
    assert words in refused.output


def test_a_kernel_compiles_in_a_process_of_its_own() -> None:
    """From within a process whose kernels are interpreted."""
    command = [sys.executable, "-m", "multiverse.kernels.compile_check", "--arch", "sm_80", "--kernel", "decode_merge"]
    finished = subprocess.run(
        [*command, "--workers", "1"], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("ok") == 3
