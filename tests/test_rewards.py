"""Rewards: what each of them measures, and that acceleration never outweighs a right answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse import TAGS, BranchLayout
from multiverse.generation.report import BranchReport, RequestReport
from multiverse.problems import Problem
from multiverse.trainer.rewards import (
    REWARD_WEIGHTS,
    AccelerationReward,
    AnswerReward,
    FormatReward,
    check_reward_options,
)
from trl import GRPOConfig


def report(steps: int = 10, tokens: int = 20, paths: int = 0, finish_reason: str = "eos") -> RequestReport:
    """A request of the given critical path."""
    branches = [BranchReport("", tokens, None, 1, steps)]
    branches += [BranchReport(str(number + 1), 1, "closed", 1, steps) for number in range(paths)]
    return RequestReport(finish_reason, tokens, 0, steps, tokens, {}, branches)


def grpo_config(tmp_path, **options) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        **{"reward_weights": list(REWARD_WEIGHTS), "scale_rewards": "none", **options},
    )


class Metrics:
    """Takes what the rewards log."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def __call__(self, name: str, value: float) -> None:
        self.values[name] = value


STRAY = BranchLayout.from_token_ids([3], {tag: number for number, tag in enumerate(TAGS)}).problems


def test_answer_is_the_last_number_of_a_text_or_of_a_message() -> None:
    texts = ["Answer: 3\nAnswer: 5", "<Parallel>\nAnswer: 5\n", "Answer: 6", "5", ""]
    assert AnswerReward()(texts, answer=[5] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert AnswerReward()(messages, answer=["5", "4", "6", "5", "5"]) == [1.0, 0.0, 1.0, 0.0, 0.0]


def test_judge_and_column_may_be_ones_own() -> None:
    reward = AnswerReward(judge=lambda text, expected: expected in text, column="name")
    assert reward(["Ada", "Alan"], name=["Ada", "Ada"], answer=[0, 0]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("given_report", "problems", "wanted", "expected"),
    [
        (report(), [], None, 1.0),
        (report(paths=2), [], None, 1.0),
        (report(paths=2), [], True, 1.0),
        (report(paths=2), [], False, 0.0),
        (report(), [], True, 0.0),
        (report(), [], False, 1.0),
        (report(paths=2, finish_reason="length"), [], None, 0.0),
        (report(paths=2), STRAY, None, 0.0),
    ],
)
def test_format_is_sound_ends_and_forks_as_asked(
    given_report: RequestReport, problems: list[Problem], wanted: bool | None, expected: float
) -> None:
    columns = {"reports": [given_report], "structure_problems": [problems]}
    assert FormatReward()([""], **columns, wants_block=[wanted]) == [expected]
    if wanted is None:
        assert FormatReward()([""], **columns) == [expected]


def test_acceleration_is_the_share_of_steps_that_a_right_answer_saves() -> None:
    assert STRAY
    metrics = Metrics()
    reward = AccelerationReward(AnswerReward())
    given = reward(
        prompts=[""] * 4,
        completions=["Answer: 5", "Answer: 5", "Answer: 5", "Answer: 6"],
        completion_ids=[[0]] * 4,
        answer=[5] * 4,
        reports=[report(40, 100), report(100, 100), report(150, 300), report(1, 100)],
        reference_steps=[100] * 4,
        log_metric=metrics,
    )
    assert given == pytest.approx([0.6, 0.0, 0.0, 0.0])
    assert metrics.values == pytest.approx(
        {"sequential_steps": (40 + 100 + 150 + 1) / 4, "degree_of_parallelism": (2.5 + 1 + 2 + 100) / 4}
    )


def test_acceleration_takes_a_constant_where_the_dataset_has_no_reference() -> None:
    reward = AccelerationReward(AnswerReward(), reference_steps=80)
    columns = {"prompts": [""], "completions": ["Answer: 5"], "completion_ids": [[0]], "answer": [5]}
    assert reward(**columns, reports=[report(20)]) == [0.75]
    assert reward(**columns, reports=[report(20)], reference_steps=[40]) == [0.5]


def test_answer_that_cannot_be_judged_is_not_accelerated_either() -> None:
    def undecided(completions, log_metric=None, log_extra=None, **columns):
        assert log_metric is None, "the answer's reward would log everything twice"
        assert log_extra is None
        return [None for _ in completions]

    reward = AccelerationReward(undecided, 100)
    given = {"prompts": [""], "completions": [""], "completion_ids": [[0]], "reports": [report()]}
    assert reward(**given, log_metric=Metrics(), log_extra=Metrics()) == [None]


def test_format_logs_forks_and_problems() -> None:
    metrics = Metrics()
    columns = {"reports": [report(paths=2), report(), report(), report()], "structure_problems": [[], [], STRAY, []]}
    FormatReward()([""] * 4, **columns, log_metric=metrics)
    assert metrics.values == {"fork_share": 0.25, "structure_problems": len(STRAY) / 4}


@st.composite
def reward_weights(draw: st.DrawFn) -> list[float]:
    """Weights that the check lets through."""
    form, acceleration = draw(st.floats(0, 3)), draw(st.floats(0, 3))
    return [form + acceleration + draw(st.floats(1e-3, 3)), form, acceleration]


completion = st.tuples(
    st.booleans(),  # right
    st.integers(1, 900),  # sequential steps
    st.integers(1, 30),  # tokens per step
    st.integers(0, 4),  # paths
    st.sampled_from(["eos", "length"]),
    st.booleans(),  # malformed
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(reward_weights(), st.lists(completion, min_size=2, max_size=8), st.integers(1, 900))
def test_right_answer_has_the_larger_advantage_whatever_the_accelerations(
    weights: list[float], group: list[tuple], reference: int
) -> None:
    columns = {
        "prompts": [""] * len(group),
        "completions": ["Answer: 5" if right else "Answer: 6" for right, *_ in group],
        "completion_ids": [[0]] * len(group),
        "answer": [5] * len(group),
        "reports": [report(steps, steps * each, paths, end) for _, steps, each, paths, end, _ in group],
        "structure_problems": [STRAY if malformed else [] for *_, malformed in group],
        "reference_steps": [reference] * len(group),
    }
    answer = AnswerReward()
    values = [reward(**columns) for reward in (answer, FormatReward(), AccelerationReward(answer))]
    assert all(0 <= value <= 1 for rewards in values for value in rewards)
    # As the trainer does without scaling: the weighted sum, less its mean over the group.
    totals = [sum(w * value for w, value in zip(weights, row, strict=True)) for row in zip(*values, strict=True)]
    advantages = [total - sum(totals) / len(totals) for total in totals]
    right = [advantage for advantage, (is_right, *_) in zip(advantages, group, strict=True) if is_right]
    wrong = [advantage for advantage, (is_right, *_) in zip(advantages, group, strict=True) if not is_right]
    if right and wrong:
        # The gap is larger than all that acceleration can make between two answers.
        assert min(right) - max(wrong) > weights[2]


def test_weights_that_let_speed_outweigh_the_answer_are_refused(tmp_path) -> None:
    check_reward_options(grpo_config(tmp_path))
    for weights in ([1.0, 0.5, 0.5], [1.0, 0.1, 2.0], [1.0, -0.1, 0.1], [1.0, 0.1], None):
        with pytest.raises(ValueError, match="`reward_weights`"):
            check_reward_options(grpo_config(tmp_path, reward_weights=weights))
    for scale in ("group", "batch"):
        with pytest.raises(ValueError, match="`scale_rewards`"):
            check_reward_options(grpo_config(tmp_path, scale_rewards=scale))
    with pytest.raises(ValueError, match="`multi_objective_aggregation`"):
        check_reward_options(grpo_config(tmp_path, multi_objective_aggregation="normalize_then_sum"))


def test_what_is_missing_is_named() -> None:
    columns = {"prompts": [""], "completions": ["Answer: 5"], "completion_ids": [[0]]}
    with pytest.raises(ValueError, match="`column` is 'answer'"):
        AnswerReward()([""], solution=[5])
    with pytest.raises(ValueError, match="`reports` is missing"):
        FormatReward()([""])
    with pytest.raises(ValueError, match="`reports` is missing"):
        AccelerationReward(AnswerReward(), 10)(**columns, answer=[5])
    with pytest.raises(ValueError, match="`reference_steps` is neither"):
        AccelerationReward(AnswerReward())(**columns, answer=[5], reports=[report()])
    with pytest.raises(ValueError, match="`reference_steps` must be positive"):
        AccelerationReward(AnswerReward(), 0)
