"""What decoding costs: the steps and tokens in its reports, and the forward passes behind them."""

import pytest
from decoding import NESTED, TWO_PATHS, follow, text_of
from multiverse.generation.report import RequestReport
from tiny import Script, tiny_model


def test_report_counts_the_two_paths_of_a_script() -> None:
    report = follow(TWO_PATHS).reports[0]
    # 21 answers up to </Goal>, 5 of the longer path, 6 from the conclusion to the end of sequence.
    assert report.sequential_steps == 21 + 5 + 6
    assert report.forced_tokens == len(TWO_PATHS.forced) == 12
    assert report.generated_tokens == 21 + 3 + 5 + 6 + 12
    assert report.degree_of_parallelism == 47 / 32
    root, first, second = report.branches
    assert [branch.label for branch in report.branches] == ["", "1", "2"]
    assert [branch.tokens for branch in report.branches] == [29, 8, 10]
    assert (root.first_step, root.last_step) == (1, 32)
    # Headers are written in the step that closes the goal.
    assert (first.first_step, first.last_step) == (21, 24)
    assert (second.first_step, second.last_step) == (21, 26)
    assert (root.first_sampled_step, first.first_sampled_step, second.first_sampled_step) == (1, 22, 22)
    twin = follow(TWO_PATHS, parallel=False).reports[0]
    assert twin.sequential_steps == 21 + 3 + 5 + 6
    _, first, second = twin.branches
    assert (first.first_step, first.first_sampled_step, first.last_step) == (21, 22, 24)
    assert (second.first_step, second.first_sampled_step, second.last_step) == (21, 25, 29)
    assert [path.first_sampled_step for path in twin.blocks[0].paths] == [22, 25]
    assert RequestReport(**{k: v for k, v in report.to_dict().items() if k != "degree_of_parallelism"})


def test_report_counts_the_longest_way_through_nested_paths() -> None:
    parallel, sequential = (follow(NESTED, parallel=each).reports[0] for each in (True, False))
    # Path 2: 13 answers up to its goal's end, 4 in path 2.1 (the end of sequence counts), 5 after it.
    assert parallel.sequential_steps == 19 + (12 + 4 + 5) + (8 + 2 + 6)
    answers = len(NESTED.ids) - 1 - len(NESTED.forced) + 2
    assert sequential.sequential_steps == answers
    reasons = {branch.label: branch.finish_reason for branch in parallel.branches[:6]}
    assert reasons == {"": None, "1": "closed", "2": "closed", "2.1": "eos", "2.7": "closed", "3": "eos"}


@pytest.mark.parametrize("script", [TWO_PATHS, NESTED], ids=["two paths", "nested"])
def test_fork_and_merge_cost_no_pass_of_their_own(script: Script) -> None:
    model = tiny_model()
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = follow(script, model=model)
    # The prompt's pass gives the first answer, and the last answer is not run.
    assert len(sizes) == output.reports[0].sequential_steps
    assert sizes[0] == 1
    assert sum(sizes) == len(script.ids) - 1


def test_prompt_that_ends_at_a_fork_costs_one_pass_more_than_its_steps() -> None:
    model = tiny_model()
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    output = follow(TWO_PATHS, 22, model=model)
    assert text_of(output) == TWO_PATHS.ids
    assert output.reports[0].sequential_steps == 5 + 6
    assert len(calls) == 1 + 5 + 6
