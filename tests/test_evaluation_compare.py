"""What is said of two runs, and which runs are not compared."""

import json
from itertools import product

import numpy as np
import pytest
from evaluated_records import answers, marks, settings, tasks
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from multiverse.evaluation.compare import NOT_SHOWN, compare_conditions
from multiverse.evaluation.compare_runs import Run, compare_runs
from multiverse.evaluation.grouping import by_condition
from multiverse.evaluation.run_folder import RunFolder
from multiverse.evaluation.settings import EvaluationSettings
from scipy import stats


def questions(*arguments, **values):
    (found,) = by_condition(answers(*arguments, **values)).values()
    return found


def compared(first, second, samples=1, steps=(100, 100)):
    return compare_conditions(questions(first, steps[0]), questions(second, steps[1]), samples, samples)


def test_ten_questions_by_hand():
    found = compared("1111111100", "0000000101")
    assert (found["questions"], found["left_out"]) == (10, 0)
    right = found["pass_at_1"]
    assert (right["first"], right["second"], right["difference"]) == (0.8, 0.2, 0.6)
    # Seven to one: 2 * (1 + 8) / 256.
    assert (right["first_better"], right["second_better"], right["test"]) == (7, 1, "McNemar, exact")
    assert right["p_value"] == round(18 / 256, 5)
    assert found["verdict"] == NOT_SHOWN
    # Six to none: 2 / 64.
    found = compared("1111110000", "0000000000")
    assert found["pass_at_1"]["p_value"] == 0.03125
    assert found["verdict"] == "first is better"
    assert compared("0000000000", "1111110000")["verdict"] == "second is better"
    # Five to none: 2 / 32.
    assert compared("1111100000", "0000000000")["verdict"] == NOT_SHOWN


def test_alike_is_never_said_to_be_equal():
    found = compared("1100" * 5, "1100" * 5)
    right = found["pass_at_1"]
    assert (right["difference"], right["p_value"], found["verdict"]) == (0.0, 1.0, NOT_SHOWN)
    low, high = right["interval_95"]
    assert -0.2 < low < -0.1
    assert 0.1 < high < 0.2
    assert found["sequential_steps"]["ratio"] == 1.0
    assert found["sequential_steps"]["verdict"] == NOT_SHOWN
    assert "equal" not in json.dumps(found)


