"""What the tests of decode share: random branches of several requests over one cache, and inputs that hold NaN
wherever no query may look."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from multiverse.kernels.decode_plan import ROWS_PER_WORD, DecodePlan, RequestQueries, pack_rows


@dataclass
class DecodeCase:
    """The new tokens of a step, and what they see by definition.

    Attributes:
        requests (`list[RequestQueries]`): what the plan is built from.
        plan (`DecodePlan`): of T queries over a cache of `capacity` slots.
        visible (`torch.BoolTensor` of shape `(T, capacity)`): noted while the branches ran, not read off the plan.
    """

    requests: list[RequestQueries]
    plan: DecodePlan
    visible: torch.Tensor

    @property
    def listed(self) -> torch.Tensor:
        """Bool of shape `(capacity,)`: slots that the plan lists."""
        listed = torch.zeros(self.visible.shape[1], dtype=torch.bool)
        listed[self.plan.slot_index.long()] = True
        return listed


@dataclass
class Story:
    """One request: the slots that each table row sees at the end, and the row and visible slots of every query. Slots
    count from the first of the request; the queries stand in the last ones."""

    sees: dict[int, set[int]]
    queries: list[tuple[int, set[int]]]
    tokens: int


def random_story(rng: random.Random, history: int, queries: int, rows: int, branches: int) -> Story:
    """Branches that fork, run and merge at random over `history` slots, then run `queries` new tokens.

    Args:
        rows (`int`): table rows, which the branches take in random order.
        branches (`int`): branches that fork off at the beginning.
    """
    sees: dict[int, set[int]] = {rng.randrange(rows): set()}
    slot = 0

    def fork(row: int) -> None:
        free = [each for each in range(rows) if each not in sees]
        if free:
            sees[rng.choice(free)] = set(sees[row])

    while slot < history:
        row = rng.choice(list(sees))
        event = rng.random()
        if slot and (len(sees) < branches or event < 0.1):
            fork(row)
        elif event < 0.2 and len(sees) > max(branches, 1):
            sees[row] |= sees.pop(rng.choice([other for other in sees if other != row]))
        else:
            run = range(slot, min(slot + rng.randint(1, 4), history))
            sees[row].update(run)
            slot += len(run)
    asked: list[tuple[int, set[int]]] = []
    for slot in range(history, history + queries):
        row = rng.choice(list(sees))
        if all(row != earlier for earlier, _ in asked) and rng.random() < 0.2:
            # A branch that takes over another before it runs: that one may have run in this very step.
            sees[row] |= sees[rng.choice(list(sees))]
        sees[row].add(slot)
        asked.append((row, set(sees[row])))
    return Story(sees, asked, history + queries)


def case_of(stories: Sequence[Story], rows: int, rng: random.Random) -> DecodeCase:
    """Lays the requests side by side with unused slots between them; bits that nobody may look at are random."""
    starts, capacity = [], 0
    for story in stories:
        starts.append(capacity + rng.randint(0, 5))
        capacity = starts[-1] + story.tokens + rng.randint(0, 5)
    table = torch.tensor([rng.random() < 0.5 for _ in range(rows * capacity)], dtype=torch.bool).view(rows, capacity)
    visible, requests = [], []
    for start, story in zip(starts, stories, strict=True):
        for row, seen in story.sees.items():
            table[row, start : start + story.tokens] = False
            table[row, [start + slot for slot in seen]] = True
        for _, seen in story.queries:
            visible.append(torch.zeros(capacity, dtype=torch.bool))
            visible[-1][[start + slot for slot in seen]] = True
        live = [row for row, _ in story.queries]
        first = start + story.tokens - len(live)
        requests.append(
            RequestQueries(
                live,
                range(first + 1, first + len(live) + 1),
                [start + slot for slot in sorted(set().union(*(story.sees[row] for row in live)))],
            )
        )
    plan = DecodePlan.build(requests, pack_rows(table))
    return DecodeCase(requests, plan, torch.stack(visible))


def random_decode_case(
    seed: int, queries: Sequence[int] = (3, 0, 5), history: int = 60, rows: int = 12, branches: int = 3
) -> DecodeCase:
    """Requests with these new tokens, each with up to `history` slots before them; see `random_story`."""
    rng = random.Random(seed)
    stories = [random_story(rng, rng.randint(history // 2, history), count, rows, branches) for count in queries]
    return case_of(stories, rows, rng)


def whole_case(queries: int, slots: int) -> DecodeCase:
    """One request that has nothing but `queries` branches over a shared prefix, one new token each."""
    rows = -(-queries // ROWS_PER_WORD) * ROWS_PER_WORD
    prefix = set(range(slots - queries))
    asked = [(row, prefix | {slots - queries + row}) for row in range(queries)]
    return case_of([Story(dict(asked), asked, slots)], rows, random.Random(0))


def decode_inputs(
    case: DecodeCase,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    slots_first: bool = False,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """N(0, 1) in `dtype`: queries `(T, HQ, D)`, keys and values `(HKV, capacity, D)` with NaN in slots that the plan
    does not list.

    Args:
        heads (`tuple[int, int]`): of queries, and of keys and values.
        slots_first (`bool`): whether memory holds keys and values as `(capacity, HKV, D)` and queries as
            `(T, HQ, D)`; if not, heads come first in all three.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(count, tokens, dim, generator=generator).to(dtype)

    query, key, value = draw(heads[0], case.plan.tokens), *(draw(heads[1], len(case.listed)) for _ in range(2))
    for each in (key, value):
        each[:, ~case.listed] = torch.nan
    if slots_first:
        query, key, value = (each.transpose(0, 1).contiguous().transpose(0, 1) for each in (query, key, value))
    return query.transpose(0, 1), key, value
