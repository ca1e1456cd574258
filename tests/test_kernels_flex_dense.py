"""FlexAttention and the dense backends against the reference."""

import math

import pytest
import torch
from kernel_cases import (
    TOLERANCE,
    MaskCase,
    answer,
    assert_close,
    assert_matches_reference,
    mask_case,
    random_case,
    random_inputs,
    reference_answer,
)
from multiverse.kernels import dense, flex
from multiverse.kernels.dense import DenseMask, dense_path_attention
from multiverse.kernels.flex import flex_block_mask, flex_path_attention
from multiverse.kernels.path_mask import PathMask
from multiverse.structure import StructureMachine
from torch.nn.attention.flex_attention import BlockMask, flex_attention

every_implementation = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def attend_by(implementation: str):
    return lambda query, key, value, mask, scale=None: dense_path_attention(
        query, key, value, mask, scale, implementation
    )


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_dense_output_and_gradients_equal_the_reference(seed: int, dtype: torch.dtype, implementation: str) -> None:
    case = random_case(seed)
    scale = 0.4 if seed % 3 == 0 else None
    assert_matches_reference(attend_by(implementation), case, random_inputs(case, dtype=dtype), scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 7, 16])
@pytest.mark.parametrize("seed", range(8))
def test_dense_in_blocks_of_queries(
    seed: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "QUERY_BLOCK", block)
    case = random_case(seed, batch=1 + seed % 3)
    assert_matches_reference(dense_path_attention, case, random_inputs(case, dtype=dtype))


@pytest.mark.parametrize("seed", range(8))
def test_a_block_of_queries_reaches_from_the_first_key_it_sees_to_the_last(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "QUERY_BLOCK", 6)
    visible = random_case(seed).visible
    spans = DenseMask(visible).spans
    assert len(spans) == math.ceil(visible.shape[1] / 6)
    for number, span in enumerate(spans):
        rows = visible[:, 6 * number : 6 * number + 6]
        seen = [slot for slot in range(visible.shape[2]) if rows[:, :, slot].any()]
        # A block that sees nothing gets some key all the same, so that there is something to call.
        assert span == ((min(seen), max(seen) + 1) if seen else (0, 1))


@every_implementation
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_dense_heads_may_share_keys(heads: tuple[int, int], implementation: str) -> None:
    case = random_case(11)
    assert_matches_reference(attend_by(implementation), case, random_inputs(case, heads, dtype=torch.float64))


@every_implementation
def test_a_row_that_sees_nothing_is_zero_even_where_it_is_no_padding(implementation: str) -> None:
    hidden = torch.tensor([[[2, 2, 0]]], dtype=torch.int32)
    mask = PathMask(hidden, torch.full_like(hidden, 3), torch.zeros(1, 3, dtype=torch.int32), 3)
    leaves = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3)]
    output = dense_path_attention(*leaves, mask, implementation=implementation)
    assert (output[:, :, 2] == 0).all()
    assert (output[:, :, 0] == leaves[2][:, :, 0]).all()
    output.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert (leaves[0].grad[:, :, 2] == 0).all()
    assert (leaves[1].grad[:, :, 2] == 0).all()


def test_dense_mask_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(0)
    leaves = random_inputs(case).leaves
    built = []
    plain = PathMask.visible
    monkeypatch.setattr(PathMask, "visible", lambda mask: built.append(mask) or plain(mask))
    for implementation in ("sdpa", "eager", "sdpa"):
        dense_path_attention(*leaves, case.mask, implementation=implementation)
    assert built == [case.mask]
    assert case.mask.nbytes > case.visible.nbytes


def test_unknown_implementation() -> None:
    case = random_case(0)
    with pytest.raises(ValueError, match=r"`implementation` must be one of \('sdpa', 'eager'\), got 'flash'"):
        dense_path_attention(*random_inputs(case).leaves, case.mask, implementation="flash")


@pytest.mark.parametrize("attend", [dense_path_attention, flex_path_attention], ids=["dense", "flex"])
def test_wrong_shapes_are_refused(attend) -> None:
    case = random_case(0)
    query, key, value = random_inputs(case).leaves
    with pytest.raises(ValueError, match="`key` must have shape"):
        attend(query, key[:, :, 1:], value, case.mask)


def case_of_many_blocks() -> MaskCase:
    """430 new tokens of 450, so that blocks of 128 are full, partial, empty and ragged: a text of two paths, and two
    documents with padding on the right."""
    texts = [StructureMachine(), StructureMachine()]
    texts[0].read_plain(148)
    texts[0].read_tag("<Parallel>")
    for length in (127, 130):
        texts[0].read_tag("<Path>")
        texts[0].read_plain(length)
    texts[0].read_tag("<Conclusion>")
    texts[0].read_plain(450 - texts[0].length)
    texts[1].read_plain(256)
    texts[1].start_document()
    texts[1].read_plain(174)
    real = torch.ones(2, 450, dtype=torch.bool)
    real[1, 430:] = False
    return mask_case(texts, real, queries=430)