def test_steps_are_compared_by_their_ratio():
    second = [60 + 7 * number for number in range(12)]
    found = compared("1" * 12, "1" * 12, steps=([each // 2 for each in second], second))
    steps = found["sequential_steps"]
    assert (steps["first"], steps["second"]) == (
        pytest.approx(np.mean([each // 2 for each in second]), abs=0.005),
        98.5,
    )
    assert steps["ratio"] == pytest.approx(0.5, abs=0.01)
    assert steps["interval_95"] == pytest.approx([0.5, 0.5], abs=0.01)
    # Twelve of twelve need fewer.
    assert steps["p_value"] == float(f"{2 / 2**12:.4g}")
    assert steps["verdict"] == "first needs fewer"
    assert found["generated_tokens"]["ratio"] == steps["ratio"]
    turned = compared("1" * 12, "1" * 12, steps=(second, [each // 2 for each in second]))
    assert turned["sequential_steps"]["verdict"] == "second needs fewer"
    # One question shows nothing, however large its difference.
    assert compared("1", "1", steps=(10, 1000))["sequential_steps"]["verdict"] == NOT_SHOWN


def test_ratios_are_those_of_means_not_means_of_ratios():
    steps = compared("11", "11", steps=([10, 300], [100, 100]))["sequential_steps"]
    assert steps["ratio"] == 1.55
    assert steps["interval_95"] == [0.1, 3.0]


@given(st.data())
@limits(max_examples=30, deadline=None)
def test_several_samples_are_compared_by_question(data):
    count, samples = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 4))
    mark = st.text("01", min_size=samples, max_size=samples)
    first, second = (data.draw(st.lists(mark, min_size=count, max_size=count)) for _ in range(2))
    found = compared(first, second, samples)
    gains = [one.count("1") - other.count("1") for one, other in zip(first, second, strict=True)]
    sums = [
        abs(sum(sign * gain for sign, gain in zip(signs, gains, strict=True)))
        for signs in product((1, -1), repeat=count)
    ]
    p_value = sum(each >= abs(sum(gains)) for each in sums) / len(sums)
    assert found["pass_at_1"]["p_value"] == pytest.approx(p_value, rel=1e-3)
    assert found["pass_at_1"]["test"] == "sign flips"
    assert found["pass_at_1"]["difference"] == pytest.approx(sum(gains) / samples / count, abs=1e-4)
    expected = NOT_SHOWN if p_value >= 0.05 else f"{'first' if sum(gains) > 0 else 'second'} is better"
    assert found["verdict"] == expected


def test_pairing_finds_what_unpaired_tests_miss():
    """One is right wherever the other is, and on six questions more, of a task where most hangs on the question."""
    second = "1" * 40 + "0" * 60
    first = "1" * 46 + "0" * 54
    assert stats.fisher_exact([[46, 54], [40, 60]]).pvalue > 0.4
    assert compared(first, second)["verdict"] == "first is better"


def test_only_questions_that_both_have_in_full_are_compared():
    first, second = questions(["11", "10", "00", "1"]), questions(["01", "1", "11", "11"])
    found = compare_conditions(first, second, 2, 2)
    assert (found["questions"], found["left_out"]) == (2, 2)
    assert found["pass_at_1"]["first"] == 0.5
    assert compare_conditions(first, {}, 2, 2) is None


def run(*arguments, name="A", checkpoint=None, prompts=None, facts=None, asked=None, **values):
    """A run of one condition."""
    made = answers(*arguments, **values)
    conditions = {"prompts": (made[0]["prompt"],), "modes": (made[0]["mode"],), "budgets": (made[0]["budget"],)}
    samples = max(each["sample"] for each in made) + 1
    count = len({each["question"] for each in made})
    facts = {"sums": {**tasks(count, samples)["sums"], **(facts or {})}}
    options = {**conditions, **({"do_sample": True, "samples": samples} if samples > 1 else {}), **(asked or {})}
    return Run(settings(**options), facts, made, name, checkpoint or {}, prompts or {})


def test_two_checkpoints():
    first = run("1111110000", asked={"model": "one", "revision": "v1"})
    second = run("0000000000", name="B", asked={"model": "two", "base": "three"})
    found = compare_runs(first, second)
    assert found["first"] == {"name": "A", "base": None, "model": "one", "revision": "v1"}
    assert found["different_settings"] == []
    assert found["missing"] == {"first": 0, "second": 0}
    assert found["unpaired"] == {"first": [], "second": []}
    (comparison,) = found["comparisons"]
    assert (
        comparison["first"]
        == comparison["second"]
        == {"task": "sums", "prompt": "parallel", "mode": "parallel", "budget": None}
    )
    assert comparison["verdict"] == "first is better"
    assert json.dumps(found, allow_nan=False) == json.dumps(compare_runs(first, second), allow_nan=False)
    turned = compare_runs(second, first)["comparisons"][0]
    assert turned["verdict"] == "second is better"
    assert turned["pass_at_1"]["difference"] == -comparison["pass_at_1"]["difference"]


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 600},
        {"dtype": "bfloat16"},
        {"instructions": {"parallel": "Be quick."}},
        {"do_sample": True},
        {"batch_size": 3},
        {"decode_attention": "folded"},
    ],
)
def test_different_settings_are_named_with_both_values_and_compared_only_when_told_to(asked):
    first, second = run("1100"), run("0110", name="B", asked=asked)
    ((name, value),) = asked.items()
    with pytest.raises(ValueError) as error:
        compare_runs(first, second)
    message = str(error.value)
    assert f"{name} is {first.settings[name]!r} and {value!r}" in message
    assert "--allow-different-settings" in message
    found = compare_runs(first, second, allow=True)
    assert {"setting": name, "first": first.settings[name], "second": value} in found["different_settings"]
    assert found["comparisons"][0]["questions"] == 4


def test_every_different_setting_is_named():
    with pytest.raises(ValueError, match=r"temperature is 0.6 and 1.0; .*top_k is 0 and 5; .*batch_size is 8 and 2"):
        compare_runs(run(["10", "11"]), run(["10", "11"], asked={"temperature": 1.0, "top_k": 5, "batch_size": 2}))


def test_settings_without_effect_do_not_stand_in_the_way():
    asked = {"seed": 5, "temperature": 1.0, "top_p": 0.5, "repeats": 2, "batch_sizes": (1, 2)}
    assert compare_runs(run("1100"), run("0110", asked=asked))["different_settings"] == []
    sampled = {"seed": 5}
    with pytest.raises(ValueError, match="seed is 0 and 5"):
        compare_runs(run(["10", "11"]), run(["01", "11"], asked=sampled))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"sha256": "other"}, "sha256 of task sums is 'abc' and 'other'"),
        ({"samples": 2}, "samples of task sums is 1 and 2"),
    ],
)
def test_different_questions_and_samples_are_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        compare_runs(run("1100"), run("0110", facts=facts))


