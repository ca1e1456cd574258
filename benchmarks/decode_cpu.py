"""Decode attention on the CPU: branches folded into the rows of one call over one cache, against the same fold of the
heads with every branch a batch row that holds its own copy of the prefix.

`python -m benchmarks.decode_cpu`. Copies need no mask and have none; what the copying itself costs is not counted.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from multiverse.kernels.folded import fold_mask, folded_attention
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import load_of_others, paired, ratio, spread, store

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def attention_runs(branches: int, prefix: int, own: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """One step of all branches by both ways, on the same numbers; each returns shape `(branches, HEADS, HEAD_DIM)`."""
    group = HEADS // KV_HEADS
    slots = prefix + branches * own
    generator = torch.Generator().manual_seed(0)
    # Tokens before heads, as the model's projections give them.
    query = torch.randn(1, branches, HEADS, HEAD_DIM, generator=generator).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, KV_HEADS, slots, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    visible = torch.zeros(branches, slots, dtype=torch.bool)
    visible[:, :prefix] = True
    for branch, sees in enumerate(visible):
        sees[prefix + branch * own : prefix + (branch + 1) * own] = True
    mask = fold_mask(visible, group, dtype)
    keys, values = (torch.cat([each[:, :, sees] for sees in visible]) for each in (key, value))
    rows = query.transpose(0, 2)

    def folded() -> torch.Tensor:
        return folded_attention(query, key, value, mask)[0]

    def copies() -> torch.Tensor:
        queries = rows.reshape(branches, KV_HEADS, group, HEAD_DIM)
        return scaled_dot_product_attention(queries, keys, values).view(branches, HEADS, HEAD_DIM)

    return {"folded": folded, "copies": copies}


def main(
    branches: Annotated[str, typer.Option(help="Branches, comma-separated.")] = "8",
    prefix: Annotated[int, typer.Option(min=1, help="Slots that all branches see.")] = 8192,
    own: Annotated[int, typer.Option(min=1, help="Slots of each branch alone.")] = 64,
    pairs: Annotated[int, typer.Option(min=7, help="Timed pairs.")] = 31,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Milliseconds of one layer's attention in one step, and how many times longer the copies take."""
    console = Console()
    table = Table(
        title=f"ms, prefix {prefix:,} and {own} slots per branch, heads {HEADS}/{KV_HEADS}, head dim {HEAD_DIM}, "
        f"{torch.get_num_threads()} threads"
    )
    for column in ("branches", "dtype", "folded", "copies", "copies / folded"):
        table.add_column(column, justify="right")
    rows, busy = [], []
    for count in (int(part) for part in branches.split(",")):
        for dtype in (torch.float32, torch.bfloat16):
            runs = attention_runs(count, prefix, own, dtype)
            torch.testing.assert_close(runs["folded"](), runs["copies"]())
            busy.append(load_of_others())
            seconds = paired(runs, pairs, warm_up=3)
            times = ratio(seconds, slow="copies", fast="folded")
            rows.append({"branches": count, "prefix": prefix, "own": own, "dtype": str(dtype), "seconds": seconds})
            milliseconds = {name: [1000 * each for each in values] for name, values in seconds.items()}
            table.add_row(
                str(count),
                str(dtype).removeprefix("torch."),
                spread(milliseconds["folded"]),
                spread(milliseconds["copies"]),
                f"{times:.2f}",
            )
            rows[-1] |= {"median_ratio": times, "median_ms": statistics.median(milliseconds["folded"])}
    console.print(table)
    store("decode_cpu", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