@torch.no_grad()
def test_compiled_flex_forward_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    # Headers that are compiled first pay off from the second kernel on.
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    case = case_of_many_blocks()
    blocks = case.mask.block_runs(128, 128)
    full, partial = (int((runs.end - runs.start).sum()) for runs in blocks)
    assert full > 0
    assert full + partial < 2 * (2 + 3 + 4 + 4)  # some are empty beyond those that causality empties
    inputs = random_inputs(case, heads=(2, 1))
    output = flex_path_attention(*inputs.leaves, case.mask, scale=0.3)
    with torch.enable_grad():
        exact = reference_answer(inputs, case, scale=0.3)
    assert_close(output, exact.output, TOLERANCE[torch.float32], "output")
    assert (output.transpose(1, 2)[~case.visible.any(2)] == 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_flex_predicate_gives_output_and_gradients_of_the_reference(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention refuses gradients on the CPU, though its uncompiled form can compute them: it evaluates the
    predicate for all pairs, and knows no blocks."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    case = random_case(seed)

    def attend(query, key, value, mask, scale):
        inputs = mask.without_padding(query, key, value)
        return flex_attention(*inputs, block_mask=flex_block_mask(mask), scale=scale, enable_gqa=True)

    assert_matches_reference(attend, case, random_inputs(case), scale=0.4 if seed % 2 else None)


def visible_blocks(counts: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Bool `(B, outer, columns)` of the blocks that a table of FlexAttention lists, which must be in order."""
    dense = torch.zeros(table.shape, dtype=torch.bool)[:, 0]
    for row in range(table.shape[0]):
        for outer, count in enumerate(counts[row, 0].tolist()):
            listed = table[row, 0, outer, :count].tolist()
            assert listed == sorted(set(listed))
            dense[row, outer, listed] = True
    return dense


@pytest.mark.parametrize("seed", range(6))
def test_flex_blocks_are_those_that_pytorch_would_find(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_SMALLEST_BLOCK", 16)
    case = random_case(seed)
    found = flex_block_mask(case.mask)
    assert found.BLOCK_SIZE == (16, 16)
    assert found.shape == (case.mask.batch_size, 1, case.mask.queries, case.mask.slots)
    batch, queries, slots = case.visible.shape
    rows, columns = math.ceil(queries / 16), math.ceil(slots / 16)
    padded = torch.zeros(batch, rows * 16, columns * 16, dtype=torch.bool)
    padded[:, :queries, :slots] = case.visible
    blocks = padded.view(batch, rows, 16, columns, 16)
    live, full = blocks.any(4).any(2), blocks.all(4).all(2)
    assert torch.equal(visible_blocks(found.full_kv_num_blocks, found.full_kv_indices), full)
    assert torch.equal(visible_blocks(found.kv_num_blocks, found.kv_indices), live & ~full)
    # What PyTorch makes of the query side when it is given the key side only.
    by_pytorch = BlockMask.from_kv_blocks(
        found.kv_num_blocks, found.kv_indices, found.full_kv_num_blocks, found.full_kv_indices, BLOCK_SIZE=16
    )
    for name in ("q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(by_pytorch, name))
    for counts, table in (("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")):
        expected = visible_blocks(getattr(by_pytorch, counts), getattr(by_pytorch, table))
        assert torch.equal(visible_blocks(getattr(found, counts), getattr(found, table)), expected)
    for name in vars(by_pytorch):
        tensor, expected = getattr(found, name), getattr(by_pytorch, name)
        if isinstance(expected, torch.Tensor):
            assert (tensor.dtype, tensor.shape, tensor.stride()) == (expected.dtype, expected.shape, expected.stride())


def test_flex_blocks_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_SMALLEST_BLOCK", 4)
    monkeypatch.setattr(flex, "_MOST_BLOCKS", 8)
    lengths = (31, 32, 33, 64, 65)
    sizes = [flex_block_mask(random_case(0, slots=slots).mask).BLOCK_SIZE for slots in lengths]
    assert sizes == [(size, size) for size in (4, 4, 8, 8, 16)]


def test_flex_block_mask_is_kept_and_counted() -> None:
    mask = random_case(0).mask
    before = mask.nbytes
    assert flex_block_mask(mask) is flex_block_mask(mask)
    tables = [table for table in vars(flex_block_mask(mask)).values() if isinstance(table, torch.Tensor)]
    assert mask.nbytes >= before + sum(table.nbytes for table in tables)


def test_flex_says_that_it_cannot_train_on_the_cpu() -> None:
    case = random_case(0)
    inputs = random_inputs(case)
    with pytest.raises(NotImplementedError, match=r"no backward pass on the CPU.*'sdpa' or 'eager'"):
        answer(inputs, lambda *qkv: flex_path_attention(*qkv, case.mask))
