"""Budgets and ends of requests and paths: all that is open is closed in time."""

import pytest
from cases import both_modes
from hypothesis import assume, example, given
from hypothesis import strategies as st
from multiverse.generation.branch import Branch, Choice, Fork, Token
from multiverse.generation.request import Request
from scripted_requests import (
    LETTER,
    NESTED,
    PLENTY,
    SCRIPTS,
    budgets,
    check_finished,
    check_order,
    closed_problems,
    cut_prompts,
    cuts,
    examples,
    following,
    new_request,
    outcome,
    path_limits,
    picking,
    picks,
    play,
    rules,
    separators,
    sequence,
)
from strategies import any_length, shuffled
from tiny import COLON, EOS, NEWLINE, TOKEN_IDS, WORDS, Script, from_strategy, tiny_ids

any_prompts = shuffled(70).map(lambda sample: from_strategy(sample.ids)).filter(bool)


@examples(400)
@given(picks, budgets, path_limits, separators, st.booleans())
def test_budget_is_kept_and_everything_is_closed(
    numbers: list[int], budget: int, limit: int | None, separator: list[int], parallel: bool
) -> None:
    request = new_request(tiny_ids("a b"), rules(budget, separator, max_path_tokens=limit))
    play(request, picking(numbers), None if parallel else 1)
    assert closed_problems(check_finished(request)) == []
    assert request.closing_cost == 0


class Exact(Request):
    """Checks what every accepted token was said to take of the budget."""

    def accept(self, branch: Branch, choice: Choice) -> None:
        before, expected = self.made + self.closing_cost, self._growth(branch, choice.token_id)
        super().accept(branch, choice)
        if not self.finished:
            assert self.made + self.closing_cost == before + expected


@examples(300)
@given(cut_prompts, picks, separators)
def test_every_token_takes_what_was_reckoned_with(prompt: list[int], numbers: list[int], separator: list[int]) -> None:
    request = Exact(prompt, rules(250, separator))
    play(request, picking(numbers))
    check_finished(request)


@examples(200)
@given(cut_prompts, picks, st.integers(0, 60), path_limits, separators, st.booleans())
def test_what_a_cut_prompt_leaves_open_is_closed_within_the_budget(
    prompt: list[int], numbers: list[int], extra: int, limit: int | None, separator: list[int], parallel: bool
) -> None:
    unlimited = new_request(prompt, rules(PLENTY, separator))
    needed = unlimited.made + unlimited.closing_cost
    assume(needed + extra > 0)
    request = new_request(prompt, rules(needed + extra, separator, max_path_tokens=limit))
    play(request, picking(numbers), None if parallel else 1)
    assert closed_problems(check_finished(request)) == []


@examples(150)
@example(tiny_ids("<Think> a <Parallel> <Goal> </Think> b"), [], 300, None, True)
@example(tiny_ids("<Think> <Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Think>"), [], 300, None, True)
@example(tiny_ids("<Parallel> <Conclusion> <Path> a"), [], 300, None, True)
@given(any_prompts, any_length(st.integers(0, 40), 150), st.integers(10, 300), path_limits, st.booleans())
def test_malformed_prompt_goes_on_where_its_layout_says(
    prompt: list[int], numbers: list[int], budget: int, limit: int | None, parallel: bool
) -> None:
    try:
        request = new_request(prompt, rules(budget, max_path_tokens=limit))
    except ValueError:
        unlimited = new_request(prompt)
        assert unlimited.made + unlimited.closing_cost > budget
        return
    played = play(request, picking(numbers), None if parallel else 1)
    # Where a path stands after its block's conclusion, what is seen has no one order.
    check_order(request, played, check_finished(request, histories=False))


@both_modes
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_every_budget_cuts_a_scripted_text_into_a_closed_one(name: str, parallel: bool) -> None:
    script = SCRIPTS[name]
    for budget in range(1, len(script.ids)):
        request = new_request(script.ids[:1], rules(budget))
        play(request, following(script), None if parallel else 1)
        assert closed_problems(check_finished(request)) == [], budget
        assert request.finish_reason == ("eos" if budget == len(script.ids) - 1 else "length"), budget


