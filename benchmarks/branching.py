"""What branching alone brings: parallel against one path at a time, on the same engine and the same text.

The limit is the ratio of their steps. `python -m benchmarks.branching`.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import load_of_others, paired, ratio, spread, store
from benchmarks.workloads import Pair, tokens_of_paths


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    cases: Annotated[str, typer.Option(help="paths:tokens of a path:tokens after them")] = "2:32:128,4:32:64,8:64:32",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Wall clock of a whole call, prefill included; and plain text against transformers' own loop."""
    console = Console()
    pair = Pair.load(getattr(torch, dtype))
    table = Table(title=f"parallel against one path at a time, {dtype}, {torch.get_num_threads()} threads")
    for column in ("paths", "tokens", "degree", "sequential s", "parallel s", "times faster", "of the limit"):
        table.add_column(column, justify="right")
    rows, busy = [], []
    for case in cases.split(","):
        paths, each, after = (int(part) for part in case.split(":"))
        limit, made = tokens_of_paths(paths, each)
        ids, budget = pair.prompt(200, paths), made + after + 3
        reports = {
            mode: pair.run_ours(ids, budget, max_path_tokens=limit, parallel=mode == "parallel").reports[0]
            for mode in ("parallel", "sequential")
        }
        busy.append(load_of_others())
        seconds = paired(
            {
                mode: lambda mode=mode: pair.run_ours(  # type: ignore[misc]
                    ids,  # noqa: B023
                    budget,  # noqa: B023
                    max_path_tokens=limit,  # noqa: B023
                    parallel=mode == "parallel",
                )
                for mode in ("sequential", "parallel")
            },
            repeats,
        )
        faster = ratio(seconds, "sequential", "parallel")
        bound = reports["sequential"].sequential_steps / reports["parallel"].sequential_steps
        degree = reports["parallel"].degree_of_parallelism
        rows.append(
            {
                "paths": paths,
                "tokens": reports["parallel"].generated_tokens,
                "degree": degree,
                "seconds": seconds,
                "times_faster": faster,
                "step_limit": bound,
            }
        )
        table.add_row(
            str(paths),
            str(reports["parallel"].generated_tokens),
            f"{degree:.2f}",
            spread(seconds["sequential"]),
            spread(seconds["parallel"]),
            f"{faster:.2f}",
            f"{faster / bound:.0%}",
        )
    console.print(table)
    store(f"branching_{dtype}", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
