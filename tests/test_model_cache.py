"""Cached forward passes give the full one's logits."""

import copy

import pytest
import torch
from cases import TOLERANCE, every_architecture
from forward import (
    NESTED,
    OPEN_BLOCK,
    TWO_PATHS,
    WORDS,
    both_sides,
    difference,
    every_attention,
    every_dtype,
    every_padded_kind,
    every_stock_padded_kind,
    examples,
    in_chunks,
    logits_of,
    models,
    opens_block,
    pad,
    positions_of,
    restarting,
    row,
    sizes_from,
    texts,
    with_and_without_positions,
)
from hypothesis import given
from hypothesis import strategies as st
from tiny import TOKEN_IDS, tiny_model
from transformers import StaticCache
from transformers.cache_utils import Cache


@every_architecture
@every_dtype
def test_cached_forward_token_by_token_is_the_full_forward(architecture: str, dtype: torch.dtype) -> None:
    model, _ = models(architecture, dtype)
    found, past_key_values = in_chunks(model, row(NESTED), [1] * len(NESTED))
    assert past_key_values.get_seq_length() == len(NESTED)
    assert difference(found, logits_of(model, row(NESTED))) <= TOLERANCE[dtype]


@every_architecture
@every_attention
def test_cached_forward_in_chunks_is_the_full_forward(architecture: str, attention: str) -> None:
    model, _ = models(architecture, torch.float64, attention)

    @examples(20)
    @given(texts, st.lists(st.integers(0, 60), max_size=6))
    def check(ids: list[int], cuts: list[int]) -> None:
        found, _ = in_chunks(model, row(ids), sizes_from(cuts, len(ids)))
        assert difference(found, logits_of(model, row(ids))) <= 1e-5

    check()


@every_architecture
@both_sides
def test_cached_forward_of_padded_rows_is_each_row_alone(architecture: str, side: str) -> None:
    model, _ = models(architecture)

    @examples(15)
    @given(st.lists(texts, min_size=2, max_size=3), st.lists(st.integers(0, 60), max_size=6))
    def check(rows: list[list[int]], cuts: list[int]) -> None:
        # Right padding in the middle of a cache is what a batch of unequal prompts leaves behind.
        input_ids, mask = pad(rows, side)
        if side == "right":
            tail = torch.tensor([NESTED] * len(rows))
            input_ids, mask = torch.cat([input_ids, tail], dim=1), torch.cat([mask, torch.ones_like(tail)], dim=1)
            rows = [ids + NESTED for ids in rows]
            if not all(opens_block(ids) for ids in rows):
                return
        found, _ = in_chunks(model, input_ids, sizes_from(cuts, input_ids.shape[1]), attention_mask=mask)
        for number, ids in enumerate(rows):
            assert difference(found[number, mask[number] == 1], logits_of(model, row(ids))[0]) <= 1e-5

    check()


@every_architecture
@every_padded_kind
@with_and_without_positions
def test_block_may_open_after_an_untagged_cached_prefill(
    architecture: str, attention: str, dtype: torch.dtype, positions: bool
) -> None:
    model, _ = models(architecture, dtype, attention)
    rows = [WORDS + NESTED, WORDS[:5] + TWO_PATHS, WORDS[:9] + OPEN_BLOCK]
    prompts, mask = pad([WORDS, WORDS[:5], WORDS[:9]], "left")
    tails, tail_mask = pad([NESTED, TWO_PATHS, OPEN_BLOCK], "right")
    whole_mask = torch.cat([mask, tail_mask], dim=1)
    # The positions of `generate`, in every call: right for the prefill, wrong after the first merge.
    stock = positions_of(whole_mask) if positions else None
    prefill, past_key_values = in_chunks(
        model, prompts, [9, 5], attention_mask=mask, position_ids=None if stock is None else stock[:, :14]
    )
    found, _ = in_chunks(
        model,
        tails,
        sizes_from([1, 2, 17, 30], tails.shape[1]),
        past_key_values,
        attention_mask=whole_mask,
        position_ids=None if stock is None else stock[:, 14:],
    )
    for number, ids in enumerate(rows):
        logits = torch.cat([prefill[number, mask[number] == 1], found[number, tail_mask[number] == 1]])
        assert difference(logits, logits_of(model, row(ids))[0]) <= TOLERANCE[dtype]


@every_architecture
def test_positions_given_beside_a_cache_that_holds_blocks_are_not_needed(architecture: str) -> None:
    # `generate` and other callers count on from the number of slots, which is wrong after a merge.
    model, _ = models(architecture)
    stock = torch.arange(len(NESTED))[None]
    found, _ = in_chunks(model, row(NESTED), sizes_from([20, 50], len(NESTED)), position_ids=stock)
    assert difference(found, logits_of(model, row(NESTED))) <= 1e-5


