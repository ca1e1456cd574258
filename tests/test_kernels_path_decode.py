"""`path_decode` and its plan: attention of new tokens over one cache, held to the reference in float64."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from decode_cases import DecodeCase, Story, case_of, decode_inputs, random_decode_case, random_story, whole_case
from kernel_cases import TOLERANCE
from multiverse.kernels import triton_support
from multiverse.kernels.decode_plan import DecodePlan, RequestQueries, pack_rows
from multiverse.kernels.path_decode import path_decode
from multiverse.kernels.reference import path_attention_reference

LSE_TOLERANCE = 5e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Three queries over slots 0 to 8.
NINE_SLOTS = ([RequestQueries([0, 1, 2], [7, 8, 9], range(9))], torch.zeros(1, 9, dtype=torch.int32))


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do not write stays NaN."""
    plain = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        tensor = plain(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def check(case: DecodeCase, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], **options: Any) -> torch.Tensor:
    """Output and log-sum-exp against the reference, by the largest absolute error; returns the output."""
    query, key, value = inputs
    output, sums = path_decode(query, key, value, case.plan, **options)
    assert output.dtype == query.dtype
    assert sums.dtype == torch.float32
    exact, exact_sums = (
        each[0].transpose(0, 1)
        for each in path_attention_reference(
            query.double().transpose(0, 1)[None],
            key.double()[None],
            value.double()[None],
            case.visible[None],
            options.get("scale"),
        )
    )
    assert output.shape == exact.shape
    error = (output.double() - exact).abs().max()
    assert error <= TOLERANCE[query.dtype], f"error of the output: {error:.2e}"
    blind = ~case.visible.any(1)
    assert (output[blind] == 0).all()
    assert (sums[blind] == -torch.inf).all()
    error = (sums.double() - exact_sums)[~blind].abs().max()
    assert error <= LSE_TOLERANCE, f"error of the log-sum-exp: {error:.2e}"
    return output


@pytest.mark.parametrize("slots_first", [False, True], ids=["heads first", "slots first"])
@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (8, 2), (8, 1)], ids=lambda heads: f"group {heads[0] // heads[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_branches_of_several_requests(dtype: torch.dtype, heads: tuple[int, int], slots_first: bool) -> None:
    case = random_decode_case(10 * heads[0] + slots_first)
    check(case, decode_inputs(case, heads, dtype=dtype, slots_first=slots_first))


@pytest.mark.parametrize("seed", range(12))
def test_ragged_requests(seed: int) -> None:
    """Odd lengths from a single slot on, requests without queries anywhere, several tokens of a branch."""
    rng = random.Random(seed)
    queries = [rng.choice((0, 1, 1, 2, 7)) for _ in range(rng.randint(1, 5))]
    queries[rng.randrange(len(queries))] = rng.randint(1, 9)
    case = random_decode_case(seed, queries, history=rng.choice((1, 5, 31, 64, 97)), branches=rng.randint(1, 6))
    check(case, decode_inputs(case, seed=seed), split_length=rng.choice((None, 1000, 32, 19)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 96, 128, 256])
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    case = random_decode_case(dim, queries=(2, 3), history=21)
    check(case, decode_inputs(case, (3, 1), dim, dtype, slots_first=True), split_length=11)