@both_modes
@pytest.mark.parametrize("ending", ["a", "</Path>", "$"])
@pytest.mark.parametrize("separator", [[], [NEWLINE], [NEWLINE, WORDS["z"]]], ids=len)
def test_path_may_end_where_the_budget_does(separator: list[int], ending: str, parallel: bool) -> None:
    prompt = tiny_ids("a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline> </Goal>")

    def choose(request: Request, branch: Branch) -> int:
        return WORDS[ending] if branch.parent is not None and branch.history[-1] == LETTER else LETTER

    least = new_request(prompt, rules(separator=separator))
    for limit in (None, 5, 6, 9):
        for budget in range(least.made + least.closing_cost, 45):
            request = new_request(prompt, rules(budget, separator, max_path_tokens=limit))
            play(request, choose, None if parallel else 1)
            assert closed_problems(check_finished(request)) == [], (limit, budget)
            assert request.finish_reason == "length"


def test_plain_text_uses_the_whole_budget() -> None:
    for budget in range(1, 6):
        request = new_request(tiny_ids("a"), rules(budget))
        play(request, picking([]))
        assert sequence(request) == [LETTER] * (1 + budget)
        assert request.finish_reason == "length"


@pytest.mark.parametrize(("budget", "written"), [(1, "a"), (2, "a <Think> </Think>")])
def test_generated_tag_is_closed_even_outside_a_block(budget: int, written: str) -> None:
    request = new_request(tiny_ids("a"), rules(budget))
    request.accept(request.root, Choice(TOKEN_IDS["<Think>"]))
    assert sequence(request) == tiny_ids(written)
    assert request.finish_reason == "length"


