"""The bytes model, held to every load and store of the kernels as Triton's interpreter makes them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import DecodeCase, decode_inputs, random_decode_case, whole_case
from multiverse.kernels.bytes_model import AttentionShape, StepBytes, decode_bytes, predict_branches
from multiverse.kernels.launch_table import SHARE_LIMIT
from multiverse.kernels.path_decode import path_decode
from triton.runtime.interpreter import InterpreterBuilder


@dataclass
class Traffic:
    """What was read and written with its mask set.

    Attributes:
        loads (`list[np.ndarray]`): addresses, one array per load.
        loaded, stored (`int`): bytes.
    """

    loads: list[np.ndarray] = field(default_factory=list)
    loaded: int = 0
    stored: int = 0

    def reads(self, tensor: torch.Tensor) -> torch.Tensor:
        """How often each element of `tensor` was read, in its shape."""
        last = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
        places = np.concatenate(self.loads).astype(np.int64) - tensor.data_ptr()
        places = places[(places >= 0) & (places <= last * tensor.element_size())] // tensor.element_size()
        counts = np.bincount(places, minlength=last + 1)
        return torch.from_numpy(counts).as_strided(tensor.shape, tensor.stride())

    def bytes_of(self, *tensors: torch.Tensor) -> int:
        """Bytes read from these."""
        return sum(int(self.reads(tensor).sum()) * tensor.element_size() for tensor in tensors)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """Counts from here on. Loads without a mask come to the interpreter as masked ones with all lanes set."""
    seen = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def lanes(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        addresses = pointers.data[mask.data.astype(bool)]
        return addresses, len(addresses) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: InterpreterBuilder, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses, size = lanes(pointers, mask)
        seen.loads.append(addresses)
        seen.loaded += size
        return load(self, pointers, mask, *rest)

    def counting_store(self: InterpreterBuilder, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.stored += lanes(pointers, mask)[1]
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return seen


def expected_reads(case: DecodeCase, passes: list[int]) -> torch.Tensor:
    """Reads of every slot, shape `(capacity,)`: none of a slot that no query of the step may see."""
    reads = torch.zeros(case.visible.shape[1], dtype=torch.int64)
    first = 0
    for request, times in zip(case.requests, passes, strict=True):
        seen = case.visible[first : first + len(request.rows)].any(0)
        reads[seen] += times
        first += len(request.rows)
    return reads


def check_model(
    case: DecodeCase,
    shape: AttentionShape,
    passes: list[int],
    traffic: Traffic,
    split_length: int | None = None,
    slots_first: bool = False,
) -> StepBytes:
    """Runs the kernels and compares every byte that they moved; returns what the model says of them.

    Args:
        passes (`list[int]`): how often the keys and values of each request must be read.
    """
    dtype = {2: torch.float16, 4: torch.float32}[shape.element_size]
    query, key, value = decode_inputs(case, (shape.heads, shape.kv_heads), shape.head_dim, dtype, slots_first)
    path_decode(query, key, value, case.plan, split_length=split_length)
    plan = case.plan

    reads = expected_reads(case, passes)[None, :, None].expand(key.shape)
    assert torch.equal(traffic.reads(key), reads)
    assert torch.equal(traffic.reads(value), reads)

    counts = [(len(request.rows), len(request.slots)) for request in case.requests]
    model = decode_bytes(counts, shape, plan.words, split_length, processors=1)
    assert traffic.bytes_of(key, value) == model.keys_values
    assert traffic.bytes_of(plan.slot_index) == model.slot_index
    assert traffic.bytes_of(plan.slot_bits) == model.slot_bits
    assert traffic.bytes_of(query, plan.q_row, plan.q_limit) == model.queries
    # What a program asks first: where its request begins. The model leaves it out.
    begin = traffic.bytes_of(plan.cu_q, plan.q_request, plan.idx_start, plan.idx_len)
    assert traffic.loaded - begin == model.total - model.outputs - model.shares // 2
    assert traffic.stored == model.outputs + model.shares // 2
    return model


#: Case, how often each of its requests is read, and length of a split.
CASES: dict[str, tuple[DecodeCase, list[int], int | None]] = {
    "one token": (random_decode_case(0, queries=(1,), history=70), [1], None),
    "one token in splits": (random_decode_case(0, queries=(1,), history=70), [1], 11),
    "ragged": (random_decode_case(1, queries=(3, 0, 7, 1), history=70), [1, 0, 1, 1], None),
    "ragged in one long split": (random_decode_case(1, queries=(3, 0, 7, 1), history=70), [1, 0, 1, 1], 1000),
    "ragged in splits": (random_decode_case(1, queries=(3, 0, 2, 1), history=70), [1, 0, 1, 1], 7),
    "three words in splits": (random_decode_case(2, queries=(6, 2), history=40, rows=70, branches=20), [1, 1], 7),
    "128 rows": (whole_case(32, 75), [1], None),
    "132 rows": (whole_case(33, 75), [2], None),
    "260 rows beside 4": (random_decode_case(3, queries=(65, 1), history=40, rows=40, branches=9), [3, 1], None),
}


@pytest.mark.parametrize("name", list(CASES))
def test_model_counts_every_byte_of_the_kernels(name: str, traffic: Traffic) -> None:
    """Four query heads per key-value head in float16, whose largest block holds 128 rows."""
    case, passes, split_length = CASES[name]
    shape = AttentionShape(heads=8, kv_heads=2, head_dim=64, element_size=2)
    model = check_model(case, shape, passes, traffic, split_length, slots_first=name == "ragged")
    assert (model.shares > 0) == ("in splits" in name)


@pytest.mark.parametrize(("branches", "passes"), [(8, 1), (10, 1), (11, 2), (22, 3)])
def test_float32_reads_once_per_32_rows(branches: int, passes: int, traffic: Traffic) -> None:
    model = check_model(whole_case(branches, 40), AttentionShape(3, 1, 64, 4), [passes], traffic, split_length=20)
    assert model.keys_values == passes * 2 * 40 * 64 * 4


def test_request_without_queries_reads_nothing(traffic: Traffic) -> None:
    """Not its keys, nor its list of slots: what it costs is to be told so."""
    case = random_decode_case(8, queries=(0, 2, 0), history=30)
    query, key, value = decode_inputs(case)
    path_decode(query, key, value, case.plan)
    alone = decode_bytes([(2, len(case.requests[1].slots))], AttentionShape(4, 2, 64, 4), processors=1)
    assert traffic.bytes_of(key, value) == alone.keys_values
    assert traffic.bytes_of(case.plan.slot_index) == alone.slot_index
    assert decode_bytes([(0, 500), (0, 0)], AttentionShape(4, 2, 64, 4)) == StepBytes(0)


def test_prediction_by_hand() -> None:
    """8 branches of 256 slots over 8192: 56 rows per key-value head are one block of 64; 896 slots to a split."""
    shape = AttentionShape(heads=28, kv_heads=4, head_dim=128, element_size=2)
    prediction = predict_branches(8, 8192, 256, shape)
    slots, splits = 8192 + 8 * 256, 12
    assert prediction.paths == StepBytes(
        keys_values=2 * slots * 4 * 128 * 2,
        slot_index=slots * 4 * 4,
        slot_bits=slots * 4 * 4,
        queries=8 * 28 * splits * (128 * 2 + 8),
        shares=2 * 8 * 28 * splits * 129 * 4,
        outputs=8 * 28 * (128 * 2 + 4),
    )
    assert prediction.paths.total == 24_841_088
    assert prediction.rows.keys_values == 8 * 2 * 8448 * 4 * 128 * 2
    assert prediction.rows.total == 138_526_720
    assert prediction.ratio == pytest.approx(5.5765, abs=1e-4)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (28, 4), (32, 4)])
def test_prediction_at_its_limits(heads: int, kv_heads: int, element_size: int) -> None:
    shape = AttentionShape(heads, kv_heads, 128, element_size)
    block = 128 if element_size == 2 else 32
    for branches in (1, 2, 4, 8, 16, 64):
        blocks = -(-branches * shape.group // block)
        # Nearly all is shared: as many times fewer bytes as branches, but for the shares of splits and the lists.
        shared = predict_branches(branches, 1_000_000, 1, shape)
        assert shared.rows.keys_values / shared.paths.keys_values == pytest.approx(branches / blocks, rel=1e-3)
        assert shared.ratio == pytest.approx(branches / blocks, rel=1.5 * SHARE_LIMIT)
        # Nothing is shared: one cache reads what the rows read, once per block.
        apart = predict_branches(branches, 0, 4096, shape)
        assert apart.rows.keys_values * blocks == apart.paths.keys_values
        assert 1 / blocks > apart.ratio > (1 - 1.5 * SHARE_LIMIT) / blocks
        # In between, by the formula of the model.
        between = predict_branches(branches, 8192, 256, shape)
        formula = branches * (8192 + 256) / (8192 + branches * 256) / blocks
        assert between.rows.keys_values / between.paths.keys_values == pytest.approx(formula, rel=1e-12)
        assert between.ratio < formula


def test_wrong_arguments() -> None:
    shape = AttentionShape(4, 2, 64, 2)
    for wrong in ([(-1, 5)], [(1, 5), (1, -5)]):
        with pytest.raises(ValueError, match="`requests` must hold counts of at least 0"):
            decode_bytes(wrong, shape)
    for branches, prefix, own in ((0, 8, 1), (2, -1, 1), (2, 8, 0)):
        with pytest.raises(ValueError, match="`branches` and `own` must be at least 1 and `prefix` at least 0"):
            predict_branches(branches, prefix, own, shape)
