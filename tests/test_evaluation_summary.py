"""The summary of a run against figures worked out by hand, and against its definitions."""

import json
import random
from statistics import fmean

import pytest
from decoding import FORK_AND_END, decode, real_tokens
from evaluated_records import answers, marks, record, settings, tasks
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from multiverse.evaluation.budget_curves import POINTS, budget_curve, even_budgets
from multiverse.evaluation.intervals import share_interval, wilson_interval
from multiverse.evaluation.majority import majority_vote
from multiverse.evaluation.speed_summary import summarise_speed
from multiverse.evaluation.summary import summarise_run
from tiny import WORDS, tiny_model


def only(summary):
    (condition,) = summary["conditions"]
    return condition


def rounded(interval):
    return [round(end, 4) for end in interval]


def test_a_condition_worked_by_hand():
    records = [
        record("a", True, 100, generated_tokens=300, degree_of_parallelism=3.0, blocks=2, paths=5, depth=2),
        record("b", False, 50, degree_of_parallelism=2.0, problems=["empty goal", "empty goal"], reason="wrong"),
        record("c", True, 10, generated_tokens=10, degree_of_parallelism=1.0, blocks=0, paths=0, depth=0),
        record(
            "d", False, 40, finish_reason="length", reason="unfinished", path_finish_reasons={"closed": 1, "eos": 1}
        ),
    ]
    found = only(summarise_run(settings(), tasks(4), records))
    assert (found["task"], found["prompt"], found["mode"], found["budget"]) == ("sums", "parallel", "parallel", None)
    assert (found["questions"], found["generations"], found["samples"], found["right"]) == (4, 4, 1, 2)
    assert found["pass_at_1"] == 0.5
    assert found["pass_at_1_interval_95"] == rounded(wilson_interval(2, 4))
    assert found["majority"] is None
    assert found["generated_tokens"] == (300 + 100 + 10 + 80) / 4
    assert found["sequential_steps"] == 50
    assert found["degree_of_parallelism"] == (3 + 2 + 1 + 2) / 4
    assert found["total_tokens_per_step"] == round(490 / 200, 4)
    # One is malformed, and one has not ended.
    assert found["valid_structure"] == 0.5
    assert found["with_blocks"] == 0.75
    assert (found["blocks"], found["paths"], found["paths_per_block"]) == (1.0, 9 / 4, 9 / 4)
    assert (found["depth"], found["deepest"]) == (1.0, 2)
    assert found["problems"] == {"empty goal": 2}
    assert found["finish_reasons"] == {"eos": 3, "length": 1}
    assert found["path_finish_reasons"] == {"closed": 7, "eos": 1}
    assert found["reasons"] == {"right": 2, "unfinished": 1, "wrong": 1}
    assert found["tokens_by_stage"] == dict.fromkeys(("sequential", "map", "process", "reduce"), 25.0)
    times = found["times"]
    assert times["seconds"] == {"prefill": 1.0, "sequential": 0.25, "map": 0.25, "process": 0.25, "reduce": 0.25}
    # A second without the prefill, over 100, 50, 10 and 40 steps.
    assert times["seconds_per_step"] == (0.02 + 0.025) / 2
    assert times["peak_memory_bytes"] is None


def test_a_plain_model_has_no_blocks_and_no_times_by_stage():
    times = {"seconds": None, "first_token_seconds": None, "seconds_per_token": None, "peak_memory_bytes": 7}
    records = [
        record("a", blocks=0, paths=0, depth=0, times=times),
        record("b", times={**times, "peak_memory_bytes": 9}),
    ]
    found = only(summarise_run(settings(), tasks(2), records[:1]))
    assert found["paths_per_block"] is None
    assert found["times"] == {
        "seconds": {},
        "first_token_seconds": None,
        "seconds_per_token": None,
        "seconds_per_step": None,
        "peak_memory_bytes": 7,
    }
    assert only(summarise_run(settings(), tasks(2), records))["times"]["peak_memory_bytes"] == 9


def test_questions_are_the_units_where_they_are_sampled_several_times():
    asked = settings(do_sample=True, samples=4)
    records = answers(["1111", "1000", "0000", "1100"])
    found = only(summarise_run(asked, tasks(4, samples=4), records))
    assert (found["right"], found["generations"], found["pass_at_1"]) == (7, 16, round(7 / 16, 4))
    assert found["pass_at_1_interval_95"] == rounded(share_interval([1, 0.25, 0, 0.5]))
    # Wrong ones all say the same: a vote of one to three is lost, one of two to two is worth a half.
    assert found["majority"] == {"k": 4, "value": 1.5 / 4, "interval_95": rounded(share_interval([1, 0, 0, 0.5]))}
    # A question that lacks generations counts as much as the others.
    left = only(summarise_run(asked, tasks(4, samples=4), records[:-3], missing=3))
    assert left["pass_at_1"] == round((1 + 0.25 + 0 + 1) / 4, 4)