CLOSINGS = {
    "a": "",
    "<Think> a": "",
    "a <Parallel>": ("<Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel>"),
    "<Think> a <Parallel>": (
        "<Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "a <Parallel> <Goal>": "<Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel>",
    "a <Parallel> <Goal> <Outline> b": "</Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel>",
    "a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline>": (
        "</Goal> <Path> </Path> <Path> </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Goal> <Outline> b </Outline> </Goal>": (
        "_ <Path> _ 1 : </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Goal> <Outline> b </Outline> </Goal> _": (
        "<Path> _ 1 : </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline> </Goal> <Path> d": (
        "</Path> <Path> _ 2 : </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline> </Goal> <Path> d </Path>": (
        "_ <Path> _ 2 : </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Goal> <Outline> b </Outline> </Goal> <Path> d </Path>": ("_ <Conclusion> </Conclusion> </Parallel>"),
    "<Parallel> <Goal> <Outline> b </Outline> </Goal> <Path> d </Path> _": "<Conclusion> </Conclusion> </Parallel>",
    "<Parallel> <Goal> <Outline> b </Outline> </Goal> <Path> <Parallel> <Goal> <Outline>": (
        "</Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel> </Path> <Conclusion> </Conclusion> "
        "</Parallel>"
    ),
    "<Parallel> <Path> a": "</Path> <Conclusion> </Conclusion> </Parallel>",
    "<Parallel> <Path> a </Path> _ <Conclusion> b": "</Conclusion> </Parallel>",
    "<Parallel> <Path> a </Path> _ <Conclusion> b <Parallel> <Goal>": (
        "<Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Path> a </Path> _ <Conclusion> b </Conclusion>": "</Parallel>",
    "<Parallel> <Path> a </Path> _ <Conclusion> b </Conclusion> </Parallel>": "",
    # Malformed: what structure knows nothing of is not closed, outlines anywhere before the paths get one each.
    "a <Goal> <Outline> b": "",
    "<Parallel> <Goal> <Parallel>": (
        "<Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel> "
        "<Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Goal> <Outline> 1 : b </Outline> <Parallel>": (
        "<Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel> "
        "</Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Outline> b": (
        "</Outline> <Goal> <Outline> </Outline> </Goal> <Path> </Path> <Path> </Path> <Conclusion> </Conclusion> "
        "</Parallel>"
    ),
    "<Parallel> <Conclusion> a <Goal>": (
        "<Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> </Goal> <Parallel>": (
        "<Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion> </Parallel> "
        "<Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Path> a <Goal> <Outline>": "</Path> <Conclusion> </Conclusion> </Parallel>",
}


@pytest.mark.parametrize("prompt", list(CLOSINGS))
def test_tightest_budget_holds_exactly_the_closing_of_a_prompt(prompt: str) -> None:
    closing = tiny_ids(CLOSINGS[prompt])
    request = new_request(tiny_ids(prompt), rules(max(len(closing), 1)))
    play(request, picking([]))
    assert sequence(request) == [*tiny_ids(prompt), *(closing or [LETTER])]
    assert request.finish_reason == "length"
    check_finished(request)
    if closing:
        with pytest.raises(ValueError, match=rf"`max_new_tokens` is {len(closing) - 1}.*takes {len(closing)} tokens"):
            new_request(tiny_ids(prompt), rules(len(closing) - 1))


@examples(200)
@given(picks, st.integers(1, 16), separators)
def test_path_without_blocks_never_holds_more_than_its_limit(
    numbers: list[int], limit: int, separator: list[int]
) -> None:
    request = new_request(tiny_ids("a"), rules(200, separator, max_path_tokens=limit))
    play(request, picking(numbers))
    check_finished(request)
    for branch in request.branches():
        if branch.parent is None or any(isinstance(item, Fork) for item in branch.items):
            continue
        ids = [item.id for item in branch.items if isinstance(item, Token)]
        if TOKEN_IDS["<Parallel>"] in ids:
            continue
        held = ids.index(TOKEN_IDS["</Path>"]) + 1
        if held == 2:
            continue  # there was no room to work on this outline
        header = ids.index(COLON) + 1
        # A header is written whole, and the model is asked once at least.
        assert held <= max(limit, header + 2)
        assert branch.finish_reason != "max_path_tokens" or held == max(limit, header + 2)


def test_path_limit_waits_for_a_nested_block_to_close() -> None:
    prompt = tiny_ids("<Parallel> <Goal> <Outline> b </Outline> </Goal>")
    request = new_request(prompt, rules(max_path_tokens=6))
    inner = Script(
        "<Parallel> <Goal> <Outline> b </Outline> </Goal> _* <Path>* _* 1* :* <Parallel> <Goal> <Outline> c "
        "</Outline> </Goal> _* <Path>* _* 1* .* 1* :* </Path> _* <Conclusion>* </Conclusion> </Parallel> "
        "</Path>* _* <Conclusion>* </Conclusion> </Parallel> $"
    )
    play(request, following(inner))
    assert outcome(request) == (inner.ids, inner.forced)
    assert [branch.finish_reason for branch in request.branches()] == [None, "max_path_tokens", "closed"]


def test_end_of_sequence_inside_a_path_becomes_a_forced_close() -> None:
    script = Script(
        "a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline> </Goal> _* <Path>* _* 1* :* d </Path>! _* "
        "<Path>* _* 2* :* </Path>! _* <Conclusion>* </Conclusion> </Parallel> $"
    )
    request = new_request(script.ids[:1])
    play(request, following(script))
    assert outcome(request) == (script.ids, script.forced)
    assert [branch.finish_reason for branch in request.branches()] == [None, "eos", "eos"]
    check_finished(request)


@examples(200)
@given(picks, path_limits)
def test_end_of_sequence_stands_at_the_end_alone(numbers: list[int], limit: int | None) -> None:
    request = new_request(tiny_ids("a"), rules(200, max_path_tokens=limit))
    play(request, picking(numbers))
    ids = sequence(request)
    assert EOS not in ids[:-1]
    assert (ids[-1] == EOS) == (request.finish_reason == "eos")


def test_request_stopped_from_outside_is_closed() -> None:
    for length in cuts(NESTED):
        request = new_request(NESTED.ids[:length])
        request.close("stopped")
        assert request.finish_reason == "stopped"
        assert closed_problems(check_finished(request)) == [], length
