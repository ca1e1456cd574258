"""The cache of the engine and its table of visible slots."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import both_modes
from decoding import FORK_AND_END, MIXED, PROMPTS, Boost, FailingCriterion, Trouble, Watch, decode, padded, real_tokens
from hypothesis import given
from hypothesis import strategies as st
from multiverse import BranchLayout
from multiverse.generation.branch import Branch, Choice
from multiverse.generation.cache import PathCache, PathCacheLayer
from multiverse.generation.model_step import ModelStep, NewTokens
from multiverse.generation.sampling import Sampler
from multiverse.generation.visibility import VisibleSlots
from tiny import TOKEN_IDS, tiny_ids, tiny_model
from transformers import LogitsProcessorList, StoppingCriteriaList


def test_cache_slots_are_written_once_and_never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_update = PathCacheLayer.update
    written: dict[int, int] = {}

    def update(layer: PathCacheLayer, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = layer.keys.clone() if layer.is_initialized else None
        address = layer.keys.data_ptr() if layer.is_initialized else None
        result = plain_update(layer, keys, values, *args, **kwargs)
        fresh = torch.cat([torch.arange(first, first + count) for first, count in layer.slots.writes])
        assert torch.equal(result[0][:, :, fresh], keys)
        assert torch.equal(result[1][:, :, fresh], values)
        written[id(layer)] = written.get(id(layer), 0) + len(fresh)
        if before is not None:
            assert layer.keys.data_ptr() == address
            for region, (first, _) in zip(layer.slots.regions, layer.slots.writes, strict=False):
                assert first >= region.start
            old = torch.ones(before.shape[2], dtype=torch.bool)
            old[fresh] = False
            assert torch.equal(layer.keys[:, :, old].nan_to_num(), before[:, :, old].nan_to_num())
        return result

    monkeypatch.setattr(PathCacheLayer, "update", update)
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    watch = Watch()
    output = tiny_model().generate(
        **padded(prompts),
        streamer=watch,
        logits_processor=LogitsProcessorList([FORK_AND_END]),
        max_new_tokens=90,
        return_dict_in_generate=True,
    )
    generated = sum(report.generated_tokens for report in output.reports)
    pending = sum(len(branch.pending) for request in watch.requests for branch in request.branches())
    assert sum(len(report.branches) for report in output.reports) > 12
    slots = sum(map(len, prompts)) + generated - pending
    assert list(written.values()) == [slots] * 2
    assert sum(report.kv_slots for report in output.reports) == slots


def test_cache_that_grows_keeps_what_every_request_holds() -> None:
    cache = PathCache(num_layers=2, capacities=[3, 1, 2])
    held: list[list[torch.Tensor]] = [[], [], []]
    for step in ([(0, 2), (1, 1), (2, 2)], [(0, 1)], [(2, 1), (0, 9)], [(1, 1)], [(0, 1), (1, 20), (2, 3)]):
        cache.reserve(step)
        keys = torch.randn(1, 2, sum(count for _, count in step), 4)
        for (request, _), part in zip(step, keys.split([count for _, count in step], dim=2), strict=True):
            held[request].append(part)
        for layer, sign in ((0, 1), (1, -1)):
            found, values = cache.update(sign * keys, 2 * sign * keys, layer)
            for region, parts in zip(cache.regions, held, strict=True):
                own = slice(region.start, region.start + region.length)
                assert torch.equal(found[:, :, own], sign * torch.cat(parts, dim=2))
                assert torch.equal(values[:, :, own], 2 * sign * torch.cat(parts, dim=2))
    assert cache.moved_slots > 0
    assert cache.get_seq_length() == sum(count for parts in held for count in (part.shape[2] for part in parts))


def test_cost_of_growing_is_bounded_by_what_is_held() -> None:
    cache = PathCache(num_layers=1, capacities=[1] * 8)
    for step in range(1000):
        cache.reserve([(request, 1) for request in range(8) if step % (request + 1) == 0])
    held = sum(region.length for region in cache.regions)
    assert cache.moved_slots <= 4 * held
    assert sum(region.capacity for region in cache.regions) <= 4 * held


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_heavy_outlives_a_call(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed by the last reference: the garbage collector may be a long way off when memory runs short."""
    alive: list[weakref.ref] = []
    plain_cache, plain_choose = PathCache.__init__, Sampler.choose

    def new_cache(cache: PathCache, *args: Any, **kwargs: Any) -> None:
        plain_cache(cache, *args, **kwargs)
        alive.append(weakref.ref(cache))
        alive.extend(weakref.ref(layer) for layer in cache.layers)

    def choose(sampler: Sampler, *args: Any) -> list[Choice]:
        choices = plain_choose(sampler, *args)
        alive.extend(weakref.ref(kept) for each in choices for kept in (each.logits, each.scores))
        return choices

    monkeypatch.setattr(PathCache, "__init__", new_cache)
    monkeypatch.setattr(Sampler, "choose", choose)
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    gc.collect()
    gc.disable()
    try:
        criteria = StoppingCriteriaList([FailingCriterion(40)] if interrupted else [])
        options = {"output_scores": True, "max_new_tokens": 90, "stopping_criteria": criteria}
        if interrupted:
            with pytest.raises(Trouble):
                decode(tiny_model(), prompts, FORK_AND_END, **options)
        else:
            decode(tiny_model(), prompts, FORK_AND_END, **options)
        assert len(alive) > 50
        assert not [each for each in alive if each() is not None]
    finally:
        gc.enable()