@pytest.mark.parametrize(
    ("said", "right", "value"),
    [
        (["1/2", "0.5", r"\frac{1}{2}", "3", "3"], "11100", 1),
        (["3", "3", "1/2", "0.5", r"$\frac12$"], "00000", 0),
        (["7", "7", "8", None, None, None], "110000", 1),
        (["7", "8", "8"], "100", 0),
        (["7", "8"], "10", 0.5),
        (["7", "8", "9", None], "1000", 1 / 3),
        # Two wordings of the wrong answer are one, and win.
        (["7", "7", "1/2", "0.5", r"\frac{1}{2}"], "11000", 0),
        (["B", "b", "(C)", "C", "C"], "11000", 0),
        # The same answer once cut off, so not right, is a vote for it all the same.
        (["7", "7", "8", "8", "8"], "10000", 0),
        (["7", "7", "7", "8", "8"], "10000", 1),
        # The judge took both for right, though no text shows it.
        (["the first", "number one", "2"], "110", 1),
        ([None, None], "00", 0),
    ],
)
def test_a_vote(said, right, value):
    votes = [
        {"answer": answer, "right": mark == "1", "sample": number}
        for number, (answer, mark) in enumerate(zip(said, right, strict=True))
    ]
    assert majority_vote(votes) == pytest.approx(value)
    assert majority_vote(votes[::-1]) == pytest.approx(value)


@given(st.lists(st.sampled_from(["1", "2", "3", "4", None]), min_size=1, max_size=9), st.sampled_from("1234"))
@limits(max_examples=80, deadline=None)
def test_a_vote_is_the_mean_over_everything_a_draw_among_winners_may_give(said, expected):
    counts = {answer: said.count(answer) for answer in said if answer is not None}
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    outcomes = [answer == expected for answer in winners] or [False]
    votes = [{"answer": answer, "right": answer == expected} for answer in said]
    assert majority_vote(votes) == pytest.approx(fmean(outcomes))


def test_the_summary_is_json_and_the_order_of_records_is_none_of_it():
    asked = settings(prompts=("sequential", "parallel"), modes=("parallel", "sequential"), do_sample=True, samples=3)
    records = [
        each
        for number, (prompt, mode) in enumerate(
            (prompt, mode) for prompt in ("parallel", "sequential") for mode in ("parallel", "sequential")
        )
        for each in answers(marks((6, 3), number), range(40, 46), prompt=prompt, mode=mode)
    ]
    first = summarise_run(asked, tasks(6, samples=3), records)
    text = json.dumps(first, allow_nan=False)
    for seed in range(3):
        random.Random(seed).shuffle(records)
        assert json.dumps(summarise_run(asked, tasks(6, samples=3), records), allow_nan=False) == text
    # Conditions come as they were asked for.
    assert [(row["prompt"], row["mode"]) for row in first["conditions"]] == [
        ("sequential", "parallel"),
        ("sequential", "sequential"),
        ("parallel", "parallel"),
        ("parallel", "sequential"),
    ]
    assert first["schema_version"] == 1
    assert first["settings"] == asked


def test_times_stand_where_they_are_said_to():
    records = answers("1101")
    slower = [
        {**each, "times": {**each["times"], "first_token_seconds": 9.0, "seconds": {"prefill": 9.0, "map": 5.0}}}
        for each in records
    ]
    found = [summarise_run(settings(), tasks(4), each) for each in (records, slower)]
    assert found[0] != found[1]
    for summary in found:
        only(summary).pop("times")
    assert found[0] == found[1]


def test_modes_and_prompts_are_compared_within_task_and_budget():
    asked = settings(prompts=("parallel", "sequential"), modes=("parallel", "sequential"), budgets=(64, None))
    records = [
        each
        for prompt in asked["prompts"]
        for mode in asked["modes"]
        for budget in asked["budgets"]
        for each in answers("1101", prompt=prompt, mode=mode, budget=budget)
    ]
    found = summarise_run(asked, tasks(4), records)["comparisons"]
    assert len(found) == 8
    for each in found:
        differing = [name for name, value in each["first"].items() if value != each["second"][name]]
        assert differing in (["mode"], ["prompt"])
        assert each["questions"] == 4
    # What has no whole question in common cannot be compared.
    assert summarise_run(asked, tasks(4), records[:5])["comparisons"] == []


def test_records_of_other_conditions_and_no_records_are_refused():
    with pytest.raises(ValueError, match=r"`records` hold .*sums, parallel prompt, sequential mode"):
        summarise_run(settings(), tasks(1), answers("1", mode="sequential"))
    with pytest.raises(ValueError, match="`records` is empty"):
        summarise_run(settings(), tasks(1), [])


