"""What the bytes model predicts for branches over a shared prefix: one cache against a copy per branch.

`python -m benchmarks.decode_bytes`. A calculation, not a measurement; the tests hold the model to the loads of the
kernel.
"""

from typing import Annotated

import typer
from multiverse.kernels.bytes_model import AttentionShape, predict_branches
from rich.console import Console
from rich.table import Table


def main(
    branches: Annotated[str, typer.Option(help="Branches, comma-separated.")] = "1,2,4,8,16,32,64,128",
    prefix: Annotated[int, typer.Option(min=0, help="Slots that all branches see.")] = 8192,
    own: Annotated[int, typer.Option(min=1, help="Slots of each branch alone.")] = 256,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 28,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key-value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(min=1, max=256)] = 128,
    element_size: Annotated[int, typer.Option(help="Bytes per element, 2 or 4.")] = 2,
    processors: Annotated[int, typer.Option(min=1, help="Multiprocessors of the GPU.")] = 132,
) -> None:
    """Megabytes of one layer in one step, and how many times more batch rows move."""
    if heads % kv_heads:
        raise typer.BadParameter(f"must be a multiple of --kv-heads {kv_heads}, got {heads}", param_hint="--heads")
    if element_size not in (2, 4):
        raise typer.BadParameter(f"must be 2 or 4, got {element_size}", param_hint="--element-size")
    shape = AttentionShape(heads, kv_heads, head_dim, element_size)
    table = Table(
        title=f"MB per layer and step: prefix {prefix:,}, {own:,} slots per branch,\n"
        f"heads {heads}/{kv_heads}, head dim {head_dim}, {element_size} bytes per element"
    )
    for column in ("branches", "keys, values", "shares", "the rest", "total", "batch rows", "ratio"):
        table.add_column(column, justify="right")
    for count in (int(part) for part in branches.split(",")):
        prediction = predict_branches(count, prefix, own, shape, processors)
        paths = prediction.paths
        megabytes = (
            paths.keys_values,
            paths.shares,
            paths.total - paths.keys_values - paths.shares,
            paths.total,
            prediction.rows.total,
        )
        table.add_row(str(count), *(f"{each / 1e6:,.2f}" for each in megabytes), f"{prediction.ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