def test_questions_that_only_bear_the_same_name_are_never_paired():
    other = run("0110", expected="42", facts={"sha256": "other"})
    with pytest.raises(ValueError, match="mean different questions by 'q-000'"):
        compare_runs(run("1100"), other, allow=True)
    # The first of a longer list are the same ones.
    longer = run("011011", facts={"sha256": "other"})
    comparison = compare_runs(run("1100"), longer, allow=True)["comparisons"][0]
    assert (comparison["questions"], comparison["left_out"]) == (4, 2)


def test_what_the_checkpoints_add_to_the_settings_counts():
    def checkpoint(dtype="float32", **values):
        return {"dtype": dtype, "generation_config": {"eos_token_id": values.pop("eos", 1), **values}}

    first = run("1100", checkpoint=checkpoint())
    assert compare_runs(first, run("1100", checkpoint=checkpoint(eos=2)))["different_settings"] == []
    with pytest.raises(ValueError, match="dtype of the weights is 'float32' and 'bfloat16'"):
        compare_runs(first, run("1100", checkpoint=checkpoint("bfloat16")))
    with pytest.raises(ValueError, match=r"generation_config\.max_paths is None and 4"):
        compare_runs(first, run("1100", checkpoint=checkpoint(max_paths=4)))
    # What was never looked at is not different.
    assert compare_runs(first, run("1100"))["different_settings"] == []


def test_prompts_are_compared_as_they_were_published():
    def prompts(words, text):
        form = {"messages": [{"role": "system", "content": words}], "text": text}
        return {"sums": {"parallel": form, "sequential": {"messages": [], "text": words}}}

    first = run("1100", prompts=prompts("Think.", "<s>Think."))
    with pytest.raises(ValueError, match=r"parallel prompt of task sums is .*Think.*Hurry"):
        compare_runs(first, run("1100", prompts=prompts("Hurry.", "<s>Hurry.")))
    # A template is the checkpoint's own; that it differs is said.
    found = compare_runs(first, run("1100", prompts=prompts("Think.", "### Think.")))
    assert (found["different_settings"], found["other_prompt_texts"]) == ([], ["sums"])
    assert compare_runs(first, first)["other_prompt_texts"] == []


def both_modes(marks_by_mode, name="A", **values):
    made = [each for mode, given in marks_by_mode.items() for each in answers(given, mode=mode, **values)]
    return Run(settings(modes=tuple(marks_by_mode)), tasks(6), made, name)


def test_modes_of_one_run_are_compared_when_selected():
    one = both_modes({"parallel": "111111", "sequential": "000000"})
    found = compare_runs(one, one, select_first={"mode": "parallel"}, select_second={"mode": "sequential"})
    (comparison,) = found["comparisons"]
    assert (comparison["first"]["mode"], comparison["second"]["mode"]) == ("parallel", "sequential")
    assert comparison["verdict"] == "first is better"
    # Without, each with its like.
    assert [each["verdict"] for each in compare_runs(one, one)["comparisons"]] == [NOT_SHOWN] * 2


