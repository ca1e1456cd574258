"""Does `torch.compile` help a decode step on a CPU? MLPs compiled with frozen weights, against weights packed by us.

Steps are filled up to static shapes, so that every size compiles once. `python -m benchmarks.compiled`.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config

from benchmarks.measure import load_of_others, paired, ratio, spread, store
from benchmarks.workloads import Pair, tokens_of_paths


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    paths: Annotated[str, typer.Option(help="paths of the block, separated by commas")] = "4,8",
    prompt: Annotated[int, typer.Option(min=1)] = 200,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Wall clock of a whole call, prefill included; compiling is timed apart, in the first call of every case."""
    # Constants are folded into the code, which is what packs the weights; one variant per layer and size.
    inductor_config.freezing = True
    dynamo_config.recompile_limit = 1024
    console = Console()
    packed, compiled = Pair.load(), Pair.load()
    for layer in compiled.ours.model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, dynamic=False)
    table = Table(title=f"compiled MLPs against packed linears, float32, {torch.get_num_threads()} threads")
    for column in ("paths", "compiling s", "plain s", "compiled s", "packed s", "compiled", "packed"):
        table.add_column(column, justify="right")
    rows, busy = [], []
    for width in (int(part) for part in paths.split(",")):
        limit, made = tokens_of_paths(width, 64)
        ids, budget = packed.prompt(prompt, width), made + 32 + 3

        def run(pair: Pair, **options: bool) -> None:
            pair.run_ours(ids, budget, max_path_tokens=limit, return_dict_in_generate=False, **options)  # noqa: B023

        start = time.perf_counter()
        run(compiled, pack_linears=False, static_shapes=True)
        compiling = time.perf_counter() - start
        run(packed)
        busy.append(load_of_others())
        seconds = paired(
            {
                "plain": lambda: run(packed, pack_linears=False),
                "compiled": lambda: run(compiled, pack_linears=False, static_shapes=True),
                "packed": lambda: run(packed),
            },
            repeats,
        )
        row = {
            "paths": width,
            "first_call_seconds": compiling,
            "seconds": seconds,
            "compiled_times_faster_than_plain": ratio(seconds, "plain", "compiled"),
            "packed_times_faster_than_plain": ratio(seconds, "plain", "packed"),
        }
        rows.append(row)
        table.add_row(
            str(width),
            f"{compiling:.0f}",
            *(spread(seconds[name]) for name in ("plain", "compiled", "packed")),
            f"{row['compiled_times_faster_than_plain']:.2f}",
            f"{row['packed_times_faster_than_plain']:.2f}",
        )
    console.print(table)
    store("compiled", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
