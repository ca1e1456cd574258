"""The Triton training kernels against the reference, in Triton's interpreter where there is no GPU."""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import (
    Inputs,
    MaskCase,
    answer,
    assert_matches_reference,
    mask_case,
    random_case,
    random_inputs,
)
from multiverse.kernels import launch_table, triton_support
from multiverse.kernels.launch_table import TRAINING, Launch
from multiverse.kernels.path_attention import path_attention
from multiverse.kernels.path_mask import PathMask
from multiverse.kernels.triton_support import INTERPRETED
from multiverse.structure import StructureMachine

DEVICE = "cpu" if INTERPRETED else "cuda"
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def case_of(seed: int, **options) -> MaskCase:
    return random_case(seed, device=DEVICE, **options)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the block size of all kernels, so that short texts have many blocks."""

    def choose(block_m: int, block_n: int) -> None:
        small = dict.fromkeys(TRAINING, Launch(block_m, block_n, warps=4, stages=2))
        monkeypatch.setattr(launch_table, "TRAINING", small)

    return choose


@every_dtype
@pytest.mark.parametrize("seed", range(3))
def test_output_and_gradients_equal_the_reference(seed: int, dtype: torch.dtype) -> None:
    case = case_of(seed)
    inputs = random_inputs(case, (2, 1), dtype=dtype)
    assert_matches_reference(path_attention, case, inputs, 0.4 if seed == 0 else None)


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("seed", [11, 13])
def test_block_sizes_do_not_matter(seed: int, size: tuple[int, int], blocks: Callable[[int, int], None]) -> None:
    blocks(*size)
    case = case_of(seed, batch=1)
    assert_matches_reference(path_attention, case, random_inputs(case, (2, 1)))


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (6, 2), (4, 1)], ids=str)
def test_heads_may_share_keys(heads: tuple[int, int], blocks: Callable[[int, int], None]) -> None:
    blocks(16, 16)
    case = case_of(20, batch=1, slots=37)
    assert_matches_reference(path_attention, case, random_inputs(case, heads))


@pytest.mark.parametrize("dim", [1, 20, 64, 96, 256])
def test_head_dims(dim: int) -> None:
    case = case_of(30, batch=1, slots=35, queries=35)
    assert_matches_reference(path_attention, case, random_inputs(case, (2, 1), dim))


@pytest.mark.parametrize("queries", [1, 16, 40])
def test_new_tokens_after_a_cache(queries: int, blocks: Callable[[int, int], None]) -> None:
    blocks(16, 16)
    case = case_of(40 + queries, slots=53, queries=queries)
    assert_matches_reference(path_attention, case, random_inputs(case, (2, 1)))


def test_documents_packed_into_a_row(blocks: Callable[[int, int], None]) -> None:
    blocks(16, 16)
    case = case_of(50, batch=1, slots=67, queries=67, documents=3, padded=False)
    assert case.mask.real_slots() is None
    assert_matches_reference(path_attention, case, random_inputs(case, (2, 1)))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding(side: str, blocks: Callable[[int, int], None]) -> None:
    blocks(16, 16)
    real = torch.ones(2, 50, dtype=torch.bool)
    # A whole block of padding, beside blocks that hold some.
    real[0, {"left": slice(0, 37), "right": slice(13, 50), "middle": slice(11, 42)}[side]] = False
    texts = [StructureMachine(), StructureMachine()]
    for text, length in zip(texts, real.sum(1).tolist(), strict=True):
        write_tree(text, length // 4, length // 4, length // 4)
        text.read_plain(length - text.length)
    case = mask_case(texts, real, device=DEVICE)
    assert_matches_reference(path_attention, case, random_inputs(case, (2, 1)))


def write_tree(text: StructureMachine, prefix: int, *paths: int) -> list[slice]:
    """Reads `prefix` tokens and a block whose paths have so many tokens each; returns where the paths stand."""
    text.read_plain(prefix - 1)
    text.read_tag("<Parallel>")
    spans = []
    for length in paths:
        start = text.length
        text.read_tag("<Path>")
        text.read_plain(length - 2)
        text.read_tag("</Path>")
        spans.append(slice(start, text.length))
    text.read_tag("<Conclusion>")
    return spans


def siblings() -> tuple[MaskCase, list[slice]]:
    """16 tokens, paths of 16 and 17, and 3 after them: of blocks of 16 some are dead, some full, some partial."""
    text = StructureMachine()
    spans = write_tree(text, 16, 16, 17)
    assert spans == [slice(16, 32), slice(32, 49)]
    text.read_plain(52 - text.length)
    return mask_case([text], torch.ones(1, 52, dtype=torch.bool), device=DEVICE), spans


def test_nothing_passes_between_siblings(blocks: Callable[[int, int], None]) -> None:
    blocks(16, 16)
    case, paths = siblings()
    inputs = random_inputs(case, (2, 1))
    for path in paths:
        gradient = torch.zeros_like(inputs.grad_output)
        gradient[:, :, path] = inputs.grad_output[:, :, path]
        found = answer(Inputs(*inputs.leaves, gradient), lambda *qkv: path_attention(*qkv, case.mask))
        for other in paths:
            for each in (found.query, found.key, found.value):
                assert bool((each[:, :, other] == 0).all()) is (other != path)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_blocks_of_which_nothing_is_visible_are_not_read(blocks: Callable[[int, int], None]) -> None:
    blocks(16, 16)
    case, (first, _) = siblings()
    query, key, value = (leaf.detach().clone() for leaf in random_inputs(case, (2, 1)).leaves)
    clean = path_attention(query, key, value, case.mask)
    for tensor in (key, value):
        tensor[:, :, first] = torch.nan
    poisoned = path_attention(query, key, value, case.mask)
    # The last rows share a block with those after the paths, which see the first.
    for rows in (slice(0, 16), slice(32, 48)):
        assert torch.equal(poisoned[:, :, rows], clean[:, :, rows])
    assert poisoned[:, :, first].isnan().all()


@every_dtype
def test_a_row_that_sees_nothing_is_zero_even_where_it_is_no_padding(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[[2, 2, 0]]], dtype=torch.int32, device=DEVICE)
    mask = PathMask(hidden, torch.full_like(hidden, 3), torch.zeros(1, 3, dtype=torch.int32, device=DEVICE), 3)
    case = MaskCase(mask, torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 0]]], dtype=torch.bool, device=DEVICE))
    assert torch.equal(mask.visible(), case.visible)
    assert_matches_reference(path_attention, case, random_inputs(case, dtype=dtype))


def test_strides_of_any_kind(blocks: Callable[[int, int], None]) -> None:
    blocks(16, 16)
    case = case_of(60, batch=2, slots=19, queries=19, padded=False)
    plain = random_inputs(case, (2, 2))
    shuffled = [leaf.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) for leaf in plain.leaves]
    assert all(leaf.stride(-1) != 1 for leaf in shuffled)
    # One head for all, and values that are part of a longer row.
    shuffled[1] = plain.key.detach()[:, :1].expand(-1, 2, -1, -1)
    shuffled[2] = torch.cat((plain.key, plain.value), -1).detach()[..., plain.key.shape[-1] :]
    gradient = plain.grad_output[:1, :1, :, :1].expand_as(plain.grad_output)
    inputs = Inputs(*(leaf.requires_grad_() for leaf in shuffled), gradient)
    assert_matches_reference(path_attention, case, inputs)


def test_output_is_stored_token_by_token() -> None:
    case = case_of(70, batch=1)
    assert path_attention(*random_inputs(case).leaves, case.mask).transpose(1, 2).is_contiguous()


def test_every_run_gives_the_same_bits() -> None:
    case = case_of(71, batch=1)
    inputs = random_inputs(case, (2, 1), dtype=torch.float16)
    first, second = (answer(inputs, lambda *qkv: path_attention(*qkv, case.mask)) for _ in range(2))
    assert all(torch.equal(vars(first)[name], vars(second)[name]) for name in vars(first))


def test_blocks_of_the_launch_table() -> None:
    """Wider ones, of which some are full, some partial and some dead."""
    text = StructureMachine()
    write_tree(text, 130, 120, 70)
    text.read_plain(331 - text.length)
    case = mask_case([text], torch.ones(1, 331, dtype=torch.bool), queries=309, device=DEVICE)
    assert_matches_reference(path_attention, case, random_inputs(case, (1, 1), dtype=torch.float16))


def test_differentiable_once() -> None:
    case = case_of(72, batch=1, slots=17)
    query, key, value = random_inputs(case, poisoned=False).leaves
    (gradient,) = torch.autograd.grad(
        path_attention(query, key, value, case.mask).square().sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


REFUSALS = {
    "`query` must have shape": lambda q, k, v: (q[0], k, v),
    "`query` must have shape .* with 2 rows": lambda q, k, v: (q[:1], k, v),
    "`key` must have shape": lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:]),
    "`value` must have the shape of `key`": lambda q, k, v: (q, k, v[..., 1:]),
    "`query` has 3 heads, `key` 2": lambda q, k, v: (q[:, 1:], k, v),
    "`key` is torch.float16": lambda q, k, v: (q, k.half(), v),
    "`value` is torch.float16": lambda q, k, v: (q, k, v.half()),
    "`query` is torch.float64; the Triton kernels take": lambda q, k, v: (q.double(), k.double(), v.double()),
    "`query` has head dim 257; .* at most 256": lambda q, k, v: tuple(
        each[..., :1].expand(*each.shape[:3], 257) for each in (q, k, v)
    ),
    "there is nothing to attend to": lambda q, k, v: (q[:, :0], k, v),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_fit_is_refused(message: str) -> None:
    case = case_of(73)
    with pytest.raises(ValueError, match=message):
        path_attention(*REFUSALS[message](*random_inputs(case).leaves), case.mask)


def test_compiled_kernels_refuse_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(74)
    leaves = random_inputs(case).leaves
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="`query` is on the CPU, where Triton kernels do not run: move it to a GPU"):
        path_attention(*leaves, case.mask)
    monkeypatch.setattr(triton_support, "triton", None)
    with pytest.raises(ImportError, match=r"multiverse-transformers\[kernels\]"):
        path_attention(*leaves, case.mask)
