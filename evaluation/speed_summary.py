"""How much faster parallel decoding was than one path at a time, from calls timed in pairs (paper, figure 8)."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, get_args

from multiverse.evaluation.settings import Mode


def summarise_speed(speed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every task, prompt, batch size and length.

    The two modes of a repeat run one after the other in one process, so `speedup` is the median of the ratios of their
    seconds, and `range` the least and the greatest; both are `None` where one mode was not timed. Everything else is a
    median by mode.

    Args:
        speed (sequence of `Mapping`): timed calls.
    """
    cells: dict[tuple[str, str, int, int | None], list[Mapping[str, Any]]] = {}
    for call in speed:
        cells.setdefault((call["task"], call["prompt"], call["batch_size"], call["length"]), []).append(call)
    # The answers' own length is none in particular, and comes last.
    order = sorted(cells, key=lambda cell: (*cell[:3], cell[3] is None, cell[3] or 0))
    return [
        {
            **dict(zip(("task", "prompt", "batch_size", "length"), cell, strict=True)),
            **_measures(cells[cell]),
        }
        for cell in order
    ]


def _measures(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # A repeat that was timed twice, before and after an interruption, counts as it was last.
    by_mode = {mode: {call["repeat"]: call for call in calls if call["mode"] == mode} for mode in get_args(Mode)}
    repeats = sorted(by_mode["parallel"].keys() & by_mode["sequential"].keys())
    ratios = [by_mode["sequential"][each]["seconds"] / by_mode["parallel"][each]["seconds"] for each in repeats]

    def medians(value: Callable[[Mapping[str, Any]], float | None]) -> dict[str, float]:
        found = {mode: [value(call) for call in own.values()] for mode, own in by_mode.items()}
        known = {mode: [each for each in own if each is not None] for mode, own in found.items()}
        return {mode: round(median(own), 6) for mode, own in known.items() if own}

    memory = [call["peak_memory_bytes"] for call in calls if call.get("peak_memory_bytes") is not None]
    return {
        "speedup": round(median(ratios), 4) if ratios else None,
        "range": [round(min(ratios), 4), round(max(ratios), 4)] if ratios else None,
        "repeats": len(repeats),
        "seconds": medians(lambda call: call["seconds"]),
        "prefill_seconds": medians(lambda call: call.get("prefill_seconds")),
        "generated_tokens": medians(lambda call: call["generated_tokens"]),
        "sequential_steps": medians(lambda call: call["sequential_steps"]),
        "tokens_per_second": medians(lambda call: call["generated_tokens"] / call["seconds"]),
        "degree_of_parallelism": medians(lambda call: call["degree_of_parallelism"]),
        "peak_memory_bytes": max(memory, default=None),
    }