@pytest.mark.parametrize("rows", [32, 33, 70, 97])
def test_more_branches_than_bits_in_a_word(rows: int) -> None:
    """Every row once over a shared prefix, and in random order over random branches."""
    for case in (
        whole_case(rows, rows + 7),
        random_decode_case(rows, queries=(rows // 2, 2), history=50, rows=rows, branches=rows),
    ):
        check(case, decode_inputs(case, (2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_rows_than_a_block_holds(dtype: torch.dtype) -> None:
    case = random_decode_case(1, queries=(47, 1), history=40, rows=40, branches=10)
    check(case, decode_inputs(case, (3, 1), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_split_gives_the_same(dtype: torch.dtype) -> None:
    """One split, some, more than the merge takes at a time; one request has fewer than the other."""
    rng = random.Random(4)
    case = case_of([random_story(rng, 110, 2, 4, 1), random_story(rng, 4, 1, 4, 1)], 32, rng)
    inputs = decode_inputs(case, (2, 1), dtype=dtype)
    long, short = case.plan.idx_len.tolist()
    assert long > 3 * 16
    assert short < 9
    outputs = [check(case, inputs, split_length=split) for split in (1000, long, long - 1, 9, 3)]
    # In exact arithmetic they would be equal; each is as near to that as `check` demands.
    for output in outputs[1:]:
        assert (output - outputs[0]).abs().max() <= 2 * TOLERANCE[dtype]


def test_scale() -> None:
    case = random_decode_case(6)
    check(case, decode_inputs(case), scale=0.3)


@pytest.mark.parametrize("split_length", [None, 3])
def test_a_query_that_sees_nothing_gets_exactly_zero(split_length: int | None) -> None:
    """Beside one that sees something; and where there is nothing to read at all."""
    blind = Story({0: set(), 3: {0, 1, 2, 4, 5, 6}, 40: set()}, [(0, set()), (3, {0, 1, 2, 4, 5, 6}), (40, set())], 8)
    alone = Story({1: set()}, [(1, set())], 2)
    case = case_of([alone, blind, alone], 64, random.Random(0))
    assert case.plan.idx_len.tolist() == [0, 6, 0]
    check(case, decode_inputs(case, (4, 2)), split_length=split_length)
    case = case_of([alone], 32, random.Random(0))
    assert case.plan.max_kv == 0
    output, sums = path_decode(*decode_inputs(case), case.plan, split_length=split_length)
    assert (output == 0).all()
    assert (sums == -torch.inf).all()


def test_a_limit_hides_what_the_bits_show() -> None:
    """Tokens of one branch that run together: each sees those before it."""
    story = Story({2: set(range(9))}, [(2, set(range(slot + 1))) for slot in range(5, 9)], 9)
    case = case_of([story], 4, random.Random(1))
    assert case.visible.sum(1).tolist() == [6, 7, 8, 9]
    check(case, decode_inputs(case))


def test_a_listed_slot_that_nobody_sees_changes_nothing() -> None:
    story = Story({0: {1, 2, 5}, 1: {0, 3, 4}}, [(0, {1, 2, 5})], 6)
    case = case_of([story], 2, random.Random(2))
    inputs = decode_inputs(case)
    expected = check(case, inputs)
    start = int(case.requests[0].slots[0]) - 1
    longer = dataclasses.replace(case.requests[0], slots=range(start, start + 6))
    for each in inputs[1:]:
        each[:, ~case.listed] = 1e3
    output, _ = path_decode(*inputs, DecodePlan.build([longer], case.plan.slot_bits))
    assert torch.allclose(output, expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_a_step_without_new_tokens() -> None:
    bits = torch.zeros(1, 5, dtype=torch.int32)
    for requests in ([], [RequestQueries([], [], [])] * 2):
        plan = DecodePlan.build(requests, bits)
        assert (plan.tokens, plan.max_q, plan.max_kv, plan.slot_end) == (0, 0, 0, 0)
        output, sums = path_decode(torch.zeros(0, 4, 64), torch.zeros(2, 5, 64), torch.zeros(2, 5, 64), plan)
        assert output.shape == (0, 4, 64)
        assert sums.shape == (0, 4)


def test_plan_by_hand() -> None:
    bits = torch.zeros(2, 40, dtype=torch.int32)
    requests = [
        RequestQueries([33, 0], [8, 9], torch.tensor([2, 3, 7, 8])),
        RequestQueries([], [], [11, 12]),  # no query, so its slots are not read
        RequestQueries([5], [40], [20, 39]),
    ]
    plan = DecodePlan.build(requests, bits)
    assert plan.slot_bits is bits
    assert (plan.requests, plan.tokens, plan.words) == (3, 3, 2)
    assert (plan.max_q, plan.max_kv, plan.slot_end) == (2, 4, 40)
    expected = {
        "cu_q": [0, 2, 2, 3],
        "q_request": [0, 0, 2],
        "q_row": [33, 0, 5],
        "q_limit": [8, 9, 40],
        "slot_index": [2, 3, 7, 8, 20, 39],
        "idx_start": [0, 4, 4],
        "idx_len": [4, 0, 2],
    }
    for name, values in expected.items():
        piece = getattr(plan, name)
        assert piece.dtype == torch.int32
        assert piece.tolist() == values


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 64, 70])
def test_words_hold_one_bit_per_row(rows: int) -> None:
    visible = torch.rand(rows, 23, generator=torch.Generator().manual_seed(rows)) < 0.5
    words = pack_rows(visible)
    assert words.dtype == torch.int32
    assert words.shape == (-(-rows // 32), 23)
    for row in range(32 * len(words)):
        for slot in range(23):
            bit = int(words[row // 32, slot]) & (1 << 32) - 1
            assert bool(bit >> row % 32 & 1) == (row < rows and bool(visible[row, slot]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RequestQueries([0, 1], [3], [0]), r"`requests\[1\]` has 2 rows and 1 limits"),
        (RequestQueries([32], [3], [0]), r"`requests\[1\].rows` must be in \[0, 32\).*add words"),
        (RequestQueries([-1], [3], [0]), r"`requests\[1\].rows` must be in \[0, 32\)"),
        (RequestQueries([0], [11], [0]), r"`requests\[1\].limits` must be in \[0, 10\]"),
        (RequestQueries([0], [-1], [0]), r"`requests\[1\].limits` must be in \[0, 10\]"),
        (RequestQueries([0], [3], [2, 1]), r"`requests\[1\].slots` must ascend"),
        (RequestQueries([0], [3], [1, 1]), r"`requests\[1\].slots` must ascend"),
        (RequestQueries([0], [3], [1, 10]), r"`requests\[1\].slots` must be in \[0, 10\)"),
        (RequestQueries([0], [3], [-1, 2]), r"`requests\[1\].slots` must be in \[0, 10\)"),
        (RequestQueries([0], [3], torch.tensor([0.0])), r"`requests\[1\].slots` must be one row of integers"),
        (RequestQueries([0], [3], torch.tensor([[0]])), r"`requests\[1\].slots` must be one row of integers"),
        (RequestQueries([0], [3], torch.ones(2, dtype=torch.bool)), r"`requests\[1\].slots` must be one row"),
        (RequestQueries([0], [3], torch.tensor([0], device="meta")), r"`requests\[1\].slots` must be .* on the CPU"),
    ],
)
def test_wrong_request(request_: RequestQueries, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodePlan.build([RequestQueries([1], [1], [0]), request_], torch.zeros(1, 10, dtype=torch.int32))


def test_wrong_bits() -> None:
    for bits in (torch.zeros(1, 4), torch.zeros(4, dtype=torch.int32), torch.zeros(0, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"`slot_bits` must be an int32 tensor.*pack_rows"):
            DecodePlan.build([], bits)
    with pytest.raises(ValueError, match="`slot_bits` must be contiguous along the slots"):
        DecodePlan.build([], torch.zeros(4, 2, dtype=torch.int32).T)
    for visible in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="`visible` must be a bool tensor"):
            pack_rows(visible)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 64), (2, 9, 64), (2, 9, 64)), r"`q` must have shape \(T, HQ, D\).*transpose"),
        (((3, 4, 64), (9, 64), (9, 64)), r"`q` must have shape"),
        (((3, 4, 64), (2, 9, 64), (2, 8, 64)), r"`q` must have shape"),
        (((3, 4, 64), (2, 9, 32), (2, 9, 32)), r"`q` must have shape"),
        (((3, 3, 64), (2, 9, 64), (2, 9, 64)), "`q` has 3 heads and `k` 2"),
        (((3, 4, 64), (0, 9, 64), (0, 9, 64)), "`q` has 4 heads and `k` 0"),
        (((3, 0, 64), (2, 9, 64), (2, 9, 64)), "`q` has 0 heads and `k` 2"),
        (((3, 4, 257), (2, 9, 257), (2, 9, 257)), "The head dim of `q` must be 1 to 256, got 257"),
        (((3, 4, 0), (2, 9, 0), (2, 9, 0)), "The head dim of `q` must be 1 to 256, got 0"),
        (((2, 4, 64), (2, 9, 64), (2, 9, 64)), "`plan` is for 3 tokens and `q` has 2"),
        (((3, 4, 64), (2, 8, 64), (2, 8, 64)), "`plan` lists slot 8 and `k` has 8 slots"),
    ],
)
def test_wrong_shapes(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        path_decode(*(torch.zeros(shape) for shape in shapes), DecodePlan.build(*NINE_SLOTS))


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = DecodePlan.build(*NINE_SLOTS)
    query, key = torch.zeros(3, 4, 64), torch.zeros(2, 9, 64)
    for wrong in (
        (query.double(), key.double(), key.double()),
        (query, key.half(), key.half()),
        (query, key, key.bfloat16()),
    ):
        with pytest.raises(ValueError, match="`q`, `k` and `v` must share one of the dtypes float16, bfloat16"):
            path_decode(*wrong, plan)
    with pytest.raises(ValueError, match="`q`, `k`, `v` and `plan` must be on one device, got meta, cpu"):
        path_decode(query.to("meta"), key, key, plan)
    with pytest.raises(ValueError, match=r"must be on one device.*bits on meta"):
        path_decode(query, key, key, dataclasses.replace(plan, slot_bits=plan.slot_bits.to("meta")))
    with pytest.raises(ValueError, match="`split_length` must be at least 1, got 0"):
        path_decode(query, key, key, plan, split_length=0)
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="`q` is on the CPU, where Triton kernels do not run"):
        path_decode(query, key, key, plan)
    monkeypatch.setattr(triton_support, "triton", None)
    with pytest.raises(ImportError, match="package `triton`"):
        path_decode(query, key, key, plan)
