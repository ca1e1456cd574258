"""The order in which branches are run and asked, in parallel and one after the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiverse.generation.branch import Branch, BranchStatus, Choice, Fork
from multiverse.generation.request import Request
from multiverse.generation.scheduler import branches_to_run
from scripted_requests import (
    SCRIPTS,
    budgets,
    check_finished,
    check_order,
    cut_prompts,
    examples,
    following,
    linear_tokens,
    new_request,
    path_limits,
    picking,
    picks,
    play,
    rules,
)
from tiny import TOKEN_IDS, tiny_ids


@examples(150)
@given(picks, budgets, path_limits, st.booleans())
def test_no_token_is_run_before_one_that_it_sees(
    numbers: list[int], budget: int, limit: int | None, parallel: bool
) -> None:
    request = new_request(tiny_ids("a"), rules(budget, max_path_tokens=limit))
    played = play(request, picking(numbers), None if parallel else 1)
    check_order(request, played, check_finished(request))


@examples(100)
@given(cut_prompts, picks, path_limits, st.booleans())
def test_no_token_after_a_cut_prompt_is_run_before_one_that_it_sees(
    prompt: list[int], numbers: list[int], limit: int | None, parallel: bool
) -> None:
    request = new_request(prompt, rules(250, max_path_tokens=limit))
    played = play(request, picking(numbers), None if parallel else 1)
    check_order(request, played, check_finished(request))


def test_plan_holds_a_waiting_parent_before_its_paths_and_a_merged_one_after_them() -> None:
    request = new_request(tiny_ids("a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline>"))
    request.accept(request.root, Choice(TOKEN_IDS["</Goal>"]))
    root, first, second = request.branches()
    assert branches_to_run(request, width=None) == [root, first, second]
    assert branches_to_run(request, width=1) == [root, first]
    for branch in (root, first):
        branch.pending.clear()
    request.accept(first, Choice(TOKEN_IDS["</Path>"]))
    assert branches_to_run(request, width=None) == [first, second]
    assert branches_to_run(request, width=1) == [first, second]
    first.pending.clear()
    second.pending.clear()
    request.accept(second, Choice(TOKEN_IDS["</Path>"]))
    assert branches_to_run(request, width=None) == [second, root]
    assert branches_to_run(request, width=1) == [second, root]


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_sequential_mode_asks_one_branch_at_a_time_in_linear_order(name: str) -> None:
    script = SCRIPTS[name]
    request = new_request(script.ids[:1])
    played = play(request, following(script), width=1)
    assert {len(asked) for asked in played.rounds} == {1}
    index_of = {id(token): index for index, (_, token) in enumerate(linear_tokens(request.root), start=1)}
    order = [index_of[id(token)] for token in played.run]
    assert order == sorted(order)
    assert len(order) == request.made - 1, "all but the end of sequence"
    assert request.steps == len(script.ids) - 1 - len(script.forced)


@examples(100)
@given(cut_prompts, picks, path_limits)
def test_sequential_mode_asks_a_path_only_after_its_earlier_siblings_have_ended(
    prompt: list[int], numbers: list[int], limit: int | None
) -> None:
    choose = picking(numbers)

    def checked(request: Request, branch: Branch) -> int:
        path = branch
        while path.parent is not None:
            fork = next(item for item in reversed(path.parent.items) if isinstance(item, Fork))
            earlier = fork.children[: fork.children.index(path)]
            assert all(sibling.status is BranchStatus.FINISHED for sibling in earlier)
            assert path.parent.status is BranchStatus.WAITING
            path = path.parent
        return choose(request, branch)

    request = new_request(prompt, rules(250, max_path_tokens=limit))
    played = play(request, checked, width=1)
    assert {len(asked) for asked in played.rounds} == {1}


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_parallel_mode_asks_every_running_branch_in_every_round(name: str) -> None:
    script = SCRIPTS[name]
    request = new_request(script.ids[:1])
    running: list[list[Branch]] = []

    def choose(request: Request, branch: Branch) -> int:
        running.append([each for each in request.branches() if each.status is BranchStatus.RUNNING])
        return script.answer(branch.history)

    played = play(request, choose)
    assert [asked for asked in played.rounds for _ in asked] == running