def test_conditions_without_a_partner_are_named():
    one = both_modes({"parallel": "111111", "sequential": "000000"})
    found = compare_runs(one, run("111111", name="B"))
    assert len(found["comparisons"]) == 1
    assert found["unpaired"] == {"first": ["sums, parallel prompt, sequential mode"], "second": []}


@pytest.mark.parametrize("other", [{"prompt": "sequential"}, {"budget": 64}, {"mode": "sequential"}])
def test_nothing_in_common_is_refused_unless_told_to(other):
    first, second = run("111111"), run("000000", name="B", **other)
    with pytest.raises(ValueError, match="no condition in common") as error:
        compare_runs(first, second)
    assert "`select_first`" in str(error.value)
    (comparison,) = compare_runs(first, second, allow=True)["comparisons"]
    ((name, value),) = other.items()
    assert comparison["second"][name] == value
    chosen = compare_runs(first, second, select_first={name: comparison["first"][name]}, select_second={name: value})
    assert chosen["comparisons"] == [comparison]


def test_a_selection_of_what_is_not_there():
    one = run("11")
    with pytest.raises(ValueError, match=r"`select_second`: A has no condition with budget 5. It has sums, parallel"):
        compare_runs(one, one, select_second={"budget": 5})
    with pytest.raises(ValueError, match="`select_first` names colour"):
        compare_runs(one, one, select_first={"colour": 5})


def test_missing_generations_are_refused_unless_told_to():
    whole = run("111111")
    part = Run(whole.settings, whole.tasks, whole.records[:4], "B")
    with pytest.raises(ValueError, match=r"missing: 0 of `first`, 2 of `second`.*--allow-missing"):
        compare_runs(whole, part)
    found = compare_runs(whole, part, allow_missing=True)
    assert found["missing"] == {"first": 0, "second": 2}
    assert (found["comparisons"][0]["questions"], found["comparisons"][0]["left_out"]) == (4, 2)
    with pytest.raises(ValueError, match="no question in common"):
        compare_runs(whole, Run(whole.settings, whole.tasks, [], "B"), allow_missing=True)


def test_a_condition_that_was_not_begun_is_missing():
    whole = both_modes({"parallel": "111111", "sequential": "000000"})
    part = Run(whole.settings, whole.tasks, whole.records[:6], "B")
    with pytest.raises(ValueError, match="6 of `second`"):
        compare_runs(whole, part)
    found = compare_runs(whole, part, allow_missing=True)
    assert len(found["comparisons"]) == 1
    assert found["unpaired"]["second"] == ["sums, parallel prompt, sequential mode"]


def test_sampled_runs_and_their_order():
    records = marks((20, 4), 1), marks((20, 4), 2)
    first, second = run(records[0]), run(records[1], name="B")
    shuffled = Run(first.settings, first.tasks, first.records[::-1], "A")
    assert compare_runs(first, second) == compare_runs(shuffled, second)


def test_a_run_is_read_from_its_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    asked = EvaluationSettings()
    folder.open(asked)
    with pytest.raises(ValueError, match="has not read its tasks"):
        Run.of(folder)
    folder.pin("tasks", tasks(3))
    folder.pin("checkpoint", {"dtype": "float32", "generation_config": {}})
    made = [{**each, "question_number": number} for number, each in enumerate(answers("101"))]
    with folder.writer("records") as writer:
        for number, each in enumerate(made):
            writer.write([{**each, "batch": number}])
    found = Run.of(folder)
    assert found.settings == asked.to_dict()
    assert [each["right"] for each in found.records] == [True, False, True]
    assert found.checkpoint["dtype"] == "float32"
    assert compare_runs(found, found)["comparisons"][0]["pass_at_1"]["first"] == round(2 / 3, 4)
