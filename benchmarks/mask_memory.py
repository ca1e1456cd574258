"""What the mask of one training sample takes, in memory and time: growth of the resident set while it is prepared.

`python -m benchmarks.mask_memory`. Linux only: it reads and resets the high-water mark of the process in /proc. Each
form of the mask is prepared in a fresh process, after the same code has run for a short text (so that what Python and
PyTorch load on first use is not counted) and freed memory has gone back to the system (so that it is not used again
unseen).
"""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse import BranchLayout
from multiverse.kernels.flash_varlen import VarlenPlan
from multiverse.kernels.flex import flex_block_mask
from multiverse.kernels.launch_table import training_launch
from multiverse.kernels.path_mask import PathMask
from multiverse.structure import StructureMachine
from rich.console import Console
from rich.table import Table

from benchmarks.measure import load_of_others, store

#: Paths of a block by level: 4 paths of 3 paths of 5 paths are 77 branches with the root.
WIDTHS = (4, 3, 5)
TAG_TOKENS = 220


def training_sample(tokens: int) -> StructureMachine:
    """A text of `tokens` tokens in 77 branches on three levels, stretches of equal length and a long end."""
    machine = StructureMachine()
    stretch = (tokens - TAG_TOKENS) // 100

    def text(widths: tuple[int, ...]) -> None:
        machine.read_plain(stretch)
        if widths:
            for tag in ("<Parallel>", "</Goal>"):
                machine.read_tag(tag)
            for _ in range(widths[0]):
                machine.read_tag("<Path>")
                text(widths[1:])
                machine.read_tag("</Path>")
            for tag in ("<Conclusion>", "</Parallel>"):
                machine.read_tag(tag)

    text(WIDTHS)
    machine.read_plain(tokens - machine.length)
    return machine


def path_attention(mask: PathMask) -> None:
    """Block runs of the three Triton kernels, head dim 128 in 16 bit."""
    for kernel in ("forward", "grad_query"):
        launch = training_launch(kernel, 128, 2)
        mask.block_runs(launch.block_m, launch.block_n)
    launch = training_launch("grad_key_value", 128, 2)
    mask.block_runs_transposed(launch.block_m, launch.block_n)


PREPARATIONS: dict[str, Callable[[PathMask], Any]] = {
    "intervals alone": lambda mask: None,
    "path_attention": path_attention,
    "flash_attention_2": lambda mask: mask.derived("varlen_plan", lambda: VarlenPlan.from_mask(mask)),
    "flex_attention": flex_block_mask,
    "dense (sdpa, eager)": lambda mask: mask.derived("dense", mask.visible),
}


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (most since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def prepare(name: str, machine: StructureMachine, branch_ids: torch.Tensor) -> PathMask:
    """From the structure of a text to all that attention reads of its mask."""
    mask = PathMask.from_machines([machine], branch_ids)
    PREPARATIONS[name](mask)
    return mask


def measure(name: str, tokens: int) -> dict[str, float]:
    """Bytes that the resident set grew by at most, bytes that are kept, and seconds. For a process of its own."""
    torch.set_num_threads(1)
    short = training_sample(1500)
    prepare(name, short, BranchLayout.from_machine(short).branch_ids[None])
    machine = training_sample(tokens)
    branch_ids = BranchLayout.from_machine(machine).branch_ids[None]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    start = time.perf_counter()
    mask = prepare(name, machine, branch_ids)
    seconds = time.perf_counter() - start
    return {"growth": resident("VmHWM") - before, "kept": mask.nbytes, "seconds": seconds}


def main(
    tokens: Annotated[int, typer.Option(min=1500)] = 32_768,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """One sample of 77 branches on three levels, in every form that an attention backend wants its mask in."""
    console = Console()
    table = Table(title=f"mask of one sample, {tokens:,} tokens, 77 branches on 3 levels, CPU, 1 thread")
    for column in ("form", "peak growth MB", "kept MB", "seconds"):
        table.add_column(column, justify="left" if column == "form" else "right")
    rows, busy = [], []
    for name in PREPARATIONS:
        busy.append(load_of_others())
        runs = []
        for _ in range(repeats):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(measure, (name, tokens)))
        rows.append({"form": name, "tokens": tokens, "runs": runs})
        growth, kept = (max(run[key] for run in runs) / 1e6 for key in ("growth", "kept"))
        seconds = statistics.median(run["seconds"] for run in runs)
        table.add_row(name, f"{growth:.2f}", f"{kept:.2f}", f"{seconds:.3f}")
    console.print(table)
    store("mask_memory", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
