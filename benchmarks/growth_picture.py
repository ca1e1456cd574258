"""The picture of `benchmarks.growth` (it needs the extra `plots`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Series that are counts and not milliseconds, drawn on an axis of their own.
COUNTS = ("steps", "tokens")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per axis, both scales logarithmic: medians with the range of their runs, and the fitted line.

    Args:
        rows (sequence of `dict`): made by `benchmarks.growth.summarise`, at most four.
        path (`Path`): of the picture.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for axes, row in zip(panels.flat, rows, strict=False):
        counts = axes.twinx() if any(name in COUNTS for name in row["series"]) else None
        lines = []
        for number, (name, found) in enumerate(row["series"].items()):
            own = axes if name not in COUNTS or counts is None else counts
            lines += _draw_series(own, name, found, f"C{number}")
        for own, what in ((axes, "ms"), (counts, "steps, tokens")):
            if own is not None:
                own.set(ylabel=what)
                log_scales(own, row["sizes"])
        axes.set(xlabel=row["label"], title=row["axis"])
        axes.grid(visible=True, alpha=0.3)
        axes.legend(handles=lines, fontsize="x-small", loc="upper left")
    for axes in panels.flat[len(rows) :]:
        axes.set_axis_off()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def log_scales(axes: Any, sizes: Sequence[int]) -> None:
    """Makes both scales of `axes` logarithmic, with plain numbers beside them, below the `sizes` alone."""
    from matplotlib.ticker import LogLocator

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()


def _draw_series(axes: Any, name: str, found: dict[str, Any], color: str) -> list[Any]:
    """Marks and line of one cost; returns what the legend shows."""
    sizes, medians = np.array(found["sizes"]), np.array(found["medians"])
    low = medians - [min(values) for values in found["values"]]
    high = [max(values) for values in found["values"]] - medians
    low_end, high_end = found["expected"]
    expected = f"{low_end}" if low_end == high_end else f"{low_end} to {high_end}"
    label = f"{name} (expected {expected})"
    if "fit" in found:
        fit = found["fit"]
        label = f"{name}: {fit['exponent']:.2f} ± {fit['standard_error']:.2f} (expected {expected})"
        axes.plot(sizes, fit["factor"] * sizes ** fit["exponent"], "--", color=color, linewidth=1)
    style = "s" if name in COUNTS else "o"
    return [axes.errorbar(sizes, medians, [low, high], fmt=style, color=color, markersize=4, capsize=2, label=label)]
