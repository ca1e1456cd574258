"""Parallel decoding against transformers' own `generate()` on the same weights making the same number of tokens.

`python -m benchmarks.against_stock`.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from multiverse import TAGS
from rich.console import Console
from rich.table import Table

from benchmarks.measure import load_of_others, paired, ratio, spread, store
from benchmarks.workloads import Pair, tokens_of_paths

#: What step 2 of the project set out to reach, by (prompt, paths).
WANTED = {(200, 1): 1.0, (200, 2): 2.0, (200, 4): 3.6, (200, 8): 6.7, (200, 16): 11.0, (1000, 4): 3.3, (1000, 8): 5.0}


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    path_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a path beyond its header.")] = 64,
    conclusion_tokens: Annotated[int, typer.Option(min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    cases: Annotated[str, typer.Option(help="prompt:paths, separated by commas")] = ",".join(
        f"{prompt}:{paths}" for prompt, paths in WANTED
    ),
    pack: Annotated[bool, typer.Option(help="Decode on packed weights.")] = True,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Wall clock of a whole call, prefill included."""
    console = Console()
    pair = Pair.load(getattr(torch, dtype))
    table = Table(title=f"against transformers' generate(), {dtype}, {torch.get_num_threads()} threads")
    for column in ("prompt", "paths", "tokens", "steps", "stock s", "ours s", "times faster", "wanted"):
        table.add_column(column, justify="right")
    rows, busy = [], []
    for case in cases.split(","):
        prompt, paths = (int(part) for part in case.split(":"))
        limit, made = tokens_of_paths(paths, path_tokens)
        # One path forks nothing: the same number of tokens in a plain text.
        ids = pair.prompt(prompt, paths if paths > 1 else 0)
        budget = made + conclusion_tokens + 3
        first = pair.run_ours(ids, budget, max_path_tokens=limit, pack_linears=pack)
        (report,) = first.reports
        assert len(report.branches) == (paths + 1 if paths > 1 else 1), f"{TAGS[2]} did not fork"
        tokens = report.generated_tokens
        busy.append(load_of_others())
        seconds = paired(
            {
                "stock": lambda: pair.run_stock(ids, tokens),  # noqa: B023
                "ours": lambda: pair.run_ours(
                    ids,  # noqa: B023
                    budget,  # noqa: B023
                    max_path_tokens=limit,  # noqa: B023
                    pack_linears=pack,
                    return_dict_in_generate=False,
                ),
            },
            repeats,
        )
        row = {
            "prompt": prompt,
            "paths": paths,
            "tokens": tokens,
            "steps": report.sequential_steps,
            "seconds": seconds,
            "times_faster": ratio(seconds, "stock", "ours"),
            "wanted": WANTED.get((prompt, paths)),
        }
        rows.append(row)
        table.add_row(
            str(prompt),
            str(paths),
            str(tokens),
            str(report.sequential_steps),
            spread(seconds["stock"]),
            spread(seconds["ours"]),
            f"{row['times_faster']:.2f}",
            f"{row['wanted'] or '':}",
        )
        console.print(f"prompt {prompt}, {paths} paths: {row['times_faster']:.2f} times faster")
    console.print(table)
    store(f"against_stock_{dtype}", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
