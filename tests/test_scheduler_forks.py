"""Fork and merge of the branches of a request."""

import pytest
from cases import both_modes
from multiverse.generation.branch import BranchStatus, Choice
from scripted_requests import (
    LETTER,
    SCRIPTS,
    check_finished,
    check_order,
    cuts,
    following,
    new_request,
    outcome,
    play,
)
from tiny import TOKEN_IDS, tiny_ids


@both_modes
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_scripted_text_is_written_with_its_forced_tokens(name: str, parallel: bool) -> None:
    script = SCRIPTS[name]
    request = new_request(script.ids[:1])
    played = play(request, following(script), None if parallel else 1)
    assert outcome(request) == (script.ids, script.forced)
    assert request.finish_reason == "eos"
    check_order(request, played, check_finished(request))
    assert {branch.finish_reason for branch in request.branches() if branch.parent is not None} == {"closed"}


@both_modes
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_prompt_cut_anywhere_goes_on_as_if_it_had_been_generated(name: str, parallel: bool) -> None:
    script = SCRIPTS[name]
    for length in cuts(script):
        request = new_request(script.ids[:length])
        played = play(request, following(script), None if parallel else 1)
        assert outcome(request) == (script.ids, [index for index in script.forced if index >= length]), length
        check_order(request, played, check_finished(request))


def test_paths_fork_together_and_the_parent_waits_for_the_last() -> None:
    request = new_request(tiny_ids("a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline>"))
    request.accept(request.root, Choice(TOKEN_IDS["</Goal>"]))
    root, first, second = request.branches()
    assert [branch.label for branch in (root, first, second)] == ["", "1", "2"]
    assert root.status is BranchStatus.WAITING
    assert {first.status, second.status} == {BranchStatus.RUNNING}
    assert first.next_position == second.next_position
    assert [token.id for token in second.pending] == tiny_ids("<Path> _ 2 :")

    request.accept(second, Choice(TOKEN_IDS["</Path>"]))
    assert (root.status, second.status) == (BranchStatus.WAITING, BranchStatus.FINISHED)
    request.accept(first, Choice(LETTER))
    request.accept(first, Choice(TOKEN_IDS["</Path>"]))
    assert (root.status, first.status) == (BranchStatus.RUNNING, BranchStatus.FINISHED)
    assert [token.id for token in root.pending][-1] == TOKEN_IDS["<Conclusion>"]
    # `</Goal>` stands at 9; path 1 is the longer one: `<Path> _ 1 : a </Path>`.
    assert root.next_position - 1 == 9 + 6 + 1
