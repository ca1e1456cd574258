"""Kernels on a GPU: right or wrong first, then microseconds against the bytes they must move and against other ways.

`benchmarks/gpu.sh`, or `python -m benchmarks.gpu`. With `--device cpu` and TRITON_INTERPRET=1 the same code runs in
Triton's interpreter on small sizes, which shows that it works, and times nothing of interest.
"""

import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse import BranchLayout
from multiverse.kernels.bytes_model import AttentionShape, decode_bytes
from multiverse.kernels.decode_plan import DecodePlan, RequestQueries, pack_rows
from multiverse.kernels.dense import dense_path_attention
from multiverse.kernels.flash_varlen import flash_attn_varlen_func, flash_varlen_attention
from multiverse.kernels.flex import flex_path_attention
from multiverse.kernels.path_attention import path_attention
from multiverse.kernels.path_decode import path_decode
from multiverse.kernels.path_mask import PathMask
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.mask_memory import training_sample
from benchmarks.measure import store

#: Relative to the largest exact value, against float64.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
Runs = dict[str, Callable[[], Any]]


def timed(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call; on a GPU by its own clock, after the caches have been overwritten."""
    run()
    if device.type != "cuda":
        spent = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        return statistics.median(spent)
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start_event, end_event in pairs:
        flush.zero_()
        start_event.record()
        run()
        end_event.record()
    torch.cuda.synchronize(device)
    return statistics.median(first.elapsed_time(last) for first, last in pairs) / 1e3


def bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 24), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), device, 11)


def sample_mask(tokens: int, device: torch.device) -> PathMask:
    """A text in 77 branches on three levels."""
    machine = training_sample(tokens)
    return PathMask.from_machines([machine], BranchLayout.from_machine(machine).branch_ids[None], device=device)


def inputs(
    heads: tuple[int, int], tokens: int, dim: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Query, key and value of one sample, as leaves, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, each, tokens, dim) for each in (heads[0], heads[1], heads[1], heads[0])]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [each.requires_grad_() for each in made[:3]] + made[3:]


def check_training(tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest error of output and gradients, relative to the largest exact value, by the dense mask in float64."""
    mask = sample_mask(tokens, device)
    leaves = inputs((6, 2), tokens, dim, dtype, device)
    exact = [each.detach().double().requires_grad_() for each in leaves[:3]]
    found, wanted = path_attention(*leaves[:3], mask), dense_path_attention(*exact, mask)
    pairs = [(found.detach(), wanted.detach())]
    gradients = torch.autograd.grad(found, leaves[:3], leaves[3])
    pairs += zip(gradients, torch.autograd.grad(wanted, exact, leaves[3].double()), strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def decode_case(
    paths: int, prefix: int, own: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor, DecodePlan]:
    """Query `(T, HQ, D)`, key and value `(HKV, slots, D)`; the visible slots `(T, slots)`; the plan of the step."""
    slots = prefix + paths * own
    visible = torch.zeros(paths, slots, dtype=torch.bool)
    visible[:, :prefix] = True
    for path in range(paths):
        visible[path, prefix + path * own : prefix + (path + 1) * own] = True
    key, value = (each.detach()[0] for each in inputs(heads, slots, dim, dtype, device)[1:3])
    query = torch.randn(paths, heads[0], dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    plan = DecodePlan.build(
        [RequestQueries(range(paths), [slots] * paths, range(slots))], pack_rows(visible.to(device))
    )
    return [query, key, value], visible.to(device), plan


def check_decode(paths: int, prefix: int, dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """Largest absolute error of a decode step, against SDPA in float64."""
    (query, key, value), visible, plan = decode_case(paths, prefix, 5, (6, 2), dim, dtype, device)
    output, _ = path_decode(query, key, value, plan)
    exact = scaled_dot_product_attention(
        query.double().transpose(0, 1)[None], key.double()[None], value.double()[None], visible, enable_gqa=True
    )
    return float((output.double() - exact[0].transpose(0, 1)).abs().max())


def decode_runs(paths: int, prefix: int, dtype: torch.dtype, device: torch.device) -> tuple[Runs, int]:
    """A step of one layer by several ways, and the bytes of the first; 32 heads on 8, head dim 128."""
    (query, key, value), visible, plan = decode_case(paths, prefix, 64, (32, 8), 128, dtype, device)
    copies = [torch.stack([each[:, sees] for sees in visible]) for each in (key, value)]
    row, rows = query.transpose(0, 1)[None], query[:, :, None]
    runs: Runs = {
        "path_decode": lambda: path_decode(query, key, value, plan),
        "sdpa, dense mask": lambda: scaled_dot_product_attention(
            row, key[None], value[None], visible, enable_gqa=True
        ),
        "sdpa, batch rows": lambda: scaled_dot_product_attention(rows, *copies, enable_gqa=True),
    }
    shape = AttentionShape(32, 8, 128, query.element_size())
    return runs, decode_bytes([(paths, prefix + 64 * paths)], shape).total


def training_runs(tokens: int, dtype: torch.dtype, device: torch.device) -> Runs:
    """Forward and backward of one layer by several ways; 32 heads on 8, head dim 128."""
    mask = sample_mask(tokens, device)
    *leaves, gradient = inputs((32, 8), tokens, 128, dtype, device)

    def both(attend: Callable[..., torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(attend(*leaves, mask), leaves, gradient)

    runs: Runs = {"path_attention": both(path_attention)}
    if device.type == "cuda":
        runs["flex_attention"] = both(flex_path_attention)
    if tokens <= 8192:
        runs["sdpa, dense mask"] = both(dense_path_attention)
    if flash_attn_varlen_func is not None:
        runs["flash-attn, varlen"] = both(flash_varlen_attention)
    runs["sdpa, causal"] = lambda: torch.autograd.grad(
        scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True), leaves, gradient
    )
    return runs


def synchronisations(device: torch.device) -> float:
    """How often a decode step waits for the device, on average."""
    from benchmarks.workloads import Pair, tokens_of_paths

    pair = Pair.load(torch.bfloat16)
    pair.ours.to(device)
    limit, made = tokens_of_paths(4, 32)
    ids = pair.prompt(200, 4).to(device)
    pair.run_ours(ids, made + 19, max_path_tokens=limit)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (report,) = pair.run_ours(ids, made + 19, max_path_tokens=limit).reports
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught) / report.sequential_steps


def main(
    device: Annotated[str, typer.Option()] = "cuda",
    repeats: Annotated[int, typer.Option(min=5)] = 21,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """All checks, then all timings; a check that fails ends the run."""
    console, place = Console(), torch.device(device)
    small = place.type != "cuda"
    name = "interpreter" if small else torch.cuda.get_device_name(place)
    rows: list[dict[str, Any]] = []
    checks = Table(title=f"largest errors, {name}")
    for column in ("kernel", "head dim", "dtype", "error", "allowed"):
        checks.add_column(column, justify="right")
    worst = 0.0
    for dtype, allowed in TOLERANCES.items():
        for dim in (16,) if small else (64, 96, 128, 256):
            errors = {
                "path_attention": check_training(300 if small else 4000, dim, dtype, place),
                "path_decode": check_decode(3 if small else 9, 40 if small else 5000, dim, dtype, place),
            }
            for kernel, error in errors.items():
                checks.add_row(kernel, str(dim), str(dtype).removeprefix("torch."), f"{error:.1e}", f"{allowed:.1e}")
                worst = max(worst, error / allowed)
    console.print(checks)
    if worst > 1 or worst != worst:
        raise SystemExit("A kernel is wrong on this device: nothing is timed.")
    dtype = torch.float32 if small else torch.bfloat16
    speed = bandwidth(place)
    table = Table(title=f"microseconds, {name}, {dtype}, {speed / 1e9:.0f} GB/s measured")
    for column in ("case", "way", "µs", "times the byte floor"):
        table.add_column(column, justify="right")
    for paths, prefix in ((2, 32),) if small else ((1, 8192), (4, 8192), (8, 8192), (16, 8192), (8, 32768)):
        runs, needed = decode_runs(paths, prefix, dtype, place)
        for way, run in runs.items():
            seconds = timed(run, place, repeats)
            floor = f"{seconds * speed / needed:.2f}" if way == "path_decode" else ""
            table.add_row(f"decode, {paths} paths, {prefix}", way, f"{seconds * 1e6:.1f}", floor)
            rows.append({"decode": [paths, prefix], "way": way, "seconds": seconds, "bytes": needed})
    for tokens in (300,) if small else (4096, 8192, 32768):
        for way, run in training_runs(tokens, dtype, place).items():
            seconds = timed(run, place, 5 if small else repeats)
            table.add_row(f"training, {tokens}", way, f"{seconds * 1e6:.1f}", "")
            rows.append({"training": tokens, "way": way, "seconds": seconds})
    console.print(table)
    if not small:
        waits = synchronisations(place)
        console.print(f"a decode step waits for the device {waits:.2f} times (1 reads the sampled tokens)")
        rows.append({"synchronisations_per_step": waits})
    store("gpu" if not small else "gpu_interpreter", rows, output, [], console)


if __name__ == "__main__":
    typer.run(main)
