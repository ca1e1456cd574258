"""Attention through the varlen contract of flash-attn, with a slow function of that contract in its place."""

import sys
from itertools import pairwise

import pytest
import torch
from kernel_cases import MaskCase, answer, assert_matches_reference, mask_case, random_case, random_inputs
from layout_samples import NESTED, machine_of
from multiverse.kernels import flash_varlen
from multiverse.kernels.flash_varlen import VarlenPlan, flash_varlen_attention
from multiverse.kernels.path_mask import PathMask
from strategies import Sample


def causal_bottom_right(queries: int, keys: int) -> torch.Tensor:
    """flash-attn's causal mask since 2.1: aligned to the bottom right corner of the attention matrix."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def slow_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """`flash_attn_varlen_func` by its documentation, for any dtype.

    `q` is `(total_q, heads, D)`, `k` and `v` are `(total_k, kv heads, D)`; the `cu_seqlens` are int32 of shape
    `(sequences + 1,)`. With `causal` the mask is aligned bottom right. Query head h reads key head h // group.
    """
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert bounds_q[0] == bounds_k[0] == 0
    assert (bounds_q[-1], bounds_k[-1]) == (len(q), len(k))
    assert max_seqlen_q == max(b - a for a, b in pairwise(bounds_q))
    assert max_seqlen_k == max(b - a for a, b in pairwise(bounds_k))
    group = q.shape[1] // k.shape[1]
    outputs = []
    for sequence in range(len(bounds_q) - 1):
        queries = q[bounds_q[sequence] : bounds_q[sequence + 1]]
        keys, values = (
            each[bounds_k[sequence] : bounds_k[sequence + 1]].repeat_interleave(group, 1) for each in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * (
            q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        )
        scores = scores.masked_fill(~causal_bottom_right(len(queries), len(keys)), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), values))
    return torch.cat(outputs)


def through_contract(query, key, value, mask: PathMask, scale: float | None = None) -> torch.Tensor:
    return flash_varlen_attention(query, key, value, mask, scale, varlen=slow_varlen)


def test_slow_function_aligns_as_flash_attn_documents() -> None:
    """The two examples of flash-attn's docstring."""
    assert causal_bottom_right(2, 5).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert causal_bottom_right(5, 2).int().tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_output_and_gradients_equal_the_reference(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed)
    scale = 0.5 if seed % 3 == 0 else None
    assert_matches_reference(through_contract, case, random_inputs(case, dtype=dtype), scale)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_heads_may_share_keys(heads: tuple[int, int]) -> None:
    case = random_case(11)
    assert_matches_reference(through_contract, case, random_inputs(case, heads, dtype=torch.float64))


@pytest.mark.parametrize("queries", [1, 2, 13, 39, 40])
def test_new_tokens_after_a_cache(queries: int) -> None:
    case = random_case(5, slots=40, queries=queries, documents=1)
    assert_matches_reference(through_contract, case, random_inputs(case, dtype=torch.float64))


def test_new_tokens_that_are_all_padding_give_zeros() -> None:
    real = torch.ones(1, len(NESTED) + 3, dtype=torch.bool)
    real[:, -3:] = False
    case = mask_case([machine_of(Sample(NESTED))], real, queries=3)
    inputs = random_inputs(case)
    found = answer(inputs, lambda *qkv: through_contract(*qkv, case.mask))
    assert all((each == 0).all() for each in vars(found).values())


def sequences(case: MaskCase) -> list[tuple[list[int], list[int]]]:
    """Rows and keys of every sequence of the plan, as flat numbers."""
    plan = VarlenPlan.from_mask(case.mask)
    rows, keys = plan.query_index().tolist(), plan.key_index().tolist()
    assert (len(rows), len(keys)) == (plan.queries, plan.keys)
    bounds = zip(plan.query_offsets.tolist(), plan.key_offsets.tolist(), strict=True)
    return [(rows[a:b], keys[c:d]) for (a, c), (b, d) in pairwise(bounds)]


@pytest.mark.parametrize("seed", range(30))
def test_each_row_is_in_one_sequence_with_all_it_sees_and_no_more(seed: int) -> None:
    case = random_case(seed)
    _, queries, slots = case.visible.shape
    seen: list[int] = []
    for rows, keys in sequences(case):
        seen += rows
        for row, last in zip(rows, range(len(keys) - len(rows), len(keys)), strict=True):
            visible = case.visible.flatten(0, 1)[row].nonzero().flatten() + row // queries * slots
            assert keys[: last + 1] == visible.tolist()
    assert seen == case.real_queries.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("seed", range(10))
def test_a_sequence_is_a_whole_stretch_and_its_ranges_do_not_touch(seed: int) -> None:
    case = random_case(seed, queries=None)
    branches = case.mask.branch_ids[:, case.mask.slots - case.mask.queries :]
    changes = (branches[:, 1:] != branches[:, :-1]) & (branches[:, 1:] >= 0)
    assert len(sequences(case)) == int(changes.sum()) + int((branches[:, 0] >= 0).sum())
    plan = VarlenPlan.from_mask(case.mask)
    first = torch.zeros(plan.keys + 1, dtype=torch.bool)
    first[plan.key_offsets.long()] = True
    range_first = (plan.key_end - plan.key_start).cumsum(0) - (plan.key_end - plan.key_start)
    within = ~first[range_first][1:]
    assert (plan.key_start[1:][within] > plan.key_end[:-1][within]).all()


def test_plan_is_made_once_and_small() -> None:
    mask = random_case(0, batch=1, slots=2001, documents=3).mask
    inputs = [torch.zeros(1, 1, tokens, 1) for tokens in (mask.queries, mask.slots, mask.slots)]
    calls = []

    def fake(q, k, v, **options):
        calls.append((len(q), len(k)))
        return q

    before = mask.nbytes
    for _ in range(2):
        flash_varlen_attention(*inputs, mask, varlen=fake)
    assert calls[0] == calls[1]
    plan = mask.derived("varlen_plan", lambda: pytest.fail("not kept"))
    assert mask.nbytes - before < 2 * plan.nbytes + 4096
    # A gather index that is kept would take four bytes for each of these.
    assert plan.nbytes < plan.keys


def test_without_flash_attn_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_varlen, "flash_attn_varlen_func", None)
    case = random_case(0)
    leaves = random_inputs(case, dtype=torch.bfloat16).leaves
    with pytest.raises(ImportError, match="pip install flash-attn"):
        flash_varlen_attention(*leaves, case.mask)


def test_installed_function_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_varlen, "flash_attn_varlen_func", slow_varlen)
    case = random_case(0)
    assert_matches_reference(flash_varlen_attention, case, random_inputs(case, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"`query` is torch.float32, but flash-attn .* float16 and bfloat16 only"):
        flash_varlen_attention(*random_inputs(case).leaves, case.mask)


def test_wrong_shapes_are_refused_before_anything_runs() -> None:
    case = random_case(0)
    query, key, value = random_inputs(case).leaves
    with pytest.raises(ValueError, match="`query` must have shape"):
        flash_varlen_attention(query[:1], key, value, case.mask, varlen=pytest.fail)


def test_import_works_without_flash_attn() -> None:
    assert "flash_attn" in sys.modules or flash_varlen.flash_attn_varlen_func is None
