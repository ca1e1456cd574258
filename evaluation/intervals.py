"""Confidence intervals and paired tests where the units are questions.

Generations that answer the same question are no independent draws, so questions are resampled, with everything that
was answered to them. What is said thereby is how far other questions of the kind would have moved a figure; nothing is
said of other training seeds or other prompts. All functions are deterministic. Those that need scipy (the extra
`evaluate` or `demo`) import it when they are called.
"""

from collections.abc import Callable, Sequence

import numpy as np

#: Most questions with a difference for which every assignment of signs is tried.
EXACT = 16
_RESAMPLES = 9_999


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95% confidence interval of a share (Wilson score).

    Raises:
        ValueError: if the counts are those of no share.
    """
    from scipy.stats import binomtest

    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"`successes` must lie in [0, trials] with `trials` > 0, got {successes} of {trials}.")
    low, high = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return float(low), float(high)


def bootstrap_interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of a statistic of means over questions, when questions are drawn anew.

    Args:
        values (`np.ndarray` of shape `(questions, quantities)`): what is averaged; a row is drawn as a whole.
        statistic (`Callable`): from means of shape `(draws, quantities)` to `(draws,)`.
        draws (`int`): resampled sets of questions.
        seed (`int`): same seed, same interval.
    """
    rng = np.random.default_rng(seed)
    # In portions: a draw of every question is several GB for a large task.
    portion = max(1, 2_000_000 // max(values.size, 1))
    sizes = [min(portion, draws - start) for start in range(0, draws, portion)]
    means = [values[rng.integers(len(values), size=(size, len(values)))].mean(axis=1) for size in sizes]
    low, high = np.quantile(statistic(np.concatenate(means)), [0.025, 0.975])
    return float(low), float(high)


def difference(means: np.ndarray) -> np.ndarray:
    """First quantity less the second, from means of shape `(..., 2)`."""
    return means[..., 0] - means[..., 1]


def ratio(means: np.ndarray) -> np.ndarray:
    """First quantity over the second, from means of shape `(..., 2)`."""
    return means[..., 0] / means[..., 1]


def bounded_interval(values: Sequence[float] | np.ndarray, lowest: float, highest: float) -> tuple[float, float]:
    """95% interval of the mean over questions of something that has bounds.

    The bootstrap's, unless all questions have the same value. Then drawing them anew shows nothing, and a point would
    claim certainty: instead, as many other questions as Wilson's interval allows for, none having been seen among so
    many, are granted to lie at either bound.

    Args:
        values (sequence of `float`): one per question.
        lowest, highest (`float`): bounds of a value.

    Raises:
        ValueError: if there are no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("`values` is empty. An interval needs at least one question.")
    if np.ptp(values) > 0:
        return bootstrap_interval(values[:, None], lambda means: means[:, 0])
    constant, unseen = float(values[0]), wilson_interval(0, len(values))[1]
    return constant + unseen * (lowest - constant), constant + unseen * (highest - constant)


def share_interval(shares: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """95% interval of the mean over questions of a share that is right.

    Wilson's where every question is right or wrong as a whole, as it is with one sample each; else the bootstrap's
    over questions.

    Args:
        shares (sequence of `float`): one per question, in [0, 1].
    """
    values = np.asarray(shares, float)
    if len(values) and np.isin(values, (0.0, 1.0)).all():
        return wilson_interval(int(values.sum()), len(values))
    return bounded_interval(values, 0.0, 1.0)


def mcnemar_test(first_only: int, second_only: int) -> float:
    """Two-sided p-value of McNemar's exact test.

    Args:
        first_only (`int`): questions that only the first has right.
        second_only (`int`): and only the second.
    """
    from scipy.stats import binomtest

    differing = first_only + second_only
    return float(binomtest(first_only, differing).pvalue) if differing else 1.0


def sign_flip_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of a paired permutation test: how often the mean would lie as far from 0 if, for every
    question, it were chance which of the two came first.

    All assignments are tried where at most `EXACT` questions differ, else 9,999 drawn with a fixed seed. For
    differences of 1 and -1 it is McNemar's test.

    Args:
        differences (sequence of `float`): first less second, one per question.
    """
    from scipy.stats import permutation_test

    # The sign of nothing changes nothing.
    values = np.asarray(differences, float)
    values = values[values != 0]
    if len(values) < 2:
        return 1.0
    result = permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**EXACT if len(values) <= EXACT else _RESAMPLES,
        batch=1_000,
        rng=0,
    )
    return float(result.pvalue)
