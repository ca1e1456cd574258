"""`python -m multiverse.kernels.compile_check`: compiles the kernels for GPUs that need not be there.

A kernel that spills registers, or whose loop waits for every load, is still right but many times slower, and no test
of its results shows that. Triton compiles in processes of their own: this one may run kernels in its interpreter.
"""

import contextlib
import importlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table
except ImportError:
    sys.exit("The compile check needs typer and rich: pip install 'multiverse-transformers[cli,kernels]'")

from multiverse.kernels.compile_variants import KERNELS, Variant, all_variants, call_signature
from multiverse.kernels.launch_table import Launch
from multiverse.kernels.triton_support import triton

#: Architectures that must pass by default.
GATED = ["sm_80", "sm_90"]

#: Bytes of shared memory of a block: what the smallest GPU of the gated kinds' families (sm_86, sm_89) has, and AMD's.
SHARED_LIMIT = 99 * 1024
AMD_SHARED_LIMIT = 64 * 1024

_ENVIRONMENT = {"TRITON_INTERPRET": "0", "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
_ASYNCHRONOUS = re.compile(r"\bcp\.async\.c[ag]\b")


@dataclass(frozen=True)
class Compiled:
    """What came out of compiling one variant for one architecture.

    Attributes:
        registers (`int`): per thread.
        spills (`int`): bytes stored and loaded for want of registers; on AMD, registers spilled.
        shared (`int`): bytes of shared memory per block.
        copies (`int`): asynchronous copies in the PTX; 0 on AMD.
        error (`str`): why it did not compile, else empty.
    """

    variant: Variant
    arch: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    copies: int = 0
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        if self.error:
            return [self.error]
        found = []
        if self.spills:
            found.append(f"spills {self.spills}")
        nvidia = self.arch.startswith("sm_")
        limit = SHARED_LIMIT if nvidia else AMD_SHARED_LIMIT
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, more than {limit}")
        if KERNELS[self.variant.kernel].copies and nvidia and not self.copies:
            found.append("has no asynchronous copies")
        return found


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compiles in this process, in which Triton must neither interpret nor take results from its cache.

    Args:
        arch (`str`): `"sm_80"` and the like, or `"gfx942"` and the like.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = KERNELS[variant.kernel]
    function = getattr(importlib.import_module(f"multiverse.kernels.{kernel.module}"), kernel.function)
    source = ASTSource(function, *call_signature(kernel, variant, function.arg_names))
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", arch, 64)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            binary = triton.compile(source, target=target, options=variant.launch.options(target.backend))
        if nvidia:
            text, registers, spills = log.getvalue(), r"Used (\d+) registers", r"(\d+) bytes spill (?:stores|loads)"
        else:
            text, registers, spills = binary.asm["amdgcn"], r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)"
        return Compiled(
            variant,
            arch,
            registers=_numbers(registers, text)[0],
            spills=sum(_numbers(spills, text)),
            shared=binary.metadata.shared,
            copies=len(_ASYNCHRONOUS.findall(binary.asm["ptx"])) if nvidia else 0,
        )
    except Exception as error:  # of any kind: compilers fail in many ways, and each is a result
        return Compiled(variant, arch, error=f"does not compile: {type(error).__name__}: {str(error)[:300]}")


def _numbers(pattern: str, text: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, text)]
    if not found:
        raise ValueError(f"the compiler did not say {pattern!r}")
    return found


