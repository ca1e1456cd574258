"""Rewards for reinforcement learning: a right answer, a sound format, a short critical path.

All are reward functions of TRL's signature for completions of `MultiverseRollouts`, with values from 0 to 1. The
trainer adds them up with `reward_weights` and, under `scale_rewards="none"`, takes the mean of the group away and
divides by nothing: every reward is mean-centred within its group, wherever the group's completions were made. Dividing
by the standard deviation of the sum, TRL's default, would blow up the smallest difference in speed to full size in a
group whose answers are all right, so `check_reward_options` refuses it.

Only right answers are rewarded for acceleration. With weights `answer > format + acceleration`, a right answer then
has a larger advantage than every wrong one of its group, by more than acceleration can ever make between two answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from multiverse.generation.report import RequestReport
from multiverse.problems import Problem
from multiverse.trainer.synthetic import read_answer
from trl import GRPOConfig

#: Weights of answer, format and acceleration, in this order.
REWARD_WEIGHTS: tuple[float, float, float] = (1.0, 0.1, 0.5)

#: `(text of a completion, what the dataset's column holds) -> whether it is right`.
Judge = Callable[[str, Any], bool]

#: A reward function of TRL; `None` for a completion that it has nothing to say about.
RewardFunction = Callable[..., "list[float | None]"]


def same_number(text: str, answer: Any) -> bool:
    """Whether the number after the last `Answer:` is the one expected (the synthetic problems)."""
    return read_answer(text) == int(answer)


class AnswerReward:
    """1 for a right answer, 0 for a wrong one.

    For mathematics in LaTeX, `trl.rewards.accuracy_reward` takes its place (it needs the package `math-verify` and the
    column `solution`).

    Args:
        judge (`Judge`): says whether an answer is right. The text it gets is decoded without special tokens.
        column (`str`): column of the dataset that holds the expected answer.
    """

    __name__ = "answer"

    def __init__(self, judge: Judge = same_number, column: str = "answer") -> None:
        self.judge = judge
        self.column = column

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Judges every completion.

        Raises:
            ValueError: if the dataset has no such column.
        """
        if self.column not in columns:
            raise ValueError(
                f"`column` is {self.column!r}, which the dataset does not have. Add it with the expected answers, or "
                "name another."
            )
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        return [float(self.judge(text, answer)) for text, answer in zip(texts, columns[self.column], strict=True)]


class FormatReward:
    """1 for a well-formed completion that ends by itself and forks where it was asked to, else 0.

    A column `wants_block` of the dataset asks for a block (True), for none (False), or leaves it open (None, or no
    such column). Logs the share of completions with a block and the mean number of structure problems.
    """

    __name__ = "format"

    def __call__(
        self,
        completions: Sequence[Any],
        reports: Sequence[RequestReport] | None = None,
        structure_problems: Sequence[Sequence[Problem]] | None = None,
        wants_block: Sequence[bool | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Reads the format off what the rollouts report.

        Raises:
            ValueError: if the completions were not made by `MultiverseRollouts`.
        """
        reports = _checked_reports(reports)
        assert structure_problems is not None
        wanted = wants_block or [None] * len(reports)
        forks = [_has_forked(report) for report in reports]
        if log_metric is not None:
            log_metric("fork_share", sum(forks) / len(forks))
            log_metric("structure_problems", sum(map(len, structure_problems)) / len(reports))
        return [
            float(report.finish_reason == "eos" and not problems and want in (None, forked))
            for report, problems, want, forked in zip(reports, structure_problems, wanted, forks, strict=True)
        ]


class AccelerationReward:
    """The share of sequential steps that a right answer has saved, `1 - steps / reference`, never below 0.

    Steps are held against a number that the policy cannot move: the column `reference_steps` of the dataset (how many
    tokens a sequential solution of the problem takes), or a constant. The degree of parallelism would be no such
    measure, as tokens that are written side by side raise it whether anybody needs them or not. Wrong answers get 0,
    so nothing is gained by being fast and wrong. Logs the mean number of steps and the mean degree of parallelism.

    Args:
        answer (`RewardFunction`): reward of the answer; what it gives (1 for right) is multiplied in.
        reference_steps (`int`, *optional*): for datasets without that column, such as `max_completion_length`.

    Raises:
        ValueError: if `reference_steps` is not positive.
    """

    __name__ = "acceleration"

    def __init__(self, answer: RewardFunction, reference_steps: int | None = None) -> None:
        if reference_steps is not None and reference_steps < 1:
            raise ValueError(f"`reference_steps` must be positive, got {reference_steps}.")
        self.answer = answer
        self.reference_steps = reference_steps

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        reports: Sequence[RequestReport] | None = None,
        reference_steps: Sequence[int] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards the critical path of every right answer.

        Raises:
            ValueError: if the completions were not made by `MultiverseRollouts`, or there is nothing to hold their
                steps against.
        """
        reports = _checked_reports(reports)
        if reference_steps is None:
            if self.reference_steps is None:
                raise ValueError(
                    "`reference_steps` is neither a column of the dataset nor given to the reward. Add the column "
                    "(tokens of a sequential solution), or pass a constant such as `max_completion_length`."
                )
            reference_steps = [self.reference_steps] * len(reports)
        if log_metric is not None:
            log_metric("sequential_steps", sum(report.sequential_steps for report in reports) / len(reports))
            log_metric("degree_of_parallelism", sum(each.degree_of_parallelism for each in reports) / len(reports))
        # What the answer's reward logs, it has logged for itself.
        right = self.answer(
            prompts=prompts, completions=completions, completion_ids=completion_ids, reports=reports, **columns
        )
        return [
            None if value is None else value * max(0.0, 1 - report.sequential_steps / reference)
            for value, report, reference in zip(right, reports, reference_steps, strict=True)
        ]


def check_reward_options(config: GRPOConfig) -> None:
    """Makes sure that acceleration cannot outweigh a right answer.

    Args:
        config (`GRPOConfig`): with `reward_weights` for answer, format and acceleration.

    Raises:
        ValueError: naming the option.
    """
    weights = config.reward_weights
    if weights is None or len(weights) != 3 or min(weights) < 0:
        raise ValueError(
            f"`reward_weights` must be three numbers from 0 up, for answer, format and acceleration, got {weights}."
        )
    answer, form, acceleration = weights
    if not answer > form + acceleration:
        raise ValueError(
            f"`reward_weights` are {weights}, but the first (answer) must be larger than the other two (format, "
            "acceleration) together, or a fast answer may be worth more than a right one. Lower these."
        )
    if config.scale_rewards != "none":
        raise ValueError(
            f"`scale_rewards` is {config.scale_rewards!r}: divided by their standard deviation, small differences in "
            "speed count as much as right and wrong. Set it to 'none'; rewards are centred all the same."
        )
    if config.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"`multi_objective_aggregation` is {config.multi_objective_aggregation!r}, which divides every reward by "
            "its standard deviation. Set it to 'sum_then_normalize'."
        )


def _has_forked(report: RequestReport) -> bool:
    # The root comes first; paths that the prompt has closed are not among them.
    return len(report.branches) > 1


def _checked_reports(reports: Sequence[RequestReport] | None) -> Sequence[RequestReport]:
    if reports is None:
        raise ValueError(
            "`reports` is missing: only rollouts of the branch engine tell their steps. Pass "
            "`rollout_func=MultiverseRollouts()` to the trainer."
        )
    return reports
