"""Intervals and tests over questions: brute force, scipy, and how often they ought to be wrong."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse.evaluation.intervals import (
    bootstrap_interval,
    bounded_interval,
    difference,
    mcnemar_test,
    ratio,
    share_interval,
    sign_flip_test,
    wilson_interval,
)
from scipy import stats


@given(trials=st.integers(1, 400), share=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_wilsons_ends_are_the_shares_that_a_score_test_just_does_not_reject(trials, share):
    successes = round(share * trials)
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            score = (successes / trials - end) / math.sqrt(end * (1 - end) / trials)
            assert abs(score) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("successes", "trials"), [(3, 0), (-1, 5), (6, 5)])
def test_counts_that_are_no_share_are_refused(successes, trials):
    with pytest.raises(ValueError, match="`successes`"):
        wilson_interval(successes, trials)


def test_one_sample_per_question_gives_wilsons_interval():
    assert share_interval([1, 0, 1, 1]) == wilson_interval(3, 4)
    # And so do samples that all agree: they are no more than one each.
    assert share_interval([0.0] * 30) == wilson_interval(0, 30)
    assert share_interval([0.0] * 30)[1] > 0.1


def test_shares_between_are_resampled_by_question():
    shares = [0.0, 0.25, 0.5, 1.0, 0.75, 0.5]
    resampled = stats.bootstrap((shares,), np.mean, method="percentile", n_resamples=20_000, rng=1)
    low, high = resampled.confidence_interval
    assert share_interval(shares) == pytest.approx((low, high), abs=0.02)
    assert share_interval(shares) == share_interval(shares)


def test_questions_that_are_all_alike_do_not_make_certain():
    unseen = wilson_interval(0, 20)[1]
    assert bounded_interval([0.0] * 20, -1, 1) == pytest.approx((-unseen, unseen))
    assert bounded_interval([1.0] * 20, -1, 1) == pytest.approx((1 - 2 * unseen, 1))
    low, high = bounded_interval([0.5] * 20, 0, 1)
    assert (low, high) == pytest.approx((0.5 - unseen / 2, 0.5 + unseen / 2))
    # One that differs, and they are resampled.
    assert bounded_interval([0.0] * 19 + [1.0], -1, 1)[0] == 0.0


@pytest.mark.parametrize("interval", [share_interval, lambda values: bounded_interval(values, 0, 1)])
def test_no_question_gives_no_interval(interval):
    with pytest.raises(ValueError, match="`values` is empty"):
        interval([])


def test_large_tasks_are_drawn_in_portions_with_the_same_outcome():
    values = np.random.default_rng(3).random((6_000, 1))
    rows = np.random.default_rng(0).integers(6_000, size=(1_000, 6_000))
    low, high = np.quantile(values[rows].mean(axis=(1, 2)), [0.025, 0.975])
    assert bootstrap_interval(values, lambda means: means[:, 0], draws=1_000) == pytest.approx((low, high), abs=1e-12)


def test_pairs_stay_together_in_ratios_and_differences():
    second = np.random.default_rng(0).random(25) + 1
    pairs = np.stack([3 * second, second], axis=1)
    assert bootstrap_interval(pairs, ratio) == pytest.approx((3, 3))
    pairs = np.stack([second + 0.25, second], axis=1)
    assert bootstrap_interval(pairs, difference) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("samples", [1, 8])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(samples):
    """Thirty questions, as in AIME, whose chances to be solved are drawn around 0.6, most of them near 0 or 1."""
    rng = np.random.default_rng(11)
    rounds, held = 300, 0
    for _ in range(rounds):
        chances = rng.beta(0.6, 0.4, size=30)
        low, high = share_interval(rng.binomial(samples, chances) / samples)
        held += low <= 0.6 <= high
    # 95% is meant; were it so, fewer than 90% of 300 rounds would come about once in 8,000 such tests.
    assert held / rounds >= 0.90
    assert held < rounds, "or it is wider than it needs to be"


def test_generations_taken_for_units_would_miss_the_truth():
    """What the cluster is for: Wilson's interval of 240 generations is far too narrow for 30 questions."""
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(300):
        right = rng.binomial(8, rng.beta(0.6, 0.4, size=30)).sum()
        low, high = wilson_interval(int(right), 240)
        held += low <= 0.6 <= high
    assert held / 300 < 0.75


def flips(differences):
    """Both-sided share of sign assignments whose sum is as far from 0, by counting all of them."""
    observed = abs(sum(differences))
    sums = [
        abs(sum(sign * each for sign, each in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(each >= observed - 1e-9 for each in sums) / len(sums)


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_sign_flips_count_all_assignments(eighths):
    differences = [each / 8 for each in eighths]
    # Questions without a difference are tried with both signs here, and change nothing.
    assert sign_flip_test(differences) == pytest.approx(flips(differences), abs=1e-12)


def test_sixteen_differences_are_counted_and_more_are_drawn():
    differences = np.random.default_rng(5).normal(0.3, 1, size=16)
    signs = np.array(list(product((1, -1), repeat=16)))
    exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
    assert sign_flip_test(differences) == pytest.approx(exact, abs=1e-12)
    many = np.random.default_rng(6).choice([-1.0, 1.0], p=[0.4, 0.6], size=100)
    exact = stats.binomtest(int((many > 0).sum()), 100).pvalue
    # Ten thousand draws: four standard errors.
    assert sign_flip_test(many) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9_999) + 1e-4)
    assert sign_flip_test(many) == sign_flip_test(many)


@given(st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_mcnemar_by_its_definition_and_as_a_sign_flip(first_only, second_only):
    differing = first_only + second_only
    # Both tails of heads among as many throws of a coin.
    tail = sum(math.comb(differing, heads) for heads in range(max(first_only, second_only), differing + 1))
    expected = min(1.0, 2 * tail / 2**differing)
    assert mcnemar_test(first_only, second_only) == pytest.approx(expected, abs=1e-12)
    if differing <= 16:
        flipped = sign_flip_test([1.0] * first_only + [-1.0] * second_only + [0.0] * 3)
        assert flipped == pytest.approx(expected, abs=1e-12)


def test_mcnemar_worked_by_hand():
    # Six to none: 2 / 64. Nine to one: 2 * (1 + 10) / 1024.
    assert mcnemar_test(6, 0) == pytest.approx(0.03125)
    assert mcnemar_test(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar_test(0, 0) == 1.0


def test_equals_are_told_apart_in_no_more_than_five_percent():
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(200):
        chances = rng.beta(0.6, 0.4, size=12)
        first, second = (rng.binomial(4, chances) / 4 for _ in range(2))
        wrong += sign_flip_test(first - second) < 0.05
    # 5% of 200 is 10, and 20 or more would come about once in 400 such tests.
    assert wrong < 20
