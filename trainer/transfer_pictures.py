"""Pictures of the transfer experiment (they need the extra `plots`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from multiverse.trainer.transfer_report import START, Records, budget_curve, budgets_of, by_seed

#: Updates that one point of a curve of losses stands for.
_SMOOTHED = 20


def draw_budget(answers: Mapping[str, Records], arms: Sequence[str], path: Path) -> None:
    """Accuracy against the sequential steps that are allowed, as in Figure 7 of the paper.

    Args:
        answers (`Mapping`): records by run.
        arms (sequence of `str`): names of the arms; a line is the mean of an arm's seeds, the band reaches from the
            lowest to the highest.
        path (`Path`): of the picture.
    """
    import matplotlib.pyplot as plt

    budgets = budgets_of(answers, 1)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for number, arm in enumerate(arms):
        curves = [budget_curve(records, budgets) for records in by_seed(answers, arm).values()]
        if curves:
            label = f"{arm} ({len(curves)} {'seed' if len(curves) == 1 else 'seeds'})"
            axes.plot(budgets, np.mean(curves, axis=0), color=f"C{number}", label=label)
            axes.fill_between(budgets, np.min(curves, axis=0), np.max(curves, axis=0), color=f"C{number}", alpha=0.2)
    if START in answers:
        axes.plot(budgets, budget_curve(answers[START], budgets), "k--", linewidth=1, label="start")
    axes.set(xlabel="sequential steps allowed", ylabel="share of problems solved", ylim=(0, 1))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_arms(summary: Mapping[str, Any], trainings: Mapping[str, Any], arms: Sequence[str], path: Path) -> None:
    """Accuracy, sequential steps and losses of the arms.

    Args:
        summary (`Mapping`): made by `report_on`. Error bars are its intervals over problems, dots are seeds.
        trainings (`Mapping`): records of the trainings, by run.
        arms (sequence of `str`): names of the arms.
        path (`Path`): of the picture.
    """
    import matplotlib.pyplot as plt

    figure, (accuracy, steps, losses) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    for number, arm in enumerate(arms):
        color = f"C{number}"
        for training in by_seed(trainings, arm).values():
            by_update = np.array([entry["loss_content"] for entry in training["log"]])
            parts = np.array_split(by_update, math.ceil(len(by_update) / _SMOOTHED))
            updates = np.cumsum([len(part) for part in parts])
            losses.plot(updates, [part.mean() for part in parts], color=color, linewidth=1)
        if arm not in summary["arms"]:
            continue
        pooled = summary["arms"][arm]
        share = pooled["accuracy"]
        low, high = pooled["interval_95_over_problems"]
        # Rounding may put an end on the wrong side of the mean.
        reach = [[max(share - low, 0.0)], [max(high - share, 0.0)]]
        accuracy.bar(arm, share, color=color, alpha=0.5, yerr=reach, capsize=4)
        steps.bar(arm, pooled["sequential_steps"], color=color, alpha=0.5)
        for run in by_seed(summary["runs"], arm).values():
            if "answers" in run:
                accuracy.plot(arm, run["answers"]["accuracy"], ".", color="black")
                steps.plot(arm, run["answers"]["sequential_steps"], ".", color="black")
    if START in summary["runs"]:
        answered = summary["runs"][START]["answers"]
        accuracy.axhline(answered["accuracy"], color="black", linestyle="--", linewidth=1)
        steps.axhline(answered["sequential_steps"], color="black", linestyle="--", linewidth=1)
    accuracy.set(title="accuracy (start dashed)", ylim=(0, 1))
    steps.set(title="sequential steps")
    losses.set(title=f"loss on content, means of {_SMOOTHED}", xlabel="update", yscale="log")
    for axis in (accuracy, steps, losses):
        axis.grid(visible=True, axis="y", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
