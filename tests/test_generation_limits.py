"""Limits: at each of them decoding closes what is open, or goes on with less, and says so."""

import pytest
from cases import both_modes
from decoding import (
    FORK_AND_END,
    MIXED,
    PROMPTS,
    Boost,
    Watch,
    check_parity,
    check_structure,
    decode,
    layout_of,
    real_tokens,
    text_of,
)
from multiverse.generation.branch import Branch, BranchStatus, Token
from tiny import goal, tiny_ids, tiny_model

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_paths_beyond_the_most_wait_and_lose_nothing(width: int) -> None:
    model = tiny_model()
    prompt = tiny_ids("a " + goal("abcdefg"))
    options = {"max_new_tokens": 400, "max_path_tokens": 14}
    watch = Watch()
    output = decode(model, [prompt], Boost(), max_paths=width, streamer=watch, **options)
    free = decode(model, [prompt], Boost(), **options)
    check_parity(model, output, [prompt])
    if free.reports[0].finish_reason == "eos":
        assert text_of(output) == text_of(free)
    assert output.reports[0].sequential_steps > free.reports[0].sequential_steps
    asked: dict[int, set[str]] = {}
    for branch in watch.requests[0].branches():
        for item in branch.items:
            if isinstance(item, Token) and not item.forced:
                asked.setdefault(item.step, set()).add(branch.label)
    assert max(len(labels) for labels in asked.values()) == width


def test_width_of_one_is_sequential_decoding() -> None:
    model = tiny_model()
    options = {"max_new_tokens": 300, "do_sample": True}
    narrow = decode(model, ROWS, FORK_AND_END, max_paths=1, **options)
    sequential = decode(model, ROWS, FORK_AND_END, parallel=False, **options)
    assert narrow.sequences.tolist() == sequential.sequences.tolist()
    steps = [[report.sequential_steps for report in output.reports] for output in (narrow, sequential)]
    assert steps[0] == steps[1]


def depth(branch: Branch) -> int:
    return 0 if branch.parent is None else 1 + depth(branch.parent)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_block_is_deeper_than_allowed(most: int) -> None:
    watch = Watch()
    prompts = [tiny_ids("a b c"), tiny_ids(PROMPTS["after a goal"]), tiny_ids(PROMPTS["inside a nested path"])]
    output = decode(tiny_model(), prompts, Boost(6.0), max_depth=most, max_new_tokens=400, streamer=watch)
    check_structure(output, prompts, 400, whole=True)
    depths = [max(map(depth, request.branches())) for request in watch.requests]
    # What the prompt has opened stays open.
    assert depths == [most, most, max(most, 2)]


@both_modes
def test_budget_of_steps_closes_every_row_at_its_step(parallel: bool) -> None:
    model = tiny_model()
    whole = decode(model, ROWS, Boost(), max_new_tokens=200, parallel=parallel)
    for budget in (1, 2, 5, 17, 40):
        output = decode(model, ROWS, Boost(), max_new_tokens=200, max_sequential_steps=budget, parallel=parallel)
        check_parity(model, output, ROWS)
        for row, (report, unlimited) in enumerate(zip(output.reports, whole.reports, strict=True)):
            kinds = {problem.kind for problem in layout_of(real_tokens(output, ROWS, row)).problems}
            assert not kinds & {"stray close", "path outside a block", "unclosed block"}
            if unlimited.sequential_steps > budget:
                assert report.finish_reason == "max_sequential_steps"
                assert report.sequential_steps == budget
            elif unlimited.sequential_steps < budget:
                assert (report.finish_reason, report.sequential_steps) == (
                    unlimited.finish_reason,
                    unlimited.sequential_steps,
                )


def test_goal_with_a_hundred_outlines_gets_a_hundred_paths() -> None:
    model = tiny_model()
    prompt = tiny_ids("a " + goal(["b"] * 100))
    watch = Watch()
    output = decode(model, [prompt], Boost(), max_new_tokens=3000, max_path_tokens=10, streamer=watch)
    (request,) = watch.requests
    paths = request.root.forks[0].children
    assert [path.label for path in paths] == [str(number) for number in range(1, 101)]
    assert all(path.status is BranchStatus.FINISHED for path in paths)
    assert not [p for p in layout_of(text_of(output)).problems if p.kind in ("unclosed block", "stray close")]
    check_parity(model, output, [prompt])
