"""Throughput of batches of parallel requests, against transformers' own batched `generate()` of as many rows.

`python -m benchmarks.batches`.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.measure import load_of_others, paired, ratio, store
from benchmarks.workloads import Pair, tokens_of_paths


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    sizes: Annotated[str, typer.Option(help="requests per batch")] = "1,2,4,8,16,32",
    paths: Annotated[int, typer.Option(min=2)] = 4,
    path_tokens: Annotated[int, typer.Option(min=1)] = 24,
    prompt: Annotated[int, typer.Option(min=1)] = 200,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Tokens per second of a whole call, prefill included."""
    console = Console()
    pair = Pair.load()
    table = Table(title=f"batches of requests of {paths} paths, float32, {torch.get_num_threads()} threads")
    for column in ("requests", "stock tokens/s", "ours tokens/s", "times faster"):
        table.add_column(column, justify="right")
    rows, busy = [], []
    limit, made = tokens_of_paths(paths, path_tokens)
    budget = made + 16 + 3
    for size in (int(part) for part in sizes.split(",")):
        ids = pair.prompt(prompt, paths).repeat(size, 1)
        reports = pair.run_ours(ids, budget, max_path_tokens=limit).reports
        tokens = reports[0].generated_tokens
        assert all(report.generated_tokens == tokens for report in reports)
        busy.append(load_of_others())
        seconds = paired(
            {
                "stock": lambda: pair.run_stock(ids, tokens),  # noqa: B023
                "ours": lambda: pair.run_ours(
                    ids,  # noqa: B023
                    budget,
                    max_path_tokens=limit,
                    return_dict_in_generate=False,
                ),
            },
            repeats,
        )
        faster = ratio(seconds, "stock", "ours")
        rates = {
            name: sorted(size * tokens / each for each in values)[repeats // 2] for name, values in seconds.items()
        }
        rows.append({"requests": size, "tokens": size * tokens, "seconds": seconds, "times_faster": faster})
        table.add_row(str(size), f"{rates['stock']:.0f}", f"{rates['ours']:.0f}", f"{faster:.2f}")
        console.print(f"{size} requests: {faster:.2f} times faster")
    console.print(table)
    store("batches", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