@every_architecture
@every_stock_padded_kind
def test_static_cache_gives_the_full_forward(architecture: str, attention: str, dtype: torch.dtype) -> None:
    model, _ = models(architecture, dtype, attention)
    input_ids, mask = pad([WORDS + NESTED, TWO_PATHS], "left")
    past_key_values = StaticCache(config=model.config, max_cache_len=input_ids.shape[1] + 7)
    sizes = sizes_from([4, 5, 6, 30, 31, 60], input_ids.shape[1])
    found, _ = in_chunks(model, input_ids, sizes, past_key_values, attention_mask=mask)
    for number, ids in enumerate((WORDS + NESTED, TWO_PATHS)):
        assert difference(found[number, mask[number] == 1], logits_of(model, row(ids))[0]) <= TOLERANCE[dtype]


@every_architecture
def test_static_cache_can_be_used_for_another_text_after_a_reset(architecture: str) -> None:
    model, _ = models(architecture)
    past_key_values = StaticCache(config=model.config, max_cache_len=len(NESTED) + 7)
    for ids in (NESTED, TWO_PATHS, WORDS):
        found, _ = in_chunks(model, row(ids), [9, len(ids) - 9], past_key_values)
        assert difference(found, logits_of(model, row(ids))) <= 1e-5
        past_key_values.reset()


@every_architecture
@pytest.mark.parametrize("cut", [2, 15, 25, 44, 70])
def test_returned_cache_carries_on(architecture: str, cut: int) -> None:
    model, _ = models(architecture)
    with torch.no_grad():
        past_key_values = model(input_ids=row(NESTED[:cut])).past_key_values
    assert past_key_values.get_seq_length() == cut
    found = logits_of(model, row(NESTED[cut:]), past_key_values=past_key_values)
    assert difference(found, logits_of(model, row(NESTED))[:, cut:]) <= 1e-5


@every_architecture
def test_cache_of_packed_documents_carries_on_in_the_last_one(architecture: str) -> None:
    model, _ = models(architecture)
    documents = [TWO_PATHS, WORDS, OPEN_BLOCK]
    ids = [token_id for document in documents for token_id in document]
    _, past_key_values = in_chunks(model, row(ids), [len(ids)], position_ids=restarting(documents))
    found, _ = in_chunks(model, row(NESTED), [20, len(NESTED) - 20], past_key_values)
    assert difference(found, logits_of(model, row(OPEN_BLOCK + NESTED))[:, len(OPEN_BLOCK) :]) <= 1e-5


@every_architecture
def test_cache_returned_in_a_tuple_carries_on(architecture: str) -> None:
    model, _ = models(architecture)
    with torch.no_grad():
        output = model(input_ids=row(NESTED[:30]), use_cache=True, return_dict=False)
    (past_key_values,) = (item for item in output if isinstance(item, Cache))
    found = logits_of(model, row(NESTED[30:]), past_key_values=past_key_values)
    assert difference(found, logits_of(model, row(NESTED))[:, 30:]) <= 1e-5


@every_architecture
def test_copied_cache_goes_its_own_way(architecture: str) -> None:
    model, _ = models(architecture)
    _, past_key_values = in_chunks(model, row(NESTED[:30]), [30])
    copied = copy.deepcopy(past_key_values)
    for branch, ids in ((past_key_values, NESTED[30:]), (copied, TWO_PATHS)):
        found, _ = in_chunks(model, row(ids), [len(ids)], branch)
        assert difference(found, logits_of(model, row(NESTED[:30] + ids))[:, 30:]) <= 1e-5


@every_architecture
@pytest.mark.parametrize("batch_size", [1, 3])
def test_other_number_of_rows_than_cached_raises(architecture: str, batch_size: int) -> None:
    model, _ = models(architecture)
    _, past_key_values = in_chunks(model, torch.tensor([NESTED[:30]] * 2), [30])
    with pytest.raises(ValueError, match=rf"`input_ids` has {batch_size} rows, `past_key_values` .* 2"):
        logits_of(model, torch.tensor([NESTED[30:]] * batch_size), past_key_values=past_key_values)
    found = logits_of(model, torch.tensor([NESTED[30:]] * 2), past_key_values=past_key_values)
    assert difference(found[:1], logits_of(model, row(NESTED))[:, 30:]) <= 1e-5


def test_embeddings_cannot_carry_on_a_cache_that_holds_blocks():
    model = tiny_model("llama")
    prompt = torch.tensor([[30, TOKEN_IDS["<Parallel>"], TOKEN_IDS["<Path>"], 31]])
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    embeddings = model.get_input_embeddings()(torch.tensor([[32]]))
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        model(inputs_embeds=embeddings, past_key_values=cache)
