"""What a decode step costs: by live branches, and by the history of branches that have long ended.

`python -m benchmarks.step_cost`.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from multiverse.generation.engine import Engine
from rich.console import Console
from rich.table import Table

from benchmarks.measure import load_of_others, store
from benchmarks.workloads import Pair, tokens_of_paths


def step_times(pair: Pair, prompt: int, paths: int, steps: int) -> list[float]:
    """Seconds of every step in which all paths are live."""
    ids = pair.prompt(prompt, paths)
    limit, _ = tokens_of_paths(paths, steps + 2)
    found: list[float] = []
    plain = Engine._step

    def timed(engine: Engine, live: list[int]) -> None:
        start = time.perf_counter()
        plain(engine, live)
        found.append(time.perf_counter() - start)

    Engine._step = timed  # type: ignore[method-assign]
    try:
        pair.run_ours(ids, paths * (limit + 2) + 8, max_path_tokens=limit)
    finally:
        Engine._step = plain  # type: ignore[method-assign]
    return found[2 : steps + 2]


def main(
    steps: Annotated[int, typer.Option(min=5)] = 24,
    prompts: Annotated[str, typer.Option()] = "256,512,1024,2048,4096",
    paths: Annotated[str, typer.Option()] = "2,4,8,16",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Median step over prompt length and live branches, with a least-squares line over the prompt."""
    console = Console()
    pair = Pair.load()
    lengths = [int(part) for part in prompts.split(",")]
    table = Table(title=f"milliseconds per step, float32, {torch.get_num_threads()} threads")
    for column in ("paths", *(f"prompt {length}" for length in lengths), "fit"):
        table.add_column(column, justify="right")
    rows, busy = [], []
    for width in (int(part) for part in paths.split(",")):
        busy.append(load_of_others())
        medians = [1000 * statistics.median(step_times(pair, length, width, steps)) for length in lengths]
        slope, base = statistics.linear_regression(lengths, medians)
        rows.append(
            {"paths": width, "prompts": lengths, "ms": medians, "ms_per_1000_slots": 1000 * slope, "base": base}
        )
        table.add_row(str(width), *(f"{each:.1f}" for each in medians), f"{base:.1f} + {1000 * slope:.1f} per 1,000")
    console.print(table)
    store("step_cost", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
