"""Masks from outside, and the masks, attention kernels and windows that are refused."""

import pytest
import torch
from cases import TOLERANCE, every_architecture
from forward import (
    OPEN_BLOCK,
    TWO_PATHS,
    WORDS,
    additive,
    difference,
    every_dtype,
    every_mask_attention,
    examples,
    logits_of,
    models,
    pad,
    reference_mask,
    row,
    texts,
)
from hypothesis import given
from multiverse.masking_multiverse import dense_causal_mask
from reference_layout import reference_layout
from tiny import TOKEN_IDS, tiny_model


@every_architecture
@every_mask_attention
@every_dtype
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_explicit_mask_gives_what_the_built_one_gives(
    architecture: str, attention: str, dtype: torch.dtype, kind: str
) -> None:
    model, _ = models(architecture, dtype, attention)

    @examples(6)
    @given(texts)
    def check(ids: list[int]) -> None:
        layout = reference_layout(ids, TOKEN_IDS)
        mask = reference_mask(layout) if kind == "bool" else additive(reference_mask(layout), dtype)
        found = logits_of(model, row(ids), attention_mask=mask, position_ids=row(layout.positions))
        assert difference(found, logits_of(model, row(ids))) <= TOLERANCE[dtype]

    check()


@every_mask_attention
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_explicit_mask_serves_rows_that_differ_and_a_cache(attention: str, kind: str) -> None:
    model, _ = models("qwen3", torch.float64, attention)
    rows = [TWO_PATHS, OPEN_BLOCK]
    input_ids, real = pad(rows, "right")
    length = input_ids.shape[1]
    mask = torch.eye(length, dtype=torch.bool).repeat(2, 1, 1, 1)
    positions = torch.zeros_like(input_ids)
    for number, ids in enumerate(rows):
        layout = reference_layout(ids, TOKEN_IDS)
        mask[number, 0, : len(ids), : len(ids)] = torch.tensor(layout.visible)
        positions[number, : len(ids)] = torch.tensor(layout.positions)
    mask = mask if kind == "bool" else additive(mask, torch.float64)
    past_key_values, found = None, []
    for start, end in ((0, 11), (11, 18), (18, length)):
        with torch.no_grad():
            output = model(
                input_ids=input_ids[:, start:end],
                attention_mask=mask[:, :, start:end, :end],
                position_ids=positions[:, start:end],
                past_key_values=past_key_values,
                use_cache=True,
            )
        past_key_values = output.past_key_values
        found.append(output.logits)
    logits = torch.cat(found, dim=1)
    for number, ids in enumerate(rows):
        assert difference(logits[number, real[number] == 1], logits_of(model, row(ids))[0]) <= 1e-5
    with pytest.raises(ValueError, match="`past_key_values` was filled under a 4D `attention_mask`"):
        logits_of(model, torch.tensor([TWO_PATHS] * 2), past_key_values=past_key_values)


@every_architecture
@every_mask_attention
def test_explicit_bool_mask_is_honoured_on_untagged_text(architecture: str, attention: str) -> None:
    # Transformers' own eager attention adds a bool mask to the scores as 0 and 1, which hides nothing.
    model, base = models(architecture, torch.float64, attention)
    mask = torch.ones(len(WORDS), len(WORDS), dtype=torch.bool).tril()
    mask[8:, 2:5] = False
    found = logits_of(model, row(WORDS), attention_mask=mask[None, None])
    expected = logits_of(base, row(WORDS), attention_mask=additive(mask[None, None], torch.float64))
    assert difference(found, expected) <= 1e-5


@every_architecture
@pytest.mark.parametrize("ids", [TWO_PATHS, WORDS], ids=["tagged", "untagged"])
@pytest.mark.parametrize("dimensions", [1, 3, 5])
def test_attention_mask_with_other_dimensions_raises(architecture: str, ids: list[int], dimensions: int) -> None:
    model, _ = models(architecture)
    mask = torch.ones((1,) * (dimensions - 1) + (len(ids),), dtype=torch.bool)
    with pytest.raises(ValueError, match="`attention_mask` must have 2 dimensions"):
        logits_of(model, row(ids), attention_mask=mask)


@every_architecture
def test_explicit_mask_without_positions_raises_on_tagged_text(architecture: str) -> None:
    model, _ = models(architecture)
    mask = reference_mask(reference_layout(TWO_PATHS, TOKEN_IDS))
    with pytest.raises(ValueError, match="`position_ids` is None next to a 4D `attention_mask`"):
        logits_of(model, row(TWO_PATHS), attention_mask=mask)


@every_architecture
@pytest.mark.parametrize("masked", [False, True], ids=["built", "explicit"])
def test_unsupported_attention_raises_on_tagged_text(architecture: str, masked: bool) -> None:
    model = tiny_model(architecture)
    model.config._attn_implementation = "flash_attention_3"
    layout = reference_layout(TWO_PATHS, TOKEN_IDS)
    arguments = {"attention_mask": reference_mask(layout), "position_ids": row(layout.positions)} if masked else {}
    with pytest.raises(ValueError, match="`attn_implementation` is 'flash_attention_3'"):
        logits_of(model, row(TWO_PATHS), **arguments)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_sliding_windows_raise_on_tagged_text(architecture: str) -> None:
    model = tiny_model(architecture, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match=r"`config\.layer_types` .*`use_sliding_window=False`"):
        logits_of(model, row(TWO_PATHS))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("with_mask", [False, True])
def test_dense_mask_holds_the_rule_pair_by_pair(seed: int, with_mask: bool) -> None:
    """Cached slots before the new tokens, room after them, padding that only the branches or only the mask know of."""
    random = torch.Generator().manual_seed(seed)
    first, new, spare, branches_of_a_row = 5, 7, seed % 3, 4
    known, rows = first + new, 2
    branches = torch.randint(-1, branches_of_a_row, (rows, known), generator=random)
    slots = torch.nn.functional.pad(branches, (0, spare), value=-1)
    compatible = torch.rand(rows, branches_of_a_row, branches_of_a_row, generator=random) < 0.6
    attention_mask = (torch.rand(rows, known, generator=random) < 0.8).long() if with_mask else None
    config = tiny_model(attention="sdpa").config
    found = dense_causal_mask(config, slots, compatible, first, new, attention_mask, torch.float32)
    assert found.shape == (rows, 1, new, known + spare)
    for batch in range(rows):
        for query in range(new):
            for slot in range(known + spare):
                seen = slot <= first + query and int(slots[batch, slot]) >= 0
                seen = seen and (attention_mask is None or bool(attention_mask[batch, slot]))
                # What a padding query sees is of no consequence; it must merely not see what it may not.
                own = max(0, int(slots[batch, first + query]))
                seen = seen and bool(compatible[batch, own, slots[batch, slot]])
                assert bool(found[batch, 0, query, slot]) == seen
