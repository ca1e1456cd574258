"""Whether two conditions differ, by paired tests over the questions that both have answered."""

from statistics import fmean
from typing import Any

import numpy as np
from multiverse.evaluation.grouping import Questions
from multiverse.evaluation.intervals import (
    bootstrap_interval,
    bounded_interval,
    difference,
    mcnemar_test,
    ratio,
    sign_flip_test,
)

#: A difference is spoken of where chance gives one as large in fewer cases than this.
LEVEL = 0.05
NOT_SHOWN = "no difference shown"


def compare_conditions(
    first: Questions, second: Questions, first_samples: int, second_samples: int
) -> dict[str, Any] | None:
    """Accuracy, sequential steps and tokens of two conditions, over the questions that both have answered in full.

    The verdict on accuracy is that of McNemar's exact test where there is one sample per question, else of a sign-flip
    permutation test over the questions' differences of shares, at 5%. A difference that is not shown is not thereby
    absent: the interval says how large it may be. Intervals resample questions. Every comparison is tested by itself;
    of twenty comparisons of equals one is expected to show a difference.

    Args:
        first, second (`Mapping`): records by question.
        first_samples, second_samples (`int`): generations per question that were asked for.

    Returns:
        `dict`, *optional*: `questions` that were compared; `left_out`, those of either side that were not; `pass_at_1`
        with the difference (first less second) and its interval, how many questions either side does better, the test
        and its p-value; `verdict` on it; `sequential_steps` and `generated_tokens` with the ratio of means (first over
        second), its interval, and the verdict of a sign-flip test. `None` where no question is left.
    """
    common = [
        question
        for question in sorted(first.keys() & second.keys())
        if len(first[question]) == first_samples and len(second[question]) == second_samples
    ]
    if not common:
        return None
    right = _means(first, second, common, "right")
    differences = difference(right)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    single = first_samples == second_samples == 1
    p_value = mcnemar_test(better, worse) if single else sign_flip_test(differences)
    gain = fmean(differences)
    return {
        "questions": len(common),
        "left_out": len(first.keys() | second.keys()) - len(common),
        "pass_at_1": {
            "first": round(fmean(right[:, 0]), 4),
            "second": round(fmean(right[:, 1]), 4),
            "difference": _signed(gain),
            "interval_95": [_signed(end) for end in bounded_interval(differences, -1.0, 1.0)],
            "first_better": better,
            "second_better": worse,
            "test": "McNemar, exact" if single else "sign flips",
            "p_value": _significant(p_value),
        },
        "verdict": _verdict(p_value, gain, "is better"),
        "sequential_steps": _compare_lengths(_means(first, second, common, "sequential_steps")),
        "generated_tokens": _compare_lengths(_means(first, second, common, "generated_tokens")),
    }


def _means(first: Questions, second: Questions, common: list[str], field: str) -> np.ndarray:
    """Means over a question's samples, of shape `(questions, 2)`."""
    return np.array(
        [[fmean(record[field] for record in side[question]) for side in (first, second)] for question in common]
    )


def _compare_lengths(lengths: np.ndarray) -> dict[str, Any]:
    # Nothing generated counts as one, so that there is a ratio.
    lengths = np.maximum(lengths, 1.0)
    means = lengths.mean(axis=0)
    p_value = sign_flip_test(difference(lengths))
    return {
        "first": round(float(means[0]), 2),
        "second": round(float(means[1]), 2),
        "ratio": round(float(ratio(means)), 4),
        "interval_95": [round(end, 4) for end in bootstrap_interval(lengths, ratio)],
        "p_value": _significant(p_value),
        "verdict": _verdict(p_value, float(-difference(means)), "needs fewer"),
    }


def _verdict(p_value: float, gain: float, words: str) -> str:
    if p_value >= LEVEL:
        return NOT_SHOWN
    return f"{'first' if gain > 0 else 'second'} {words}"


def _significant(p_value: float) -> float:
    """With four digits, however small."""
    return float(f"{p_value:.4g}")


def _signed(value: float) -> float:
    # Without a sign for nothing.
    return round(float(value), 4) + 0.0
