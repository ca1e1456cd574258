"""Untagged text: the logits are the base model's to the last bit."""

import pytest
import torch
from cases import every_architecture
from forward import (
    NESTED,
    STRAY_TAGS,
    WORDS,
    both_sides,
    difference,
    every_dtype,
    every_mask_attention,
    every_stock_padded_kind,
    fresh_models,
    logits_of,
    models,
    pad,
    positions_of,
    restarting,
    row,
    with_and_without_positions,
)
from transformers import DynamicCache


def assert_equal_to_base(
    architecture: str, attention: str, dtype: torch.dtype, input_ids: torch.Tensor, **arguments
) -> None:
    model, base = models(architecture, dtype, attention)
    expected = logits_of(base, input_ids, **arguments)
    assert difference(logits_of(model, input_ids, **arguments), expected) == 0.0


@every_architecture
@every_mask_attention
@every_dtype
def test_untagged_text_is_the_base_models(architecture: str, attention: str, dtype: torch.dtype) -> None:
    assert_equal_to_base(architecture, attention, dtype, torch.tensor([WORDS, WORDS[::-1]]))


@every_architecture
@every_mask_attention
@every_dtype
def test_tags_without_a_block_are_the_base_models(architecture: str, attention: str, dtype: torch.dtype) -> None:
    assert_equal_to_base(architecture, attention, dtype, row(STRAY_TAGS))


@every_architecture
@every_stock_padded_kind
@both_sides
@with_and_without_positions
def test_untagged_padded_text_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype, side: str, positions: bool
) -> None:
    input_ids, mask = pad([WORDS, WORDS[3:8]], side)
    arguments = {"position_ids": positions_of(mask)} if positions else {}
    assert_equal_to_base(architecture, attention, dtype, input_ids, attention_mask=mask, **arguments)


@every_architecture
@every_mask_attention
@every_dtype
def test_untagged_text_with_positions_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype
) -> None:
    positions = torch.arange(len(WORDS))[None]
    assert_equal_to_base(architecture, attention, dtype, row(WORDS), position_ids=positions)
    assert_equal_to_base(architecture, attention, dtype, row(WORDS), position_ids=positions + 7)


@every_architecture
@every_mask_attention
@every_dtype
@pytest.mark.parametrize("use_cache", [None, False])
def test_untagged_packed_text_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype, use_cache: bool | None
) -> None:
    positions = restarting([WORDS[:6], WORDS[6:]])
    arguments = {} if use_cache is None else {"use_cache": use_cache}
    assert_equal_to_base(architecture, attention, dtype, row(WORDS), position_ids=positions, **arguments)


@every_architecture
@every_stock_padded_kind
@with_and_without_positions
def test_untagged_cached_text_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype, positions: bool
) -> None:
    input_ids, mask = pad([WORDS, WORDS[3:8]], "left")
    found = []
    for model in models(architecture, dtype, attention):
        past_key_values = DynamicCache(config=model.config)
        steps = []
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 14)):
            arguments = {"position_ids": positions_of(mask)[:, start:end]} if positions else {}
            arguments |= {"attention_mask": mask[:, :end], "past_key_values": past_key_values}
            steps.append(logits_of(model, input_ids[:, start:end], **arguments))
        found.append(torch.cat(steps, dim=1))
    assert difference(*found) == 0.0


@every_architecture
@every_stock_padded_kind
def test_loss_of_untagged_text_is_the_base_models(architecture: str, attention: str, dtype: torch.dtype) -> None:
    input_ids, mask = pad([WORDS, WORDS[3:8]], "right")
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        found, expected = (
            model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.item()
            for model in models(architecture, dtype, attention)
        )
    assert found == expected


@every_architecture
def test_model_without_token_ids_reads_tags_as_its_base_does(architecture: str) -> None:
    model, base = fresh_models(architecture)
    model.config.multiverse_token_ids = None
    assert difference(logits_of(model, row(NESTED)), logits_of(base, row(NESTED))) == 0.0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])  # Llama has no sliding window.
def test_untagged_text_in_sliding_windows_is_the_base_models(architecture: str) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model, base = fresh_models(architecture, **fields)
    assert "sliding_attention" in model.config.layer_types
    assert difference(logits_of(model, row(WORDS)), logits_of(base, row(WORDS))) == 0.0
