"""Caches that were cropped, or whose rows were reordered or repeated."""

import pytest
import torch
from cases import every_architecture
from forward import (
    NESTED,
    OPEN_BLOCK,
    TWO_PATHS,
    WORDS,
    difference,
    in_chunks,
    logits_of,
    models,
    pad,
    positions_of,
    row,
    text,
    with_and_without_positions,
)
from tiny import ARCHITECTURES


@every_architecture
def test_cropped_cache_goes_on_with_other_tokens(architecture: str) -> None:
    model, _ = models(architecture)
    others = text("z </Path> <Path> y </Path> <Conclusion> x </Conclusion> </Parallel>") + OPEN_BLOCK
    # Every length, a third of them by each architecture.
    for kept in range(1 + ARCHITECTURES.index(architecture), len(NESTED), len(ARCHITECTURES)):
        _, past_key_values = in_chunks(model, row(NESTED), [10, len(NESTED) - 10])
        past_key_values.crop(-(len(NESTED) - kept))
        assert past_key_values.get_seq_length() == kept
        found, _ = in_chunks(model, row(others), [5, len(others) - 5], past_key_values)
        expected = logits_of(model, row(NESTED[:kept] + others))[:, kept:]
        assert difference(found, expected) <= 1e-5, kept


@every_architecture
def test_cache_may_be_cropped_again_and_again(architecture: str) -> None:
    model, _ = models(architecture)
    _, past_key_values = in_chunks(model, row(NESTED), [len(NESTED)])
    ids = list(NESTED)
    for removed, others in ((20, TWO_PATHS), (10, OPEN_BLOCK), (30, WORDS), (25, NESTED)):
        past_key_values.crop(-removed)
        found, past_key_values = in_chunks(model, row(others), [len(others)], past_key_values)
        ids = ids[:-removed] + others
        assert difference(found, logits_of(model, row(ids))[:, -len(others) :]) <= 1e-5


@every_architecture
def test_cropped_cache_of_left_padded_rows_goes_on_with_other_tokens(architecture: str) -> None:
    model, _ = models(architecture)
    rows = [NESTED, TWO_PATHS, OPEN_BLOCK]
    for removed in range(1, len(OPEN_BLOCK)):
        input_ids, mask = pad(rows, "left")
        _, past_key_values = in_chunks(model, input_ids, [40, input_ids.shape[1] - 40], attention_mask=mask)
        past_key_values.crop(-removed)
        others = torch.tensor([TWO_PATHS] * len(rows))
        whole_mask = torch.cat([mask[:, :-removed], torch.ones_like(others)], dim=1)
        found, _ = in_chunks(model, others, [others.shape[1]], past_key_values, attention_mask=whole_mask)
        for number, ids in enumerate(rows):
            expected = logits_of(model, row(ids[:-removed] + TWO_PATHS))[0, -len(TWO_PATHS) :]
            assert difference(found[number], expected) <= 1e-5, removed


@every_architecture
@pytest.mark.parametrize("removed", [3, len(TWO_PATHS) - 6, len(TWO_PATHS) + 2])
def test_cropped_cache_remembers_the_positions_that_its_prefill_was_given(architecture: str, removed: int) -> None:
    # Left padding with the positions that `generate` passes: slot number and position differ by row.
    model, _ = models(architecture)
    prompts = [WORDS, WORDS[:6]]
    input_ids, mask = pad(prompts, "left")
    _, past_key_values = in_chunks(model, input_ids, [14], attention_mask=mask, position_ids=positions_of(mask))
    tail = torch.tensor([TWO_PATHS] * 2)
    whole_mask = torch.cat([mask, torch.ones_like(tail)], dim=1)
    in_chunks(model, tail, [tail.shape[1]], past_key_values, attention_mask=whole_mask)
    past_key_values.crop(-removed)
    others = torch.tensor([OPEN_BLOCK] * 2)
    whole_mask = torch.cat([whole_mask[:, :-removed], torch.ones_like(others)], dim=1)
    found, _ = in_chunks(model, others, [others.shape[1]], past_key_values, attention_mask=whole_mask)
    for number, prompt in enumerate(prompts):
        ids = (prompt + TWO_PATHS)[:-removed] + OPEN_BLOCK
        assert difference(found[number], logits_of(model, row(ids))[0, -len(OPEN_BLOCK) :]) <= 1e-5


@every_architecture
def test_rows_of_an_untagged_cache_may_be_reordered_before_a_block_opens(architecture: str) -> None:
    model, _ = models(architecture)
    prompts = [WORDS, WORDS[:6]]
    input_ids, mask = pad(prompts, "left")
    _, past_key_values = in_chunks(model, input_ids, [14], attention_mask=mask, position_ids=positions_of(mask))
    order = torch.tensor([1, 0])
    past_key_values.reorder_cache(order)
    tail = torch.tensor([TWO_PATHS] * 2)
    whole_mask = torch.cat([mask[order], torch.ones_like(tail)], dim=1)
    found = logits_of(
        model,
        tail,
        attention_mask=whole_mask,
        position_ids=positions_of(whole_mask)[:, -tail.shape[1] :],
        past_key_values=past_key_values,
    )
    for number, source in enumerate(order.tolist()):
        expected = logits_of(model, row(prompts[source] + TWO_PATHS))[0, -len(TWO_PATHS) :]
        assert difference(found[number], expected) <= 1e-5


@every_architecture
@with_and_without_positions
def test_rows_of_an_untagged_cache_may_be_repeated_before_a_block_opens(architecture: str, positions: bool) -> None:
    model, _ = models(architecture)
    tail, tail_mask = pad([TWO_PATHS, OPEN_BLOCK], "right")
    mask = torch.cat([torch.ones(2, len(WORDS), dtype=torch.long), tail_mask], dim=1)
    stock = positions_of(mask) if positions else None
    prompt_positions = None if stock is None else stock[:1, : len(WORDS)]
    _, past_key_values = in_chunks(model, row(WORDS), [len(WORDS)], position_ids=prompt_positions)
    past_key_values.batch_repeat_interleave(2)
    tail_positions = None if stock is None else stock[:, len(WORDS) :]
    found, _ = in_chunks(
        model, tail, [tail.shape[1]], past_key_values, attention_mask=mask, position_ids=tail_positions
    )
    for number, ids in enumerate((TWO_PATHS, OPEN_BLOCK)):
        expected = logits_of(model, row(WORDS + ids))[0, len(WORDS) :]
        assert difference(found[number, : len(ids)], expected) <= 1e-5
