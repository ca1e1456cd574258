"""Requests, branches and the scheduler by themselves: scripted and random answers in the place of a model's.

`play` does what the engine does, less the model: it takes pending tokens off in the scheduler's order and lets every
branch that is asked grow by one answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from multiverse import BranchLayout
from multiverse.forced import HeaderTokens
from multiverse.generation.branch import Branch, BranchStatus, Fork, Token
from multiverse.generation.request import Request, RequestRules
from multiverse.generation.scheduler import branches_to_run
from strategies import Sample, shuffled, trees, truncated
from tiny import COLON, DIGITS, DOT, EOS, NEWLINE, TOKEN_IDS, WORDS, Script, from_strategy, tiny_ids

LABEL_IDS = {**DIGITS, ".": DOT, ":": COLON}
LETTER = WORDS["a"]
PLENTY = 10_000

TWO_PATHS = Script(
    "a <Parallel> _ <Goal> _ <Outline> _ 1 : b _ </Outline> _ <Outline> _ 2 : c _ </Outline> _ </Goal> _* "
    "<Path>* _* 1* :* d e </Path> _* "
    "<Path>* _* 2* :* f g h _ </Path> _* "
    "<Conclusion>* _ i </Conclusion> _ </Parallel> j $"
)
# Two nested blocks in path 2 (one of them in the other), a block in the conclusion, a block after it.
NESTED = Script(
    "a <Parallel> _ <Goal> _ <Outline> _ 1 : b </Outline> _ <Outline> c </Outline> <Outline> d </Outline> </Goal> _* "
    "<Path>* _* 1* :* e f </Path> _* "
    "<Path>* _* 2* :* g _ <Parallel> <Goal> <Outline> h </Outline> <Outline> i </Outline> j </Goal> _* "
    "<Path>* _* 2* .* 1* :* k <Parallel> <Goal> <Outline> 7 : </Outline> </Goal> _* "
    "<Path>* _* 7* :* l </Path> _* <Conclusion>* m </Conclusion> n </Parallel> o </Path> _* "
    "<Path>* _* 2* .* 2* :* p q r s t </Path> _* "
    "<Conclusion>* u </Conclusion> v </Parallel> w </Path> _* "
    "<Path>* _* 3* :* x </Path> _* "
    "<Conclusion>* y <Parallel> <Goal> <Outline> z </Outline> </Goal> _* <Path>* _* 1* :* a b </Path> _* "
    "<Conclusion>* </Conclusion> </Parallel> c </Conclusion> d </Parallel> e "
    "<Parallel> <Goal> <Outline> f </Outline> <Outline> g </Outline> </Goal> _* <Path>* _* 1* :* h </Path> _* "
    "<Path>* _* 2* :* i j </Path> _* <Conclusion>* k </Conclusion> </Parallel> $"
)
SCRIPTS = {"two paths": TWO_PATHS, "nested": NESTED}

both_modes = pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
budgets = st.integers(1, 150)
path_limits = st.none() | st.integers(1, 16)
separators = st.sampled_from([[NEWLINE], [], [NEWLINE, WORDS["z"]]])
picks = st.lists(st.integers(0, 40), max_size=150)
cut_prompts = truncated(trees(80)).map(lambda sample: from_strategy(sample.ids)).filter(bool)
any_prompts = shuffled(70).map(lambda sample: from_strategy(sample.ids)).filter(bool)


def examples(number: int) -> settings:
    return settings(deadline=None, derandomize=True, max_examples=number, suppress_health_check=[HealthCheck.too_slow])


def rules(max_new_tokens: int = PLENTY, separator: Sequence[int] = (NEWLINE,), **limits: int | None) -> RequestRules:
    return RequestRules(TOKEN_IDS, HeaderTokens(separator, LABEL_IDS), frozenset([EOS]), max_new_tokens, **limits)


def new_request(prompt: Sequence[int], limits: RequestRules | None = None) -> Request:
    numbers = count()
    return Request(list(prompt), limits or rules(), lambda: next(numbers))


Choice = Callable[[Request, Branch], int]


@dataclass
class Play:
    """What happened: tokens in the order in which they were run, and who was asked in every round."""

    run: list[Token] = field(default_factory=list)
    rounds: list[list[Branch]] = field(default_factory=list)


def play(request: Request, choose: Choice, parallel: bool = True) -> Play:
    """Decodes to the end; after every answer, what is open must still fit into the budget."""
    played = Play()
    asked = [branch for branch in request.branches() if branch.status is BranchStatus.RUNNING and not branch.pending]
    while True:
        if asked:
            played.rounds.append(asked)
            request.steps += 1
        for branch, answer in [(branch, choose(request, branch)) for branch in asked]:
            if not request.finished:
                request.accept(branch, answer)
                assert request.made + request.closing_cost() <= request.rules.max_new_tokens
        if request.finished:
            return played
        plan = branches_to_run(request, parallel)
        assert plan
        for branch in plan:
            played.run += branch.pending
            branch.pending.clear()
        asked = [branch for branch in plan if branch.status is BranchStatus.RUNNING]


def following(script: Script) -> Choice:
    return lambda request, branch: script.answer(branch.history)


def picking(numbers: Sequence[int]) -> Choice:
    """Answers that are not banned, by the given numbers; plain words once those are used up."""
    left = iter(numbers)

    def choose(request: Request, branch: Branch) -> int:
        banned = request.banned_tokens(branch)
        tags = [token_id for token_id in TOKEN_IDS.values() if token_id not in banned]
        end = [] if EOS in banned else [EOS]
        options = [LETTER, *tags, *tags, WORDS["1"], COLON, NEWLINE, *end]
        return options[next(left, 0) % len(options)]

    return choose


def linear_tokens(branch: Branch) -> list[tuple[Branch, Token]]:
    """Every generated token from `branch` down with the branch that wrote it, in linear order."""
    found = []
    for item in branch.items:
        if isinstance(item, Fork):
            found += [pair for child in item.children for pair in linear_tokens(child)]
        else:
            found.append((branch, item))
    return found


def sequence(request: Request) -> list[int]:
    return [*request.prompt, *(token.id for _, token in linear_tokens(request.root))]


def check_finished(request: Request, histories: bool = True) -> BranchLayout:
    """Checks a finished request against the layout of what it wrote, which knows nothing of requests."""
    written = linear_tokens(request.root)
    ids = sequence(request)
    layout = BranchLayout.from_token_ids(ids, TOKEN_IDS)
    first = len(request.prompt)
    assert request.finished
    assert [token.position for _, token in written] == layout.position_ids[first:].tolist()
    assert request.made == len(written) <= request.rules.max_new_tokens
    assert sum(branch.written for branch in request.branches()) == len(written)
    assert [token.id for token in request.root.tokens()] == ids[first:]

    places: dict[int, set[int]] = {}
    for (branch, _), place in zip(written, layout.branch_ids[first:].tolist(), strict=True):
        places.setdefault(branch.number, set()).add(place)
    assert all(len(found) == 1 for found in places.values()), "a branch is one branch of the text"
    assert len(set().union(*places.values())) == len(places), "two branches are two branches of the text"
    prompt_branches = sorted(set(layout.branch_ids[:first].tolist()))
    for branch in prompt_branches:
        assert places.get(request.prompt_labels[branch], {branch}) == {branch}

    seen = layout.attention_mask()
    last = {branch: index for index, (branch, _) in enumerate(written, start=first)}
    for branch, index in last.items():
        expected = [ids[other] for other in seen[index].nonzero().flatten().tolist()]
        assert branch.history == expected or not histories
    return layout


def check_order(request: Request, played: Play, layout: BranchLayout) -> None:
    """Every token is run once at most, after all that it sees."""
    first = len(request.prompt)
    index_of = {id(token): index for index, (_, token) in enumerate(linear_tokens(request.root), start=first)}
    seen = layout.attention_mask()
    done = torch.zeros(len(layout), dtype=torch.bool)
    done[:first] = True
    for token in played.run:
        index = index_of[id(token)]
        assert not done[index]
        done[index] = True
        assert done[seen[index]].all()
    pending = {index_of[id(token)] for branch in request.branches() for token in branch.pending}
    assert pending == set((~done).nonzero().flatten().tolist())


def closed_problems(layout: BranchLayout) -> list[str]:
    open_kinds = ("stray close", "path outside a block", "unclosed block")
    return [str(problem) for problem in layout.problems if problem.kind in open_kinds]


def outcome(request: Request) -> tuple[list[int], list[int]]:
    """Ids of the whole row, and the indices of forced tokens."""
    written = linear_tokens(request.root)
    forced = [index for index, (_, token) in enumerate(written, start=len(request.prompt)) if token.forced]
    return sequence(request), forced


# Fork and merge.


@both_modes
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_scripted_text_is_written_with_its_forced_tokens(name: str, parallel: bool) -> None:
    script = SCRIPTS[name]
    request = new_request(script.ids[:1])
    played = play(request, following(script), parallel)
    assert outcome(request) == (script.ids, script.forced)
    assert request.finish_reason == "eos"
    check_order(request, played, check_finished(request))
    assert {branch.finish_reason for branch in request.branches() if branch.parent is not None} == {"closed"}


def cuts(script: Script) -> list[int]:
    """Prompt lengths after which the engine writes all that is forced: a header once begun is the model's to end."""
    before = [TOKEN_IDS[tag] for tag in ("</Goal>", "</Path>")]
    own = [TOKEN_IDS[tag] for tag in ("<Path>", "<Conclusion>")]
    ids = script.ids
    header = {index for index in script.forced if ids[index] not in own and ids[index - 1] not in before}
    return [length for length in range(1, len(ids)) if length not in header]


