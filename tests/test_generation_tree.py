"""The tree of blocks in a report: spans and labels by the text, steps and reasons by how it was decoded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from decoding import (
    FORK_AND_END,
    NESTED,
    PROMPTS,
    TWO_PATHS,
    Boost,
    Follow,
    both_ways,
    continuation,
    decode,
    follow,
    layout_of,
    real_tokens,
)
from hypothesis import given
from hypothesis import strategies as st
from multiverse.generation.report import BlockReport, PathReport, RequestReport
from multiverse.structure import Block
from scripted_requests import (
    budgets,
    cut_prompts,
    cuts,
    examples,
    new_request,
    path_limits,
    picking,
    picks,
    play,
    rules,
    sequence,
)
from strategies import shuffled
from tiny import TOKEN_IDS, Script, from_strategy, tiny_ids, tiny_model

# Indices and steps counted by hand: up to a goal's end a step makes one token, so </Goal> of the first block of
# TWO_PATHS, token 21, is made in step 21, together with both headers, and the paths are asked for more in the next.
TREES: dict[str, tuple[Script, list[BlockReport]]] = {
    "two paths": (
        TWO_PATHS,
        [
            BlockReport(
                *(0, 1, 47, 21, 41, 2),
                paths=[
                    PathReport("1", 1, 23, 31, "closed", 21, 24, 22),
                    PathReport("2", 2, 31, 41, "closed", 21, 26, 22),
                ],
            )
        ],
    ),
    "nested": (
        NESTED,
        [
            BlockReport(
                *(0, 1, 102, 16, 79, 3),
                paths=[
                    PathReport("1", 1, 18, 26, "closed", 16, 19, 17),
                    PathReport(
                        *("2", 2, 26, 72, "closed", 16, 39, 17),
                        blocks=[
                            BlockReport(
                                *(2, 31, 69, 43, 65, 2),
                                paths=[
                                    # An end of sequence takes a step, too.
                                    PathReport("2.1", 3, 45, 56, "eos", 30, 34, 31),
                                    PathReport("2.7", 4, 56, 65, "closed", 30, 32, 31),
                                ],
                            )
                        ],
                    ),
                    PathReport("3", 5, 72, 79, "eos", 16, 18, 17),
                ],
            ),
            # In the conclusion, whose tokens are the root's.
            BlockReport(*(0, 81, 98, 86, 95, 1), paths=[PathReport("1", 6, 88, 95, "closed", 46, 48, 47)]),
        ],
    ),
}


def all_paths(blocks: Sequence[BlockReport]) -> Iterator[PathReport]:
    """Every path of a tree."""
    for block in blocks:
        for path in block.paths:
            yield path
            yield from all_paths(path.blocks)


def shape(blocks: Sequence[BlockReport]) -> list[Any]:
    """A tree without what depends on the way in which it was decoded."""
    return [
        (
            *(block.branch, block.start, block.end, block.goal_close, block.conclusion, block.outlines),
            [(path.label, path.branch, path.start, path.end, shape(path.blocks)) for path in block.paths],
        )
        for block in blocks
    ]


def check_spans(found: Sequence[BlockReport], expected: Sequence[Block], length: int) -> int:
    """The blocks of the layout, and nothing else; returns how many."""
    count = len(found)
    for block, other in zip(found, expected, strict=True):
        assert (block.branch, block.start, block.goal_close, block.conclusion, block.outlines) == (
            *(other.branch, other.start, other.goal_close, other.conclusion),
            len(other.outlines),
        )
        assert block.end == (length if other.end is None else other.end)
        for path, text in zip(block.paths, other.paths, strict=True):
            assert (path.branch, path.start) == (text.branch, text.start)
            assert path.end == (length if text.end is None else text.end)
            count += check_spans(path.blocks, text.blocks, length)
    return count


def closings(blocks: Sequence[Block]) -> dict[int, int | None]:
    """For every path, by its branch, the index of its `</Path>` or else of the token that ended it."""
    found: dict[int, int | None] = {}
    for block in blocks:
        for path in block.paths:
            found[path.branch] = path.end if path.close is None else path.close
            found |= closings(path.blocks)
    return found


def check_reasons(report: RequestReport, ids: Sequence[int], prompt: int) -> None:
    """Every path was closed by the prompt, or ended as the report of its branch says, in the same steps.

    Args:
        prompt (`int`): how many of `ids` were given.
    """
    layout = layout_of(ids)
    branches, closing = layout.branch_ids.tolist(), closings(layout.blocks)
    run, told = [], []
    # A block that stands in another's goal is beside it in the tree, so its paths need not come in linear order.
    for path in sorted(all_paths(report.blocks), key=lambda path: path.start):
        own = [index for index, branch in enumerate(branches) if branch == path.branch]
        assert own[0] == path.start
        assert ids[own[0]] == TOKEN_IDS["<Path>"]
        closed = closing[path.branch]
        assert (path.finish_reason == "prompt") == (closed is not None and closed < prompt), path
        assert path.finish_reason in ("prompt", "closed", "eos", "max_path_tokens", None)
        if made := sum(index >= prompt for index in own):
            run.append((path.label, made, path.first_step, path.last_step))
        else:
            assert (path.first_step, path.last_step) == (None, None)
    for branch in report.branches[1:]:
        if branch.tokens:
            assert 0 <= branch.first_step <= branch.last_step <= report.sequential_steps
            told.append((branch.label, branch.tokens, branch.first_step, branch.last_step))
    assert run == told


def read_blocks(values: Sequence[Mapping[str, Any]]) -> list[BlockReport]:
    """A tree from its plain values."""
    return [
        BlockReport(
            **{
                **block,
                "paths": [PathReport(**{**path, "blocks": read_blocks(path["blocks"])}) for path in block["paths"]],
            }
        )
        for block in values
    ]


def check_round_trip(report: RequestReport) -> None:
    """JSON keeps the whole tree."""
    values = json.loads(json.dumps(report.to_dict()))
    assert values == report.to_dict()
    assert read_blocks(values["blocks"]) == report.blocks


@pytest.mark.parametrize("name", list(TREES))
def test_tree_of_a_script_is_the_one_counted_by_hand(name: str) -> None:
    script, expected = TREES[name]
    report = follow(script).reports[0]
    assert report.blocks == expected
    check_round_trip(report)


@pytest.mark.parametrize("name", list(TREES))
def test_one_path_at_a_time_the_tree_is_the_same_but_for_its_steps(name: str) -> None:
    script, expected = TREES[name]
    report = follow(script, parallel=False).reports[0]
    assert shape(report.blocks) == shape(expected)
    reasons = [path.finish_reason for path in all_paths(report.blocks)]
    assert reasons == [path.finish_reason for path in all_paths(expected)]
    # A path is asked from its first word to its end, and only then its next sibling.
    for path, following in pairwise(report.blocks[0].paths):
        assert path.last_step + 1 == following.first_sampled_step
    check_reasons(report, script.ids, 1)


@pytest.mark.parametrize("name", list(TREES))
def test_tree_is_whole_wherever_the_prompt_ends(name: str) -> None:
    """What the prompt has closed says so; all else is as if it had been generated from the start."""
    script, expected = TREES[name]
    model = tiny_model()
    lengths = cuts(script)[::2]
    # Rows of one batch, each with its own end of the prompt.
    prompts = [script.ids[:length] for length in lengths]
    output = decode(model, prompts, Follow(script), max_new_tokens=500)
    for row, (length, report) in enumerate(zip(lengths, output.reports, strict=True)):
        assert real_tokens(output, prompts, row) == script.ids
        assert shape(report.blocks) == shape(expected)
        check_reasons(report, script.ids, length)
        for path, whole in zip(all_paths(report.blocks), all_paths(expected), strict=True):
            assert path.finish_reason in ("prompt", whole.finish_reason)


def test_steps_count_from_the_prompts_end_and_forced_headers_before_it_have_step_zero() -> None:
    cases = {
        # After `d`: `e </Path>`, and one step behind it `f g h _ </Path>`, whose header must be run first.
        28: [("1", "closed", 1, 2), ("2", "closed", 0, 1 + 5)],
        # After `</Path>` the separator is forced, too.
        30: [("1", "prompt", 0, 0), ("2", "closed", 0, 5)],
        31: [("1", "prompt", None, None), ("2", "closed", 0, 5)],
        # After `g`.
        37: [("1", "prompt", None, None), ("2", "closed", 1, 3)],
        # After `<Conclusion>`.
        42: [("1", "prompt", None, None), ("2", "prompt", None, None)],
        # After the whole block.
        47: [("1", "prompt", None, None), ("2", "prompt", None, None)],
    }
    for length, expected in cases.items():
        (block,) = follow(TWO_PATHS, length).reports[0].blocks
        assert [
            (path.label, path.finish_reason, path.first_step, path.last_step) for path in block.paths
        ] == expected, length


@both_ways
def test_tree_of_any_output_is_that_of_its_layout(sampled: bool) -> None:
    prompts = [tiny_ids(text) for text in PROMPTS.values()]
    model = tiny_model(seed=3)
    found = 0
    for processor, options in (
        (FORK_AND_END, {"max_new_tokens": 90, "max_path_tokens": 12}),
        (Boost(4.0), {"max_new_tokens": 40, "parallel": False}),
    ):
        output = decode(model, prompts, processor, **options, do_sample=sampled)
        for row, prompt in enumerate(prompts):
            ids, report = real_tokens(output, prompts, row), output.reports[row]
            start, end = continuation(output, prompts, row)
            assert end - start == report.generated_tokens
            found += check_spans(report.blocks, layout_of(ids).blocks, len(ids))
            check_reasons(report, ids, len(prompt))
            check_round_trip(report)
    assert found > 40


@examples(40)
@given(
    cut_prompts | shuffled(50).map(lambda sample: from_strategy(sample.ids)).filter(bool),
    budgets,
    path_limits,
    picks,
    st.none() | st.just(1),
)
def test_tree_of_a_random_request_is_that_of_its_layout(
    prompt: list[int], budget: int, path_limit: int | None, numbers: list[int], width: int | None
) -> None:
    # What closes the prompt, and a little more.
    whole = new_request(prompt)
    budget += whole.made + whole.closing_cost
    request = new_request(prompt, rules(budget, max_path_tokens=path_limit))
    play(request, picking(numbers), width)
    ids, report = sequence(request), RequestReport.of(request)
    check_spans(report.blocks, layout_of(ids).blocks, len(ids))
    check_reasons(report, ids, len(prompt))
    check_round_trip(report)


def test_text_without_a_block_has_an_empty_tree() -> None:
    output = decode(tiny_model(), [tiny_ids("a b"), tiny_ids("<Think> c")], suppress_tokens=list(TOKEN_IDS.values()))
    assert [report.blocks for report in output.reports] == [[], []]