def test_a_greedy_run_without_a_budget_says_what_budgets_would_have_given():
    steps = [10, 30, 20, 40]
    records = answers("1101", steps)
    records[3] |= {"finish_reason": "length"}
    (curve,) = summarise_run(settings(), tasks(4), records)["budget_curves"]
    assert curve["derived"]
    assert curve["budgets"] == list(range(1, 41))
    # Right, and ended by the model: after 10 and 30 steps.
    expected = [(budget >= 10) / 4 + (budget >= 30) / 4 for budget in curve["budgets"]]
    assert curve["pass_at_1"] == expected
    assert curve["intervals"] == [rounded(wilson_interval(round(4 * share), 4)) for share in expected]


def test_the_derived_curve_is_what_greedy_decoding_with_each_budget_gives():
    model = tiny_model(seed=3)
    prompts = [[WORDS["a"] + number, WORDS["b"]] for number in range(8)]

    def generations(budget=None):
        limits = {"max_new_tokens": 90, "max_path_tokens": 8, "max_sequential_steps": budget}
        output = decode(model, prompts, FORK_AND_END, **limits)
        for row, report in enumerate(output.reports):
            ended = report.finish_reason == "eos"
            # Any property of the text that a judge may look at, of what has ended.
            right = ended and sum(real_tokens(output, prompts, row)) % 3 > 0
            yield record(str(row), right, report.sequential_steps, finish_reason=report.finish_reason)

    free = list(generations())
    solved = sorted(each["sequential_steps"] for each in free if each["right"])
    middle = solved[len(solved) // 2]
    budgets = [solved[0], middle - 1, middle, solved[-1]]
    measured = [fmean(each["right"] for each in generations(budget)) for budget in budgets]
    assert budget_curve(free, budgets) == measured
    assert len(set(measured)) == 4, "or nothing is compared"


def test_budgets_that_were_run_are_measured_in_order_with_no_limit_last():
    asked = settings(budgets=(None, 64, 16))
    records = answers("1111") + answers("1101", budget=64) + answers("0001", budget=16)
    measured, derived = summarise_run(asked, tasks(4), records)["budget_curves"]
    assert (measured["budgets"], measured["pass_at_1"]) == ([16, 64, None], [0.25, 0.75, 1.0])
    assert measured["intervals"][0] == rounded(wilson_interval(1, 4))
    assert (measured["derived"], derived["derived"]) == (False, True)


def test_sampled_runs_imply_nothing_of_budgets():
    assert summarise_run(settings(do_sample=True), tasks(4), answers("1111"))["budget_curves"] == []


@given(st.integers(0, 100_000))
def test_budgets_are_even_few_and_reach_the_longest(longest):
    budgets = even_budgets(longest)
    spacing = budgets[0]
    assert budgets == [spacing * number for number in range(1, len(budgets) + 1)]
    assert str(spacing).rstrip("0") in ("1", "2", "5")
    assert len(budgets) <= POINTS
    assert budgets[-1] - spacing < max(longest, 1) <= budgets[-1]
    assert spacing == 1 or len(budgets) > POINTS / 3, "or they are too few to see a curve"


MODES = ("parallel", "sequential")


def call(mode, repeat, seconds, **values):
    made = {
        "task": "sums",
        "prompt": "parallel",
        "mode": mode,
        "batch_size": 1,
        "length": None,
        "repeat": repeat,
        "generated_tokens": 100,
        "sequential_steps": 50 if mode == "parallel" else 100,
        "degree_of_parallelism": 2.0 if mode == "parallel" else 1.0,
        "seconds": seconds,
        "prefill_seconds": 0.1,
        "peak_memory_bytes": None,
    }
    return {**made, **values}


def test_speed_is_the_median_of_ratios_of_pairs():
    pairs = [(1.0, 2.0), (2.0, 6.0), (4.0, 4.0)]
    calls = [
        call(mode, number, each) for number, pair in enumerate(pairs) for mode, each in zip(MODES, pair, strict=True)
    ]
    calls += [call("parallel", 3, 100.0), call("parallel", 0, 3.0, batch_size=8, length=64, peak_memory_bytes=5)]
    single, batch = summarise_speed(calls[::-1])
    # Ratios 2, 3 and 1; the fourth has no partner.
    assert (single["speedup"], single["range"], single["repeats"]) == (2.0, [1.0, 3.0], 3)
    assert single["seconds"] == {"parallel": 3.0, "sequential": 4.0}
    assert single["tokens_per_second"] == {"parallel": 37.5, "sequential": 25.0}
    assert single["degree_of_parallelism"] == {"parallel": 2.0, "sequential": 1.0}
    assert (batch["batch_size"], batch["length"], batch["speedup"], batch["range"]) == (8, 64, None, None)
    assert batch["seconds"] == {"parallel": 3.0}
    assert batch["peak_memory_bytes"] == 5
    assert summarise_speed([call("sequential", 0, 1.0, prefill_seconds=None)])[0]["prefill_seconds"] == {}
    assert summarise_speed([]) == []