@both_modes
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_prompt_cut_anywhere_goes_on_as_if_it_had_been_generated(name: str, parallel: bool) -> None:
    script = SCRIPTS[name]
    for length in cuts(script):
        request = new_request(script.ids[:length])
        played = play(request, following(script), parallel)
        assert outcome(request) == (script.ids, [index for index in script.forced if index >= length]), length
        check_order(request, played, check_finished(request))


def test_paths_fork_together_and_the_parent_waits_for_the_last() -> None:
    request = new_request(tiny_ids("a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline>"))
    request.accept(request.root, TOKEN_IDS["</Goal>"])
    root, first, second = request.branches()
    assert [branch.label for branch in (root, first, second)] == ["", "1", "2"]
    assert root.status is BranchStatus.WAITING
    assert {first.status, second.status} == {BranchStatus.RUNNING}
    assert first.next_position == second.next_position
    assert [token.id for token in second.pending] == tiny_ids("<Path> _ 2 :")

    request.accept(second, TOKEN_IDS["</Path>"])
    assert (root.status, second.status) == (BranchStatus.WAITING, BranchStatus.FINISHED)
    request.accept(first, LETTER)
    request.accept(first, TOKEN_IDS["</Path>"])
    assert (root.status, first.status) == (BranchStatus.RUNNING, BranchStatus.FINISHED)
    assert [token.id for token in root.pending][-1] == TOKEN_IDS["<Conclusion>"]
    # `</Goal>` stands at 9; path 1 is the longer one: `<Path> _ 1 : a </Path>`.
    assert root.next_position - 1 == 9 + 6 + 1


