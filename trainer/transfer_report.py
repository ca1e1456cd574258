"""What the transfer experiment shows, from the small records of its runs: every problem's answer in a line.

Arms answer the same problems, and an arm answers them once per seed, so answers are not independent draws. Intervals
of differences and ratios therefore resample problems: what was answered to a problem is drawn together, in all arms
and seeds. They say what other problems would have changed, and nothing of seeds that were not run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from multiverse.evaluation.budget_curves import budget_curve
from multiverse.evaluation.intervals import bootstrap_interval, difference, ratio
from multiverse.trainer.held_out import summarise

START = "start"
Records = list[dict[str, Any]]


def read_answers(folder: Path, problems: int, start: Path | None = None) -> tuple[dict[str, Records], list[str]]:
    """Records by run, and in words which files lack problems; those are left out.

    Args:
        folder (`Path`): of the records, `ARM-SEED.jsonl`.
        problems (`int`): how many a whole file answers.
        start (`Path`, *optional*): file of the start's records, which are not read where it does not exist.
    """
    answers, incomplete = {}, []
    paths = {START: start} if start is not None and start.is_file() else {}
    paths |= {path.stem: path for path in folder.glob("*.jsonl")}
    for name, path in sorted(paths.items()):
        records = sorted(map(json.loads, path.read_text().splitlines()), key=lambda record: record["problem"])
        if [record["problem"] for record in records] == list(range(problems)):
            answers[name] = records
        else:
            incomplete.append(f"{name}: answers ({len(records)} of {problems})")
    return answers, incomplete


def read_trainings(folder: Path) -> dict[str, dict[str, Any]]:
    """What was recorded of trainings, by run."""
    suffix = "_training"
    files = sorted(folder.glob(f"*{suffix}.json"))
    return {path.stem.removesuffix(suffix): json.loads(path.read_text()) for path in files}


def by_seed(runs: Mapping[str, Any], arm: str) -> dict[int, Any]:
    """What belongs to the runs of an arm, by seed."""
    named = {name.rpartition("-"): run for name, run in runs.items()}
    return dict(sorted((int(seed), run) for (of, _, seed), run in named.items() if of == arm))


def budgets_of(answers: Mapping[str, Records], spacing: int) -> list[int]:
    """Budgets from 0 until every answer is finished."""
    longest = max(record["sequential_steps"] for records in answers.values() for record in records)
    return list(range(0, longest + spacing, spacing))


def compare(first: Mapping[int, Records], second: Mapping[int, Records]) -> dict[str, Any]:
    """Accuracy of the first minus that of the second, and the ratio of their steps, over the seeds that both have.

    Args:
        first (`Mapping`), second (`Mapping`): records by seed.
    """
    seeds = sorted(first.keys() & second.keys())
    # Seeds are averaged first: (arms, problems) each.
    right, steps = (
        np.array([[[each[field] for each in arm[seed]] for seed in seeds] for arm in (first, second)], float)
        for field in ("right", "sequential_steps")
    )
    paired_right, paired_steps = right.mean(axis=1).T, steps.mean(axis=1).T

    return {
        "seeds": seeds,
        "accuracy_difference": round(float(difference(paired_right.mean(axis=0))), 4),
        "interval_95": _rounded(bootstrap_interval(paired_right, difference)),
        "accuracy_difference_by_seed": _rounded(right[0].mean(axis=1) - right[1].mean(axis=1)),
        "steps_ratio": round(float(ratio(paired_steps.mean(axis=0))), 4),
        "steps_ratio_interval_95": _rounded(bootstrap_interval(paired_steps, ratio)),
    }


def training_facts(training: Mapping[str, Any]) -> dict[str, Any]:
    """Updates, tokens and time of a run; `timed_updates` is less than `updates` where a session was killed."""
    sessions = training["sessions"]
    machines = [session["machine"] for session in sessions]
    return {
        "updates": training["updates"],
        "tokens": training["tokens"],
        "seconds": round(sum(session["seconds"] for session in sessions), 1),
        "processor_seconds": round(sum(session["processor_seconds"] for session in sessions), 1),
        "timed_updates": sum(session["to_update"] - session["from_update"] for session in sessions),
        "machines": [each for number, each in enumerate(machines) if each not in machines[:number]],
        "start_sha256": training["start_sha256"],
    }


def report_on(
    folder: Path, arms: Sequence[str], seeds: Sequence[int], problems: int, start: Path | None = None
) -> dict[str, Any]:
    """Everything that the records in `folder` show, and which of the expected runs are missing.

    Args:
        folder (`Path`): of the records.
        arms (sequence of `str`): names of the arms; every one is compared with `"sequential"` and with the start.
        seeds (sequence of `int`): expected seeds; others that are there count as well.
        problems (`int`): how many every run answers.
        start (`Path`, *optional*): file of the start's records.

    Raises:
        ValueError: if no run has answered all problems.
    """
    answers, missing = read_answers(folder, problems, start)
    if not answers:
        raise ValueError(
            f"`results`: {folder} holds no run with answers to {problems} problems. Make one with "
            "`python -m multiverse.trainer.transfer answer`."
        )
    trainings = read_trainings(folder)
    expected = [f"{arm}-{seed}" for seed in seeds for arm in arms]
    incomplete = {line.partition(":")[0] for line in missing}
    missing += [f"{name}: answers" for name in [START, *expected] if name not in answers.keys() | incomplete]
    missing += [f"{name}: training" for name in expected if name not in trainings]
    runs = {
        name: {
            **({"answers": summarise(answers[name])} if name in answers else {}),
            **({"training": training_facts(trainings[name])} if name in trainings else {}),
        }
        for name in sorted(answers.keys() | trainings.keys())
    }
    found = {arm: by_seed(answers, arm) for arm in arms}
    budgets = budgets_of(answers, 20)
    pooled = {}
    for arm, of_seed in found.items():
        if of_seed:
            right = np.array([[record["right"] for record in records] for records in of_seed.values()], float)
            over_problems = bootstrap_interval(right.mean(axis=0)[:, None], lambda means: means[:, 0])
            pooled[arm] = {
                "seeds": list(of_seed),
                **summarise(record for records in of_seed.values() for record in records),
                # `interval_95` takes every answer for a draw of its own; this one does not.
                "interval_95_over_problems": _rounded(over_problems),
                "solved_within_steps": _mean_curve(of_seed.values(), budgets),
            }
    others: dict[str, dict[int, Records]] = {"sequential": found.get("sequential", {})}
    if START in answers:
        others[START] = {seed: answers[START] for of_seed in found.values() for seed in of_seed}
    return {
        "problems": problems,
        "missing": sorted(missing),
        "runs": runs,
        "arms": pooled,
        "comparisons": {
            f"{arm} - {other}": compare(found[arm], against)
            for other, against in others.items()
            for arm in arms
            if arm != other and found[arm].keys() & against.keys()
        },
    }


def _mean_curve(runs: Iterable[Records], budgets: Sequence[int]) -> dict[str, float]:
    curve = np.mean([budget_curve(records, budgets) for records in runs], axis=0)
    return {str(budget): round(float(share), 4) for budget, share in zip(budgets, curve, strict=True)}


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 4) for value in values]
