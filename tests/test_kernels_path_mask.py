"""`PathMask` and its block runs: exactly the visibility of the layout, in intervals, for any text and any padding."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import mask_case, random_case, random_machine
from layout_samples import (
    NESTED,
    NESTED_MASK,
    SAMPLES,
    SHORT_SAMPLES,
    TWO_PATHS,
    TWO_PATHS_MASK,
    every_kind_of_text,
    examples,
    machine_of,
)
from multiverse import BranchLayout
from multiverse.kernels.block_runs import Runs
from multiverse.kernels.path_mask import PathMask
from multiverse.structure import StructureMachine
from reference_layout import reference_layout
from strategies import Sample, encode, token_ids

seeds = st.integers(0, 10_000)


def mask_of(samples: list[Sample], real: torch.Tensor, queries: int) -> PathMask:
    branch_ids = torch.full(real.shape, -1)
    machines = [machine_of(sample) for sample in samples]
    for row, machine in enumerate(machines):
        branch_ids[row, real[row]] = BranchLayout.from_machine(machine).branch_ids
    return PathMask.from_machines(machines, branch_ids, queries)


def expected_visible(samples: list[Sample], real: torch.Tensor, queries: int) -> torch.Tensor:
    """From the brute-force reference of the layout."""
    visible = torch.zeros(*real.shape, real.shape[1], dtype=torch.bool)
    for row, sample in enumerate(samples):
        slots = real[row].nonzero().flatten()
        length = len(sample.ids)
        seen = reference_layout(sample.ids, token_ids, sample.starts).visible
        visible[row, slots[:, None], slots] = torch.tensor(seen, dtype=torch.bool).view(length, length)
    return visible[:, real.shape[1] - queries :]


@every_kind_of_text
@examples(80)
@given(data=st.data())
def test_intervals_say_what_the_layout_says(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[kind].filter(lambda sample: sample.ids))
    real = torch.ones(1, len(sample.ids), dtype=torch.bool)
    mask = mask_of([sample], real, len(sample.ids))
    assert torch.equal(mask.visible(), expected_visible([sample], real, len(sample.ids)))


@every_kind_of_text
@examples(40)
@given(data=st.data())
def test_padding_anywhere_is_blind_and_never_seen(kind: str, data: st.DataObject) -> None:
    samples = data.draw(st.lists(SHORT_SAMPLES[kind], min_size=1, max_size=3))
    slots = max(1, *(len(sample.ids) for sample in samples)) + data.draw(st.integers(0, 8))
    real = torch.zeros(len(samples), slots, dtype=torch.bool)
    for row, sample in zip(real, samples, strict=True):
        order = data.draw(st.sampled_from(["left", "right", "scattered"]))
        free = list(range(slots))
        if order == "scattered":
            data.draw(st.randoms(use_true_random=False)).shuffle(free)
        length = len(sample.ids)
        row[free[slots - length :] if order == "left" else free[:length]] = True
    queries = data.draw(st.integers(1, slots))
    mask = mask_of(samples, real, queries)
    assert torch.equal(mask.visible(), expected_visible(samples, real, queries))
    assert not mask.visible()[~real[:, slots - queries :]].any()


@pytest.mark.parametrize(("ids", "drawn"), [(TWO_PATHS, TWO_PATHS_MASK), (NESTED, NESTED_MASK)])
def test_masks_drawn_by_hand(ids: list[int], drawn: str) -> None:
    mask = mask_of([Sample(ids)], torch.ones(1, len(ids), dtype=torch.bool), len(ids))
    rows = ["".join("#" if seen else "." for seen in row) for row in mask.visible()[0].tolist()]
    assert "\n".join(rows) == drawn


@examples(80)
@given(seed=seeds)
def test_intervals_of_a_key_are_disjoint_ascending_and_as_few_as_may_be(seed: int) -> None:
    mask = random_case(seed).mask
    for start, end in zip(mask.hidden_start, mask.hidden_end, strict=True):
        assert start.dtype == end.dtype == torch.int32
        used = end > start
        assert torch.equal(used | (start == end), torch.ones_like(used))
        # Used ones come first, with a visible row between any two.
        assert (used[:-1] | ~used[1:]).all()
        assert (start[1:][used[1:]] > end[:-1][used[1:]]).all()
    used = mask.hidden_end > mask.hidden_start
    assert mask.hidden_start.shape[1] == max(1, int(used.sum(1).max()))


def test_one_interval_per_level_of_nesting() -> None:
    text = "<Parallel> </Goal> <Path> {} </Path> <Path> </Path> <Conclusion> </Conclusion> </Parallel>"
    for levels in range(1, 5):
        nested = "a"
        for _ in range(levels):
            nested = text.format(nested)
        ids = encode("a " + nested + " a")
        mask = mask_of([Sample(ids)], torch.ones(1, len(ids), dtype=torch.bool), len(ids))
        assert mask.hidden_start.shape == (1, levels, len(ids))


def test_a_path_after_the_conclusion_is_one_more_interval() -> None:
    text = "<Parallel> <Path> a </Path> <Path> b </Path> <Conclusion> c <Path> d </Path> </Parallel>"
    ids = encode(text)
    mask = mask_of([Sample(ids)], torch.ones(1, len(ids), dtype=torch.bool), len(ids))
    # path 1 is tokens 1..3, path 2 tokens 4..6, the conclusion 7..8, path 3 tokens 9..11, `</Parallel>` token 12
    assert mask.hidden_start[0, :, 2].tolist() == [4, 9]
    assert mask.hidden_end[0, :, 2].tolist() == [7, 12]
    assert mask.hidden_start[0, 0, 5].tolist() == 9


def dense_runs(runs: Runs, columns: int) -> torch.Tensor:
    """Bool `(B, outer blocks, columns)`; checks the form of the lists on the way."""
    batch, outer = runs.offsets.shape[0], runs.offsets.shape[1] - 1
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in runs)
    assert runs.offsets.flatten()[0] == 0
    assert runs.offsets[-1, -1] == len(runs.start) == len(runs.end)
    dense = torch.zeros(batch, outer, columns, dtype=torch.bool)
    for row, block, bounds in _bounds(runs):
        before = -1
        for start, end in zip(runs.start[bounds].tolist(), runs.end[bounds].tolist(), strict=True):
            assert before < start < end <= columns  # a run that touched the one before would be the same run
            dense[row, block, start:end] = True
            before = end
    return dense


def _bounds(runs: Runs) -> Iterator[tuple[int, int, slice]]:
    for row, offsets in enumerate(runs.offsets.tolist()):
        for block, (first, last) in enumerate(pairwise(offsets)):
            yield row, block, slice(first, last)


def assert_runs_are_exact(mask: PathMask, visible: torch.Tensor, block_m: int, block_n: int) -> None:
    batch, queries, slots = visible.shape
    rows, columns = -(-queries // block_m), -(-slots // block_n)
    padded = torch.zeros(batch, rows * block_m, columns * block_n, dtype=torch.bool)
    padded[:, :queries, :slots] = visible
    blocks = padded.view(batch, rows, block_m, columns, block_n)
    live, full = blocks.any(4).any(2), blocks.all(4).all(2)
    runs = mask.block_runs(block_m, block_n)
    assert torch.equal(dense_runs(runs.full, columns), full)
    assert torch.equal(dense_runs(runs.partial, columns), live & ~full)
    transposed = mask.block_runs_transposed(block_m, block_n)
    assert torch.equal(dense_runs(transposed.full, rows), full.mT)
    assert torch.equal(dense_runs(transposed.partial, rows), (live & ~full).mT)


@examples(80)
@given(seed=seeds, block_m=st.integers(1, 40), block_n=st.integers(1, 40))
def test_block_runs_are_exact(seed: int, block_m: int, block_n: int) -> None:
    case = random_case(seed)
    assert_runs_are_exact(case.mask, case.visible, block_m, block_n)


@pytest.mark.parametrize("blocks", [(1, 1), (4, 2), (64, 32)], ids=str)
def test_block_runs_of_a_text_that_takes_many_chunks(blocks: tuple[int, int]) -> None:
    case = random_case(1, batch=2, slots=501, queries=430, documents=2)
    assert_runs_are_exact(case.mask, case.visible, *blocks)


def three_levels(tokens: int) -> StructureMachine:
    """4 paths of 3 paths of 5 paths: 77 branches with the root."""
    machine = StructureMachine()

    def text(widths: tuple[int, ...]) -> None:
        machine.read_plain(tokens // 110)
        if widths:
            machine.read_tag("<Parallel>")
            machine.read_tag("</Goal>")
            for _ in range(widths[0]):
                machine.read_tag("<Path>")
                text(widths[1:])
                machine.read_tag("</Path>")
            machine.read_tag("<Conclusion>")
            machine.read_tag("</Parallel>")

    text((4, 3, 5))
    machine.read_plain(tokens - machine.length)
    return machine


def test_a_training_sample_takes_less_than_two_megabytes() -> None:
    machine = three_levels(32_768)
    assert len(machine.parents) == 77
    layout = BranchLayout.from_machine(machine)
    mask = PathMask.from_machines([machine], layout.branch_ids[None])
    assert mask.hidden_start.shape[1] == 3
    for block_m, block_n in ((128, 128), (64, 32)):
        mask.block_runs(block_m, block_n)
        mask.block_runs_transposed(block_m, block_n)
    assert 3 * 2 * 4 * 32_768 < mask.nbytes < 2_000_000


def test_the_random_cases_hold_what_they_promise() -> None:
    cases = [random_case(seed) for seed in range(60)]
    masks = [case.mask for case in cases]
    assert any(mask.queries < mask.slots for mask in masks)
    assert any(mask.queries == mask.slots for mask in masks)
    assert any(mask.hidden_start.shape[1] >= 3 for mask in masks)
    assert any((~case.visible.any(2)).any() for case in cases)
    assert any(case.real.all() for case in cases)
    assert any((case.real[:, :-1] > case.real[:, 1:]).any() and case.real[:, -1].all() for case in cases)
    assert any(mask.slots % 2 for mask in masks)
    branches = {len(random_machine(random.Random(seed), 60).parents) for seed in range(30)}
    assert min(branches) == 1
    assert len(branches) > 5


def test_what_is_derived_is_made_once() -> None:
    mask = random_case(3).mask
    before = mask.nbytes
    assert mask.block_runs(16, 16) is mask.block_runs(16, 16)
    assert mask.block_runs(16, 16) is not mask.block_runs(16, 8)
    assert mask.block_runs_transposed(16, 16) is mask.block_runs_transposed(16, 16)
    assert mask.nbytes > before


def test_mask_goes_to_a_device_and_finds_its_block_runs_without_coming_back() -> None:
    mask = random_case(3).mask
    assert mask.to("cpu") is mask
    there = mask.to("meta")  # a device from which nothing can be copied back
    assert there.device.type == there.hidden_start.device.type == there.hidden_end.device.type == "meta"
    assert there.queries == mask.queries
    for found, expected in zip(there.block_runs(8, 8), mask.block_runs(8, 8), strict=True):
        assert [each.shape for each in found] == [each.shape for each in expected]
        assert all(each.device.type == "meta" for each in found)


def test_queries_and_device_have_defaults() -> None:
    machine = random_machine(random.Random(0), 20)
    branch_ids = BranchLayout.from_machine(machine).branch_ids[None]
    mask = PathMask.from_machines([machine], branch_ids)
    assert (mask.queries, mask.slots, mask.batch_size, mask.device) == (20, 20, 1, branch_ids.device)


def test_real_slots_are_told_only_where_there_is_padding() -> None:
    machine = random_machine(random.Random(0), 5)
    assert mask_case([machine], torch.ones(1, 5, dtype=torch.bool)).mask.real_slots() is None
    real = torch.tensor([[False, True, True, False, True, True, True]])
    assert torch.equal(mask_case([machine], real).mask.real_slots(), real)


def test_tensors_without_padding_hold_zeros_there() -> None:
    machine = random_machine(random.Random(0), 4)
    mask = mask_case([machine], torch.tensor([[True, False, True, True, False, True]]), queries=3).mask
    query, key = mask.without_padding(torch.ones(1, 2, 3, 1), torch.full((1, 1, 6, 1), torch.nan))
    assert query[0, :, :, 0].tolist() == [[1, 0, 1]] * 2
    assert key.isnan()[0, 0, :, 0].tolist() == [True, False, True, True, False, True]
    assert key[0, 0, [1, 4], 0].tolist() == [0, 0]


def test_wrong_arguments_of_from_machines() -> None:
    machine = random_machine(random.Random(0), 6)
    branch_ids = BranchLayout.from_machine(machine).branch_ids[None]
    with pytest.raises(ValueError, match=r"`branch_ids` must have shape .* each of the 2 `machines`, got \(1, 6\)"):
        PathMask.from_machines([machine, machine], branch_ids)
    with pytest.raises(ValueError, match=r"`branch_ids` must have shape .* got \(6,\)"):
        PathMask.from_machines([machine], branch_ids[0])
    for queries in (0, 7):
        with pytest.raises(ValueError, match=f"`queries` must lie between 1 and the 6 slots.*got {queries}"):
            PathMask.from_machines([machine], branch_ids, queries)
    with pytest.raises(ValueError, match=r"`branch_ids` row 0 has 5 slots that are no padding.*read 6 tokens"):
        PathMask.from_machines([machine], branch_ids[:, :5])
    with pytest.raises(ValueError, match=r"`branch_ids` row 0 has 6 slots .* in branches up to 99"):
        PathMask.from_machines([machine], torch.full((1, 6), 99))


@pytest.mark.parametrize("blocks", [(0, 8), (8, -1)], ids=str)
def test_wrong_blocks(blocks: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"`block_[mn]` must be at least 1, got"):
        random_case(0).mask.block_runs(*blocks)


def test_wrong_inputs_are_named() -> None:
    mask = random_case(0, batch=2, slots=9, queries=4, documents=1, padded=False).mask
    query, key = torch.zeros(2, 4, 4, 8), torch.zeros(2, 2, 9, 8)
    mask.check(query, key, key)
    for wrong in (query[:1], query[:, :, :3], query[0]):
        with pytest.raises(ValueError, match=r"`query` must have shape .* 2 rows and 4 new tokens"):
            mask.check(wrong, key, key)
    for wrong in (key[:1], key[:, :, :8], key[..., :4]):
        with pytest.raises(ValueError, match=r"`key` must have shape .* 9 slots as in `mask` and the head dim 8"):
            mask.check(query, wrong, wrong)
    with pytest.raises(ValueError, match="`value` must have the shape of `key`"):
        mask.check(query, key, key[..., :4])
    with pytest.raises(ValueError, match="`query` has 3 heads, `key` 2"):
        mask.check(query[:, :3], key, key)
    with pytest.raises(ValueError, match=r"`value` is torch\.float64 on cpu; its dtype must be torch\.float32"):
        mask.check(query, key, key.double())
    with pytest.raises(ValueError, match=r"`query` is torch\.float32 on cpu; .* its device meta as that of `mask`"):
        mask.to("meta").check(query, key, key)
