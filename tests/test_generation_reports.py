"""What decoding costs: the steps and tokens in its reports, and the forward passes behind them."""

import json
from itertools import pairwise

import pytest
from decoding import FORK_AND_END, NESTED, PROMPTS, TWO_PATHS, decode, follow, layout_of, text_of
from multiverse.generation.report import BlockReport, RequestReport
from multiverse.structure import Block
from tiny import TOKEN_IDS, Script, tiny_ids, tiny_model


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
    assert follow(TWO_PATHS, parallel=False).reports[0].sequential_steps == 21 + 3 + 5 + 6
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


def test_tree_of_nested_blocks() -> None:
    """Spans and steps of `NESTED`, counted by hand."""
    first, second = follow(NESTED).reports[0].blocks[0], follow(NESTED).reports[0].blocks[0].paths[1].blocks[0]
    ids = NESTED.ids
    assert (first.branch, first.start, first.end, first.outlines) == (0, 1, len(ids) - 2, 3)
    assert ids[first.goal_close] == TOKEN_IDS["</Goal>"]
    assert ids[first.conclusion] == TOKEN_IDS["<Conclusion>"]
    assert [path.label for path in first.paths] == ["1", "2", "3"]
    assert [path.finish_reason for path in first.paths] == ["closed", "closed", "eos"]
    assert [path.label for path in second.paths] == ["2.1", "2.7"]
    assert [path.finish_reason for path in second.paths] == ["eos", "closed"]
    for block in (first, second):
        assert ids[block.start] == TOKEN_IDS["<Parallel>"]
        assert ids[block.end - 1] == TOKEN_IDS["</Parallel>"]
        for path, following in pairwise([*block.paths, None]):
            assert ids[path.start] == TOKEN_IDS["<Path>"]
            assert path.end == (following.start if following else block.conclusion)
    # 16 answers up to </Goal>. Path 1 answers three times; path 2 14 times up to its own goal's end, 4 in path 2.1 and
    # 5 after it; path 3 twice.
    steps = [(path.first_step, path.last_step) for path in first.paths]
    assert steps == [(16, 16 + 3), (16, 16 + 14 + 4 + 5), (16, 16 + 2)]


@pytest.mark.parametrize("name", PROMPTS)
def test_tree_is_that_of_the_text(name: str) -> None:
    prompt = tiny_ids(PROMPTS[name])
    output = decode(tiny_model(), [prompt], FORK_AND_END, max_new_tokens=70)
    report = output.reports[0]
    layout = layout_of(text_of(output))

    def same(found: list[BlockReport], blocks: list[Block]) -> int:
        paths = 0
        for one, other in zip(found, blocks, strict=True):
            end = len(layout) if other.end is None else other.end
            outlines = len(other.outlines)
            assert (one.branch, one.start, one.end, one.outlines) == (other.branch, other.start, end, outlines)
            assert (one.goal_close, one.conclusion) == (other.goal_close, other.conclusion)
            for path, expected in zip(one.paths, other.paths, strict=True):
                assert (path.branch, path.start) == (expected.branch, expected.start)
                assert path.end == (len(layout) if expected.end is None else expected.end)
                # What the prompt has closed before, nobody has run.
                if path.finish_reason == "prompt":
                    assert path.end <= len(prompt) + 1
                paths += 1 + same(path.blocks, expected.blocks)
        return paths

    # Branches of the report are those that were run: the root, and the paths of blocks that the prompt left open.
    assert same(report.blocks, layout.blocks) >= len(report.branches) - 1
    assert json.loads(json.dumps(report.to_dict()))["blocks"] == report.to_dict()["blocks"]