def test_branches_of_one_block_do_not_see_each_other_and_the_parent_sees_them_after_the_merge() -> None:
    request = new_request(TWO_PATHS.ids[:1])
    by_round: list[set[int]] = []

    def choose(request: Request, branch: Branch) -> int:
        by_round.append(branch.visible)
        return TWO_PATHS.answer(branch.history)

    play(request, choose)
    root, first, second = request.branches()
    assert first.visible == {root.number, first.number}
    assert second.visible == {root.number, second.number}
    assert root.visible == {root.number, first.number, second.number}
    assert by_round[0] == root.visible, "the same set grows"


# Run order.


@examples(150)
@given(picks, budgets, path_limits, st.booleans())
def test_no_token_is_run_before_one_that_it_sees(
    numbers: list[int], budget: int, limit: int | None, parallel: bool
) -> None:
    request = new_request(tiny_ids("a"), rules(budget, max_path_tokens=limit))
    played = play(request, picking(numbers), parallel)
    check_order(request, played, check_finished(request))


@examples(100)
@given(cut_prompts, picks, path_limits, st.booleans())
def test_no_token_after_a_cut_prompt_is_run_before_one_that_it_sees(
    prompt: list[int], numbers: list[int], limit: int | None, parallel: bool
) -> None:
    request = new_request(prompt, rules(250, max_path_tokens=limit))
    played = play(request, picking(numbers), parallel)
    check_order(request, played, check_finished(request))


