"""Accuracy against the sequential steps that are allowed (paper, figure 7)."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
from multiverse.evaluation.intervals import share_interval

#: Most points of a curve that is derived.
POINTS = 40


def budget_curve(records: Iterable[Mapping[str, Any]], budgets: Sequence[int]) -> list[float]:
    """Share of generations that are right within every budget of sequential steps.

    Greedy decoding writes the same text whatever the budget, so a run that is cut after T steps has answered exactly
    the questions whose answer was finished by then: right, ended by the model itself, in at most T steps. For greedy
    records this is therefore what runs with these budgets would show, given that nothing which was cut off counts as
    right. Sampled texts are the same only where a generation's seed is.

    Args:
        records (iterable of `Mapping`): one per generation, made without a budget.
        budgets (sequence of `int`): values of T.
    """
    records = list(records)
    solved = [each["sequential_steps"] for each in records if each["right"] and each["finish_reason"] == "eos"]
    counts = np.searchsorted(np.sort(solved), budgets, side="right")
    return (counts / len(records)).tolist()


def derived_curve(by_question: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """`budgets`, `pass_at_1` and `intervals` of a curve that is read off greedy generations without a budget.

    Args:
        by_question (`Mapping`): records of every question.
    """
    longest = max(each["sequential_steps"] for records in by_question.values() for each in records)
    budgets = even_budgets(longest)
    shares = np.array([budget_curve(records, budgets) for records in by_question.values()])
    return {
        "budgets": budgets,
        "pass_at_1": [round(float(share), 4) for share in shares.mean(axis=0)],
        "intervals": [[round(end, 4) for end in share_interval(column)] for column in shares.T],
    }


def even_budgets(longest: int) -> list[int]:
    """At most `POINTS` budgets in round, even steps; the last is the first that lets everything finish.

    Args:
        longest (`int`): sequential steps of the longest generation.
    """
    spacings = (digit * 10**power for power in count() for digit in (1, 2, 5))
    spacing = next(each for each in spacings if longest <= each * POINTS)
    return list(range(spacing, max(longest, 1) + spacing, spacing))