@both_modes
def test_every_token_sees_the_slots_that_the_layout_names(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [tiny_ids(text) for text in PROMPTS.values()]
    run: dict[int, list[Any]] = {number: list(range(len(prompt))) for number, prompt in enumerate(prompts)}
    queries: list[tuple[int, list[Any], torch.Tensor | None]] = []
    plain_branches = ModelStep._branches

    def branches(step: ModelStep, number: int, chosen: Sequence[Branch]) -> NewTokens:
        tokens = [token for branch in chosen for token in branch.pending]
        new = plain_branches(step, number, chosen)
        run[number] += tokens
        queries.append((number, tokens, new.visible))
        return new

    monkeypatch.setattr(ModelStep, "_branches", branches)
    watch = Watch()
    output = decode(tiny_model(), prompts, Boost(), streamer=watch, parallel=parallel, max_new_tokens=70)
    seen, index_of = [], []
    for row, (request, prompt) in enumerate(zip(watch.requests, prompts, strict=True)):
        seen.append(BranchLayout.from_token_ids(real_tokens(output, prompts, row), TOKEN_IDS).attention_mask())
        linear = {id(token): len(prompt) + place for place, token in enumerate(request.root.tokens())}
        index_of.append([slot if isinstance(slot, int) else linear[id(slot)] for slot in run[row]])
    restricted = 0
    done = {number: len(prompt) for number, prompt in enumerate(prompts)}
    for number, tokens, visible in queries:
        done[number] += len(tokens)
        slots = index_of[number][: done[number]]
        own = slots[len(slots) - len(tokens) :]
        expected = seen[number][own][:, slots]
        if visible is None:
            assert expected.all()
        else:
            assert torch.equal(visible, expected)
            restricted += int((~expected).any())
    assert restricted > 100


@given(st.data())
def test_table_of_visible_slots_does_what_sets_do(data: st.DataObject) -> None:
    table = VisibleSlots(capacity=1)
    sees = {table.open_row(): set()}
    for _ in range(data.draw(st.integers(1, 30))):
        row = data.draw(st.sampled_from(sorted(sees)))
        action = data.draw(st.sampled_from(["append", "open", "absorb"]))
        if action == "append":
            rows = data.draw(st.lists(st.sampled_from(sorted(sees)), min_size=1, max_size=4))
            first = table.length
            table.append(rows)
            for place, each in enumerate(rows):
                sees[each].add(first + place)
            mask = table.mask(rows)
            for place, each in enumerate(rows):
                expected = {slot for slot in sees[each] if slot <= first + place}
                found = range(table.length) if mask is None else mask[place].nonzero().flatten().tolist()
                assert set(found) == expected
        elif action == "open":
            child = table.open_row(row)
            assert child not in sees
            sees[child] = set(sees[row])
        elif len(sees) > 1:
            other = data.draw(st.sampled_from(sorted(set(sees) - {row})))
            table.absorb(row, other)
            table.close_row(other)
            sees[row] |= sees.pop(other)
        assert table.rows_in_use == len(sees)