def test_plan_holds_a_waiting_parent_before_its_paths_and_a_merged_one_after_them() -> None:
    request = new_request(tiny_ids("a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline>"))
    request.accept(request.root, TOKEN_IDS["</Goal>"])
    root, first, second = request.branches()
    assert branches_to_run(request, parallel=True) == [root, first, second]
    assert branches_to_run(request, parallel=False) == [root, first]
    for branch in (root, first):
        branch.pending.clear()
    request.accept(first, TOKEN_IDS["</Path>"])
    assert branches_to_run(request, parallel=True) == [first, second]
    assert branches_to_run(request, parallel=False) == [first, second]
    first.pending.clear()
    second.pending.clear()
    request.accept(second, TOKEN_IDS["</Path>"])
    assert branches_to_run(request, parallel=True) == [second, root]
    assert branches_to_run(request, parallel=False) == [second, root]


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_sequential_mode_asks_one_branch_at_a_time_in_linear_order(name: str) -> None:
    script = SCRIPTS[name]
    request = new_request(script.ids[:1])
    played = play(request, following(script), parallel=False)
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
    played = play(request, checked, parallel=False)
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


# Budgets.


@examples(400)
@given(picks, budgets, path_limits, separators, st.booleans())
def test_budget_is_kept_and_everything_is_closed(
    numbers: list[int], budget: int, limit: int | None, separator: list[int], parallel: bool
) -> None:
    request = new_request(tiny_ids("a b"), rules(budget, separator, max_path_tokens=limit))
    play(request, picking(numbers), parallel)
    assert closed_problems(check_finished(request)) == []
    assert request.closing_cost() == 0


@examples(200)
@given(cut_prompts, picks, st.integers(0, 60), path_limits, separators, st.booleans())
def test_what_a_cut_prompt_leaves_open_is_closed_within_the_budget(
    prompt: list[int], numbers: list[int], extra: int, limit: int | None, separator: list[int], parallel: bool
) -> None:
    unlimited = new_request(prompt, rules(PLENTY, separator))
    needed = unlimited.made + unlimited.closing_cost()
    assume(needed + extra > 0)
    request = new_request(prompt, rules(needed + extra, separator, max_path_tokens=limit))
    play(request, picking(numbers), parallel)
    assert closed_problems(check_finished(request)) == []


@examples(150)
@example(tiny_ids("<Think> a <Parallel> <Goal> </Think> b"), [], None, True)
@example(tiny_ids("<Think> <Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Think>"), [], None, True)
@example(tiny_ids("<Parallel> <Conclusion> <Path> a"), [], None, True)
@given(any_prompts, picks, path_limits, st.booleans())
def test_malformed_prompt_goes_on_where_its_layout_says(
    prompt: list[int], numbers: list[int], limit: int | None, parallel: bool
) -> None:
    request = new_request(prompt, rules(300, max_path_tokens=limit))
    played = play(request, picking(numbers), parallel)
    # Where a path stands after its block's conclusion, what is seen has no one order.
    check_order(request, played, check_finished(request, histories=False))


@both_modes
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_every_budget_cuts_a_scripted_text_into_a_closed_one(name: str, parallel: bool) -> None:
    script = SCRIPTS[name]
    for budget in range(1, len(script.ids)):
        request = new_request(script.ids[:1], rules(budget))
        play(request, following(script), parallel)
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
        for budget in range(least.made + least.closing_cost(), 45):
            request = new_request(prompt, rules(budget, separator, max_path_tokens=limit))
            play(request, choose, parallel)
            assert closed_problems(check_finished(request)) == [], (limit, budget)
            assert request.finish_reason == "length"


