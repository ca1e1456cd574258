"""Paired timings in one process: medians, ratios, and whether the machine was quiet."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from multiverse.evaluation.machine import machine
from rich.console import Console


def load_of_others(seconds: float = 1.0) -> float | None:
    """Share of all cores that is busy while this process sleeps; `None` where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None

    def times() -> list[int]:
        return [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:]]

    before = times()
    time.sleep(seconds)
    spent = [after - first for after, first in zip(times(), before, strict=True)]
    return 1.0 - (spent[3] + spent[4]) / max(sum(spent), 1)


def paired(runs: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 0) -> dict[str, list[float]]:
    """Wall times in seconds of each run, taken in turns so that a slow stretch of the machine hits all of them.

    Args:
        runs (`Mapping[str, Callable[[], Any]]`): what to time, by name.
        repeats (`int`): timed runs of each.
        warm_up (`int`): runs of each before, which are not counted; a caller that has made a run needs none.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-warm_up, repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Median over the pairs of how many times longer `slow` took."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def spread(values: list[float]) -> str:
    """Median and range, for a table."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def store(name: str, rows: list[dict[str, Any]], output: Path, busy: list[float | None], console: Console) -> None:
    """Writes `rows` with the machine and the load of other processes, and warns if the machine was not quiet."""
    output.mkdir(parents=True, exist_ok=True)
    known = [share for share in busy if share is not None]
    result = {
        "machine": {**machine(), "transformers": transformers.__version__},
        "busy_before_each_case": known,
        "rows": rows,
    }
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if known and max(known) > 0.1:
        console.print(f"[red]The machine was not quiet: up to {max(known):.0%} busy with something else.[/]")
