"""The tables of visible slots, and their mirror in words of bits, against sets of slots by the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layout_samples import examples
from multiverse.generation.cache import PathCache
from multiverse.generation.slot_bits import SlotBits
from multiverse.generation.visibility import VisibleSlots
from multiverse.kernels.decode_plan import ROWS_PER_WORD


class Engine:
    """Requests over one cache, each with its table, the mirror of all, and the truth: per request and row in use, the
    set of slots that the row sees, counted from the request's first."""

    def __init__(self, capacities: list[int]) -> None:
        self.cache = PathCache(1, capacities)
        self.bits = SlotBits(self.cache, torch.device("cpu"))
        self.tables = [VisibleSlots(capacity, self.bits, number) for number, capacity in enumerate(capacities)]
        self.sees: list[dict[int, set[int]]] = [{} for _ in capacities]

    def reserve(self, new: list[tuple[int, int]]) -> None:
        moves = self.cache.reserve(new)
        if moves:
            self.bits.move(moves)

    def open(self, request: int, parent: int | None = None) -> int:
        row = self.tables[request].open_row(parent)
        assert row not in self.sees[request]
        self.sees[request][row] = set() if parent is None else set(self.sees[request][parent])
        return row

    def close(self, request: int, row: int) -> None:
        self.tables[request].close_row(row)
        del self.sees[request][row]

    def absorb(self, request: int, row: int, other: int) -> None:
        self.tables[request].absorb(row, other)
        self.sees[request][row] |= self.sees[request][other]

    def append(self, request: int, row: int, count: int) -> None:
        """New slots of one row; there must be slots reserved for them."""
        first = self.tables[request].length
        self.tables[request].append([row] * count)
        self.sees[request][row].update(range(first, first + count))

    def append_block(self, request: int, visible: dict[int, torch.Tensor]) -> None:
        first = self.tables[request].length
        self.tables[request].append_block(visible)
        for row, seen in visible.items():
            self.sees[request][row].update((first + seen.nonzero().flatten()).tolist())

    def check(self) -> None:
        """What every row in use sees, by its bits."""
        self.bits.flush()
        assert self.bits.words.shape[1] == self.cache.slots
        for region, table, sees in zip(self.cache.regions, self.tables, self.sees, strict=True):
            assert table.length == region.length
            assert table.rows_in_use == len(sees)
            for row, seen in sees.items():
                words = self.bits.words[row // ROWS_PER_WORD, region.start : region.start + region.length]
                assert ((words >> row % ROWS_PER_WORD) & 1).nonzero().flatten().tolist() == sorted(seen)


def prompt(engine: Engine, request: int, rows: int, length: int, visible: torch.Tensor) -> None:
    """The first slots of a request and the rows that its prompt has open; `visible` is bool, `(rows, length)`."""
    opened = [engine.open(request) for _ in range(rows)]
    engine.reserve([(request, length)])
    engine.append_block(request, dict(zip(opened, visible, strict=True)))


def step(engine: Engine, data: st.DataObject) -> None:
    """One decode step: some requests run some of their branches. Each may open now or absorb others first; those that
    were absorbed may have run before in this step, and are closed after it."""
    running = data.draw(st.lists(st.integers(0, len(engine.tables) - 1), min_size=1, unique=True))
    turns = {}
    for request in running:
        live = list(engine.sees[request])
        order = data.draw(st.lists(st.sampled_from([*live, *[-1] * 3]), min_size=1, max_size=5))
        rows = [row for place, row in enumerate(order) if row < 0 or row not in order[:place]]
        turns[request] = [(row, data.draw(st.integers(1, 3))) for row in rows]
    engine.reserve([(request, sum(count for _, count in turns[request])) for request in running])
    for request in running:
        table, sees = engine.tables[request], engine.sees[request]
        newest: list[tuple[int, int]] = []
        gone: set[int] = set()
        for turn, count in turns[request]:
            row = turn
            if turn < 0:
                row = engine.open(request, data.draw(st.sampled_from([*sees])))
            else:
                others = [each for each in sees if each != row and each not in gone]
                later = {each for each, _ in turns[request]} - {each for each, _ in newest}
                for other in data.draw(st.lists(st.sampled_from(others), max_size=2, unique=True)) if others else ():
                    if other not in later:
                        engine.absorb(request, row, other)
                        gone.add(other)
            newest += [(row, slot) for slot in range(table.length, table.length + count)]
            engine.append(request, row, count)
        rows = [row for row, _ in newest]
        expected = [{slot for slot in sees[row] if slot <= own} for row, own in newest]
        for _ in range(2):  # asking changes nothing
            assert table.seen_by_any(rows).tolist() == sorted(set().union(*expected))
        mask = table.mask(rows)
        if mask is None:
            assert expected == [set(range(table.length))]
        else:
            assert [set(seen.nonzero().flatten().tolist()) for seen in mask] == expected
        for row in gone:
            engine.close(request, row)


@examples(60)
@given(data=st.data())
def test_mirror_and_union_follow_forks_and_merges(data: st.DataObject) -> None:
    requests = data.draw(st.integers(1, 3))
    engine = Engine([data.draw(st.integers(1, 6)) for _ in range(requests)])
    for request in range(requests):
        rows, length = data.draw(st.sampled_from([1, 2, 3, 31, 33])), data.draw(st.integers(1, 5))
        bits = data.draw(st.integers(0, 2 ** (rows * length) - 1))
        visible = torch.tensor([bits >> place & 1 for place in range(rows * length)], dtype=torch.bool)
        prompt(engine, request, rows, length, visible.view(rows, length))
    engine.check()
    for _ in range(data.draw(st.integers(1, 7))):
        step(engine, data)
        engine.check()


@pytest.mark.parametrize("seed", range(3))
def test_seventy_branches_and_rows_that_are_given_back(seed: int) -> None:
    """Three words, the sign bit included; every row is closed and opened again by another branch."""
    generator = torch.Generator().manual_seed(seed)
    engine = Engine([4, 9])
    for request in range(2):
        prompt(engine, request, 1, 3, torch.ones(1, 3, dtype=torch.bool))
    for _ in range(2):
        engine.reserve([(0, 70), (1, 2)])
        children = [engine.open(0, 0) for _ in range(70)]
        order = torch.randperm(70, generator=generator).tolist()
        for child in order:
            engine.append(0, children[child], 1)
        engine.append(1, 0, 2)
        engine.check()
        engine.reserve([(0, 1)])
        for child in order[:40]:
            engine.absorb(0, 0, children[child])
        engine.append(0, 0, 1)
        engine.check()
        for child in order:
            engine.close(0, children[child])
    assert engine.bits.words.shape[0] == 3


def test_slots_not_yet_written_go_along_when_a_region_grows() -> None:
    engine = Engine([2, 3])
    for request in range(2):
        prompt(engine, request, 1, 2, torch.ones(1, 2, dtype=torch.bool))
    engine.reserve([(1, 1)])
    engine.append(1, 0, 1)
    engine.reserve([(0, 4), (1, 1)])  # without a flush in between
    engine.append(0, 0, 4)
    engine.append(1, 0, 1)
    engine.check()
    assert engine.cache.moved_slots > 0


def test_union_is_kept_only_while_it_holds() -> None:
    """The same branches step after step, then one opens, one merges, and the same row numbers mean something else."""
    engine = Engine([3])
    prompt(engine, 0, 1, 2, torch.ones(1, 2, dtype=torch.bool))

    def run(rows: list[int]) -> list[int]:
        for row in rows:
            engine.append(0, row, 1)
        return engine.tables[0].seen_by_any(rows).tolist()

    engine.reserve([(0, 11)])
    first, second = engine.open(0, 0), engine.open(0, 0)
    assert run([first, second]) == [0, 1, 2, 3]
    assert run([second, first]) == [0, 1, 2, 3, 4, 5]
    assert run([second]) == [0, 1, 3, 4, 6]
    assert run([first, second]) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    engine.absorb(0, 0, first)
    engine.close(0, first)
    assert run([0, second]) == list(range(11))
    assert engine.open(0) == first
    assert run([first]) == [11]
    assert run([first]) == [11, 12]
    engine.check()
