"""Requests, branches and the scheduler by themselves: scripted and random answers in the place of a model's.

`play` does what the engine does, less the model: it takes pending tokens off in the scheduler's order and lets every
branch that is asked grow by one answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from multiverse import BranchLayout
from multiverse.forced import HeaderTokens
from multiverse.generation.branch import Branch, BranchStatus, Choice, Fork, Token
from multiverse.generation.request import Request, RequestRules
from multiverse.generation.scheduler import branches_to_run
from strategies import any_length, trees, truncated
from tiny import COLON, DIGITS, DOT, EOS, NEWLINE, TOKEN_IDS, WORDS, Script, from_strategy

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

budgets = st.integers(1, 150)
path_limits = st.none() | st.integers(1, 16)
separators = st.sampled_from([[NEWLINE], [], [NEWLINE, WORDS["z"]]])
picks = any_length(st.integers(0, 40), 60)
cut_prompts = truncated(trees(80)).map(lambda sample: from_strategy(sample.ids)).filter(bool)


def examples(number: int) -> settings:
    return settings(deadline=None, derandomize=True, max_examples=number, suppress_health_check=[HealthCheck.too_slow])


def rules(max_new_tokens: int = PLENTY, separator: Sequence[int] = (NEWLINE,), **limits: int | None) -> RequestRules:
    return RequestRules(TOKEN_IDS, HeaderTokens(separator, LABEL_IDS), frozenset([EOS]), max_new_tokens, **limits)


def new_request(prompt: Sequence[int], limits: RequestRules | None = None) -> Request:
    return Request(list(prompt), limits or rules())


Chooser = Callable[[Request, Branch], int]


@dataclass
class Play:
    """What happened: tokens in the order in which they were run, and who was asked in every round."""

    run: list[Token] = field(default_factory=list)
    rounds: list[list[Branch]] = field(default_factory=list)


def play(request: Request, choose: Chooser, width: int | None = None) -> Play:
    """Decodes to the end; after every answer, what is open must still fit into the budget."""
    played = Play()
    asked = [branch for branch in request.branches() if branch.status is BranchStatus.RUNNING and not branch.pending]
    while True:
        if asked:
            played.rounds.append(asked)
            request.steps += 1
        for branch, answer in [(branch, choose(request, branch)) for branch in asked]:
            if not request.finished:
                request.accept(branch, Choice(answer))
                assert request.made + request.closing_cost <= request.rules.max_new_tokens
        if request.finished:
            return played
        plan = branches_to_run(request, width)
        assert plan
        for branch in plan:
            played.run += branch.pending
            branch.pending.clear()
        asked = [branch for branch in plan if branch.status is BranchStatus.RUNNING]


def following(script: Script) -> Chooser:
    return lambda request, branch: script.answer(branch.history)


def picking(numbers: Sequence[int]) -> Chooser:
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
        assert places.get(branch, {branch}) == {branch}

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


def cuts(script: Script) -> list[int]:
    """Prompt lengths after which the engine writes all that is forced: a header once begun is the model's to end."""
    before = [TOKEN_IDS[tag] for tag in ("</Goal>", "</Path>")]
    own = [TOKEN_IDS[tag] for tag in ("<Path>", "<Conclusion>")]
    ids = script.ids
    header = {index for index in script.forced if ids[index] not in own and ids[index - 1] not in before}
    return [length for length in range(1, len(ids)) if length not in header]