def compile_all(variants: Sequence[Variant], archs: Sequence[str], workers: int = 2) -> Iterator[Compiled]:
    """Compiles every variant for every architecture, and yields the results as they come.

    Args:
        workers (`int`): processes.
    """
    with tempfile.TemporaryDirectory() as cache, _environment(TRITON_CACHE_DIR=cache, **_ENVIRONMENT):
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        try:
            waiting = [pool.submit(compile_variant, variant, arch) for variant in variants for arch in archs]
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Environment variables for processes that are started meanwhile: Triton reads them when it is imported."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def result_table(results: Sequence[Compiled], gated: Sequence[str]) -> Table:
    """One line per kernel, head dim, dtype, launch and architecture, with the worst of its variants."""
    rows: dict[tuple[str, int, str, Launch, str], list[Compiled]] = {}
    for result in results:
        variant = result.variant
        row = (variant.kernel, variant.head_dim, variant.dtype, variant.launch, result.arch)
        rows.setdefault(row, []).append(result)
    table = Table(title=f"{len(results)} compiled variants", title_justify="left")
    for column in ("kernel", "D", "dtype", "block", "warps", "stages", "arch"):
        table.add_column(column)
    for column in ("registers", "spills", "shared", "cp.async"):
        table.add_column(column, justify="right")
    table.add_column("")
    for (kernel, dim, dtype, launch, arch), row_results in sorted(rows.items()):
        numbers = [max(getattr(each, name) for each in row_results) for name in ("registers", "spills", "shared")]
        table.add_row(
            kernel,
            str(dim),
            dtype,
            f"{launch.block_m} x {launch.block_n}",
            str(launch.warps),
            str(launch.stages),
            arch,
            *map(str, numbers),
            str(min(each.copies for each in row_results)),
            _verdict(row_results, gated),
        )
    return table


def _verdict(results: Sequence[Compiled], gated: Sequence[str]) -> str:
    if not any(result.faults for result in results):
        return "[green]ok[/]"
    return "[red]fails[/]" if any(_fails(result, gated) for result in results) else "[yellow]reported[/]"


def _fails(result: Compiled, gated: Sequence[str]) -> bool:
    return bool(result.faults) and result.arch in gated


def _described(result: Compiled) -> str:
    variant = result.variant
    constants = ", ".join(f"{name}={value}" for name, value in variant.constants.items())
    return f"{variant.kernel} for {result.arch} in {variant.dtype}, {constants}: {'; '.join(result.faults)}"


def _check_archs(archs: Sequence[str], option: str) -> None:
    for arch in archs:
        if not re.fullmatch(r"sm_\d+|gfx\w+", arch):
            raise typer.BadParameter(f"{option} must name architectures such as sm_90 or gfx942, got {arch!r}.")


def main(
    arch: Annotated[list[str], typer.Option(help="Architecture that must pass; several times for several.")] = GATED,
    report: Annotated[str, typer.Option(help="Architectures that are only reported, separated by commas.")] = "",
    kernel: Annotated[
        list[str] | None, typer.Option(help=f"Kernel to compile, all by default: {', '.join(KERNELS)}.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
) -> None:
    """Compiles every row of the launch table and fails if one spills registers, needs more than 99 KB of shared memory
    or does not copy asynchronously on a gated architecture."""
    if triton is None:
        raise typer.BadParameter("the package triton is not installed: pip install 'multiverse-transformers[kernels]'")
    reported = [name for name in report.split(",") if name]
    _check_archs(arch, "--arch")
    _check_archs(reported, "--report")
    kernels = kernel or list(KERNELS)
    if unknown := sorted(set(kernels) - set(KERNELS)):
        raise typer.BadParameter(f"--kernel must be one of {', '.join(KERNELS)}, got {', '.join(unknown)}.")
    variants = all_variants(kernels)
    archs = [*arch, *(name for name in reported if name not in arch)]
    errors = Console(stderr=True)
    total, results = len(variants) * len(archs), []
    for result in track(compile_all(variants, archs, workers), "compiling", total=total, console=errors):
        results.append(result)
        if not errors.is_terminal and len(results) % 10 == 0:  # where no bar can be drawn
            errors.print(f"{len(results)} of {total} compiled")
    Console(width=None if sys.stdout.isatty() else 140).print(result_table(results, arch))
    faulty = [result for result in results if result.faults]
    for result in faulty:
        color = "red" if _fails(result, arch) else "yellow"
        errors.print(f"[{color}]{escape(_described(result))}[/]")
    if any(_fails(result, arch) for result in faulty):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