def test_plain_text_uses_the_whole_budget() -> None:
    for budget in range(1, 6):
        request = new_request(tiny_ids("a"), rules(budget))
        play(request, picking([]))
        assert sequence(request) == [LETTER] * (1 + budget)
        assert request.finish_reason == "length"


def test_tag_that_opens_no_block_may_be_the_last_token() -> None:
    request = new_request(tiny_ids("a"), rules(1))
    request.accept(request.root, TOKEN_IDS["<Think>"])
    assert sequence(request) == tiny_ids("a <Think>")
    assert request.finish_reason == "length"


CLOSINGS = {
    "a": "",
    "<Think> a": "",
    "a <Parallel>": "<Conclusion> </Conclusion> </Parallel>",
    "<Think> a <Parallel>": "<Conclusion> </Conclusion> </Parallel>",
    "a <Parallel> <Goal>": "</Goal> <Conclusion> </Conclusion> </Parallel>",
    "a <Parallel> <Goal> <Outline> b": "</Outline> </Goal> <Conclusion> </Conclusion> </Parallel>",
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
        "</Outline> </Goal> <Conclusion> </Conclusion> </Parallel> </Path> <Conclusion> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Path> a": "</Path> <Conclusion> </Conclusion> </Parallel>",
    "<Parallel> <Path> a </Path> _ <Conclusion> b": "</Conclusion> </Parallel>",
    "<Parallel> <Path> a </Path> _ <Conclusion> b <Parallel> <Goal>": (
        "</Goal> <Conclusion> </Conclusion> </Parallel> </Conclusion> </Parallel>"
    ),
    "<Parallel> <Path> a </Path> _ <Conclusion> b </Conclusion>": "</Parallel>",
    "<Parallel> <Path> a </Path> _ <Conclusion> b </Conclusion> </Parallel>": "",
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


# Labels.


def goal(outlines: Sequence[str]) -> str:
    return "<Parallel> <Goal> " + " ".join(f"<Outline> {outline} </Outline>" for outline in outlines) + " </Goal>"


@pytest.mark.parametrize(
    ("outlines", "labels"),
    [
        (["a", "b"], ["1", "2"]),
        (["2 : a", "1 : b"], ["2", "1"]),
        (["_ 3 : a", "b", "_ _ 3 : c"], ["3", "2", "3"]),
        (["1 0 : a", "1 2 . 1 0 : b"], ["10", "12.10"]),
        (["1 a", "1 . : b", ": c", ""], ["1", "2", "3", "4"]),
        (["7 :"] * 3, ["7", "7", "7"]),
        (["a"] * 20, [str(number) for number in range(1, 21)]),
    ],
)
def test_paths_carry_the_labels_of_their_outlines(outlines: list[str], labels: list[str]) -> None:
    text = goal(outlines)
    generated = new_request(tiny_ids("a"))
    for token_id in tiny_ids(text):
        generated.accept(generated.root, token_id)
    for request in (generated, new_request(tiny_ids(text)), new_request(tiny_ids(text + " _"))):
        paths = request.branches()[1:]
        assert [path.label for path in paths] == labels
        for path, label in zip(paths, labels, strict=True):
            assert [token.id for token in path.pending] == tiny_ids("<Path> _ " + " ".join(label) + " :")


@pytest.mark.parametrize(("outer", "inner"), [("a", ["1.1", "1.2"]), ("4 . 2 : a", ["4.2.1", "4.2.2"])])
def test_outline_without_a_label_is_numbered_below_its_path(outer: str, inner: list[str]) -> None:
    request = new_request(tiny_ids(goal([outer])))
    path = request.branches()[1]
    for token_id in tiny_ids(goal(["b", "c"])):
        request.accept(path, token_id)
    assert [branch.label for branch in request.branches()[2:]] == inner


def test_sample_strategy_fits_the_fixed_vocabulary() -> None:
    assert from_strategy(Sample([0, 12]).ids) == [TOKEN_IDS["<Think>"], NEWLINE]
