"""What branching alone brings: parallel against one path at a time, on the same engine and the same text.

The limit is the ratio of their steps. It cannot be reached by a whole call, as both modes spend the same time on the
prompt; so decode steps are also compared by themselves. `python -m benchmarks.branching`.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from multiverse.generation.report import RequestReport
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
    """Wall clock of a whole call, prefill included, and of its decode steps."""
    console = Console()
    pair = Pair.load(getattr(torch, dtype))
    table = Table(title=f"parallel against one path at a time, {dtype}, {torch.get_num_threads()} threads")
    columns = ["paths", "tokens", "degree", "sequential s", "parallel s", "times faster", "of the limit"]
    for column in [*columns, "decode steps", "of the limit"]:
        table.add_column(column, justify="right")
    rows, busy = [], []
    for case in cases.split(","):
        paths, each, after = (int(part) for part in case.split(":"))
        limit, made = tokens_of_paths(paths, each)
        ids, budget = pair.prompt(200, paths), made + after + 3
        reports: dict[str, list[RequestReport]] = {"sequential": [], "parallel": []}

        def run(mode: str) -> None:
            output = pair.run_ours(ids, budget, max_path_tokens=limit, parallel=mode == "parallel")  # noqa: B023
            reports[mode].append(output.reports[0])  # noqa: B023

        for mode in reports:
            run(mode)
        busy.append(load_of_others())
        seconds = paired({mode: partial(run, mode) for mode in reports}, repeats)
        decoding = {
            mode: [sum(report.seconds.values()) - report.seconds["prefill"] for report in of_mode[1:]]
            for mode, of_mode in reports.items()
        }
        faster = ratio(seconds, "sequential", "parallel")
        decode_faster = ratio(decoding, "sequential", "parallel")
        parallel = reports["parallel"][0]
        bound = reports["sequential"][0].sequential_steps / parallel.sequential_steps
        rows.append(
            {
                "paths": paths,
                "tokens": parallel.generated_tokens,
                "degree": parallel.degree_of_parallelism,
                "seconds": seconds,
                "decode_seconds": decoding,
                "times_faster": faster,
                "decode_times_faster": decode_faster,
                "step_limit": bound,
            }
        )
        table.add_row(
            str(paths),
            str(parallel.generated_tokens),
            f"{parallel.degree_of_parallelism:.2f}",
            spread(seconds["sequential"]),
            spread(seconds["parallel"]),
            f"{faster:.2f}",
            f"{faster / bound:.0%}",
            f"{decode_faster:.2f}",
            f"{decode_faster / bound:.0%}",
        )
    console.print(table)
    store(f"branching_{dtype}", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
