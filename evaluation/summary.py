"""What a run shows, from its records: accuracy, parallelism, structure and times by condition, as `summary.json`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean, median
from typing import Any

from multiverse.evaluation.budget_curves import derived_curve
from multiverse.evaluation.compare import compare_conditions
from multiverse.evaluation.grouping import Questions, Record, asked_conditions, by_condition
from multiverse.evaluation.intervals import share_interval
from multiverse.evaluation.majority import majority_vote
from multiverse.evaluation.run_folder import SCHEMA_VERSION
from multiverse.evaluation.settings import Condition
from multiverse.evaluation.speed_summary import summarise_speed


def summarise_run(
    settings: Mapping[str, Any],
    tasks: Mapping[str, Mapping[str, Any]],
    records: Sequence[Record],
    speed: Sequence[Record] = (),
    sessions: Sequence[Record] = (),
    missing: int = 0,
) -> dict[str, Any]:
    """The summary of a run. The same records give the same summary, in whatever order they come.

    Args:
        settings (`Mapping`): as `EvaluationSettings.to_dict` gives them.
        tasks (`Mapping`): what is known of the tasks, by name; `samples` is looked at.
        records (sequence of `Mapping`): generations.
        speed (sequence of `Mapping`): timed calls.
        sessions (sequence of `Mapping`): starts of processes, passed on as they are.
        missing (`int`): generations that are not there yet.

    Returns:
        `dict`: plain values for JSON. Times stand under `times`, `speed` and `sessions` alone.

    Raises:
        ValueError: if a record is of no condition of the settings, or there is none.
    """
    found = by_condition(records)
    order = asked_conditions(settings)
    strange = sorted(condition.label() for condition in found.keys() - set(order))
    if strange:
        raise ValueError(f"`records` hold conditions that the settings lack: {'; '.join(strange)}.")
    if not found:
        raise ValueError("`records` is empty. Generate answers first, with `multiverse evaluate run`.")
    groups = {condition: found[condition] for condition in order if condition in found}
    samples = {condition: int(tasks[condition.task]["samples"]) for condition in groups}
    return {
        "schema_version": SCHEMA_VERSION,
        "settings": dict(settings),
        "tasks": {name: dict(facts) for name, facts in tasks.items()},
        "missing": missing,
        "conditions": [
            {**asdict(condition), **summarise_condition(questions, samples[condition])}
            for condition, questions in groups.items()
        ],
        "comparisons": [
            {"first": asdict(first), "second": asdict(second), **compared}
            for first, second in combinations(groups, 2)
            if _differ_in_one(first, second)
            and (compared := compare_conditions(groups[first], groups[second], samples[first], samples[second]))
        ],
        "budget_curves": _budget_curves(groups, greedy=not settings.get("do_sample", False)),
        "speed": summarise_speed(speed),
        "sessions": [dict(session) for session in sessions],
    }


def summarise_condition(questions: Questions, samples: int) -> dict[str, Any]:
    """Figures of one condition.

    `pass_at_1` is the mean over questions of the share of right samples, `degree_of_parallelism` the mean of the
    generations' own (the paper's "# parallel"), `total_tokens_per_step` tokens over steps in sum, `valid_structure`
    the share that ended of itself and is well-formed. Means are over generations.

    Args:
        questions (`Mapping`): records by question.
        samples (`int`): generations per question that were asked for.
    """
    records = [record for rows in questions.values() for record in rows]
    shares = [fmean(record["right"] for record in rows) for rows in questions.values()]
    blocks, paths = (sum(record[name] for record in records) for name in ("blocks", "paths"))
    steps = sum(record["sequential_steps"] for record in records)

    def mean(value: Callable[[Record], float], digits: int = 4) -> float:
        return round(fmean(value(record) for record in records), digits)

    return {
        "questions": len(questions),
        "generations": len(records),
        "samples": samples,
        "right": sum(record["right"] for record in records),
        "pass_at_1": round(fmean(shares), 4),
        "pass_at_1_interval_95": _rounded(share_interval(shares)),
        "majority": _majority(questions, samples) if samples > 1 else None,
        "generated_tokens": mean(lambda record: record["generated_tokens"], 2),
        "sequential_steps": mean(lambda record: record["sequential_steps"], 2),
        "degree_of_parallelism": mean(lambda record: record["degree_of_parallelism"]),
        "total_tokens_per_step": round(sum(record["generated_tokens"] for record in records) / max(steps, 1), 4),
        "valid_structure": mean(lambda record: not record["problems"] and record["finish_reason"] == "eos"),
        "with_blocks": mean(lambda record: record["blocks"] > 0),
        "blocks": mean(lambda record: record["blocks"]),
        "paths": mean(lambda record: record["paths"]),
        "paths_per_block": round(paths / blocks, 4) if blocks else None,
        "depth": mean(lambda record: record["depth"]),
        "deepest": max(record["depth"] for record in records),
        "problems": _counts(kind for record in records for kind in record["problems"]),
        "finish_reasons": _counts(record["finish_reason"] for record in records),
        "path_finish_reasons": _sums(record["path_finish_reasons"] for record in records),
        "reasons": _counts(record["reason"] for record in records),
        "tokens_by_stage": _means(record["tokens_by_stage"] for record in records),
        "times": _times(records),
    }


def _majority(questions: Questions, samples: int) -> dict[str, Any]:
    votes = [majority_vote(records) for records in questions.values()]
    return {"k": samples, "value": round(fmean(votes), 4), "interval_95": _rounded(share_interval(votes))}


def _times(records: Sequence[Record]) -> dict[str, Any]:
    """Means by stage, medians of the others. What nobody has measured, as with a plain model, is `None`.

    A step's time leaves out the prefill.
    """
    times = [record["times"] for record in records]
    steps = [
        (sum(record["times"]["seconds"].values()) - record["times"]["seconds"].get("prefill", 0.0))
        / record["sequential_steps"]
        for record in records
        if record["times"].get("seconds") and record["sequential_steps"]
    ]
    memory = [each["peak_memory_bytes"] for each in times if each.get("peak_memory_bytes") is not None]
    return {
        "seconds": _means((each["seconds"] for each in times if each.get("seconds")), 6),
        "first_token_seconds": _median(each.get("first_token_seconds") for each in times),
        "seconds_per_token": _median(each.get("seconds_per_token") for each in times),
        "seconds_per_step": _median(steps),
        "peak_memory_bytes": max(memory, default=None),
    }


def _differ_in_one(first: Condition, second: Condition) -> bool:
    """Whether mode or prompt is all that differs."""
    values, others = asdict(first), asdict(second)
    return [name for name in values if values[name] != others[name]] in (["mode"], ["prompt"])


def _budget_curves(groups: Mapping[Condition, Questions], greedy: bool) -> list[dict[str, Any]]:
    """Curves that were measured, by running with budgets, and those that greedy runs without one imply.

    Where no limit is among what was measured, it is the last point, with budget `None`.
    """
    curves: list[dict[str, Any]] = []
    for task, prompt, mode in dict.fromkeys((each.task, each.prompt, each.mode) for each in groups):
        arm = {"task": task, "prompt": prompt, "mode": mode}
        own = {each.budget: each for each in groups if (each.task, each.prompt, each.mode) == (task, prompt, mode)}
        limits = sorted(budget for budget in own if budget is not None)
        if limits:
            measured = [groups[own[budget]] for budget in (*limits, *([None] if None in own else []))]
            shares = [[fmean(row["right"] for row in rows) for rows in questions.values()] for questions in measured]
            curves.append(
                {
                    **arm,
                    "budgets": [*limits, *([None] if None in own else [])],
                    "pass_at_1": [round(fmean(each), 4) for each in shares],
                    "intervals": [_rounded(share_interval(each)) for each in shares],
                    "derived": False,
                }
            )
        if None in own and greedy:
            curves.append({**arm, **derived_curve(groups[own[None]]), "derived": True})
    return curves


def _counts(values: Iterable[Any]) -> dict[str, int]:
    return dict(sorted(Counter(map(str, values)).items()))


def _sums(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _means(values: Iterable[Mapping[str, float]], digits: int = 2) -> dict[str, float]:
    """Means by name, in the order in which names first come; a value that lacks a name has 0 of it."""
    rows = list(values)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(fmean(row.get(name, 0.0) for row in rows), digits) for name in names}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 6) if known else None


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in values]
