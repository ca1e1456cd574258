"""The reference itself: attention by the formula, written out once more with plain numbers."""

import math

import pytest
import torch
from kernel_cases import random_case
from multiverse.kernels.reference import path_attention_reference


def plain_attention(
    query: list[list[float]], key: list[list[float]], value: list[list[float]], visible: list[list[bool]], scale: float
) -> tuple[list[list[float]], list[float]]:
    """One head in Python floats: `exp(score) / sum` over what is seen."""
    outputs, sums = [], []
    for q, sees in zip(query, visible, strict=True):
        terms = [
            (math.exp(scale * sum(a * b for a, b in zip(q, k, strict=True))), v)
            for k, v, seen in zip(key, value, sees, strict=True)
            if seen
        ]
        total = sum(weight for weight, _ in terms)
        dims = range(len(q))
        outputs.append([sum(weight * v[dim] for weight, v in terms) / total if terms else 0.0 for dim in dims])
        sums.append(math.log(total) if terms else -math.inf)
    return outputs, sums


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_every_head_follows_the_formula(seed: int, scale: float | None) -> None:
    case = random_case(seed)
    batch, queries, slots = case.visible.shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, tokens, 4, dtype=torch.float64, generator=generator)
        for heads, tokens in ((6, queries), (2, slots), (2, slots))
    )
    output, sums = path_attention_reference(query, key, value, case.visible, scale)
    assert output.shape == query.shape
    assert sums.shape == query.shape[:3]
    for row in range(batch):
        for head in range(6):
            arguments = (query[row, head], key[row, head // 3], value[row, head // 3], case.visible[row])
            expected = plain_attention(*(each.tolist() for each in arguments), 0.5 if scale is None else scale)
            assert torch.allclose(output[row, head], output.new_tensor(expected[0]), rtol=0, atol=1e-13)
            assert torch.allclose(sums[row, head], sums.new_tensor(expected[1]), rtol=0, atol=1e-13)


def test_a_query_that_sees_nothing_is_exactly_zero_and_has_no_gradient() -> None:
    query, key, value = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    visible = torch.tensor([[[True, False, False], [False] * 3, [True, False, True]]])
    output, sums = path_attention_reference(query, key, value, visible)
    assert (output[0, :, 1] == 0).all()
    assert (sums[0, :, 1] == -torch.inf).all()
    output.sum().backward()
    assert (query.grad[0, :, 1] == 0).all()
    assert (key.grad[0, :, 1] == 0).all()
    assert (value.grad[0, :, 1] == 0).all()
    assert all(each.grad.isfinite().all() for each in (query, key, value))


def test_a_batch_that_sees_nothing_has_gradients_of_zero() -> None:
    query, key, value = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    output, _ = path_attention_reference(query, key, value, torch.zeros(1, 3, 3, dtype=torch.bool))
    output.sum().backward()
    assert all((each.grad == 0).all() for each in (query, key, value))


def test_what_nobody_sees_is_not_read() -> None:
    case = random_case(0, batch=1, slots=20, queries=20)
    query, key, value = (torch.randn(1, 2, 20, 4) for _ in range(3))
    unseen = ~case.visible.any(1)[0]
    assert unseen.any()
    expected = path_attention_reference(query, key, value, case.visible)
    key[:, :, unseen], value[:, :, unseen] = torch.nan, torch.inf
    for found, exact in zip(path_attention_reference(query, key, value, case.visible), expected, strict=True):
        assert torch.equal(found, exact)


def test_autograd_gives_its_derivatives() -> None:
    case = random_case(2, batch=1, slots=9, queries=6, documents=2)
    query, key, value = (
        torch.randn(1, heads, tokens, 3, dtype=torch.float64, requires_grad=True)
        for heads, tokens in ((2, 6), (1, 9), (1, 9))
    )
    assert torch.autograd.gradcheck(
        lambda *qkv: path_attention_reference(*qkv, case.visible)[0], (query, key, value), atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_result_has_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 1, 3, 4).to(dtype) for _ in range(3))
    visible = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    for each in path_attention_reference(query, key, value, visible):
        assert each.dtype == dtype


def test_wrong_arguments() -> None:
    query, key = torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 6, 8)
    with pytest.raises(ValueError, match=r"`visible` must be bool of shape \(1, 4, 6\).*got torch.float32"):
        path_attention_reference(query, key, key, torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match=r"`visible` must be bool of shape \(1, 4, 6\).*\(1, 6, 4\)"):
        path_attention_reference(query, key, key, torch.zeros(1, 6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="`query` has 3 heads, `key` 2"):
        path_attention_reference(query, key, key, torch.zeros(1, 4, 6, dtype=torch.bool))
