"""Padding and packing: every row and every document is what it is alone."""

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
    every_padded_kind,
    examples,
    fresh_models,
    logits_of,
    models,
    pad,
    positions_of,
    reference_logits,
    restarting,
    row,
    texts,
    untagged_texts,
)
from hypothesis import given
from hypothesis import strategies as st


@every_architecture
@every_padded_kind
@both_sides
def test_padded_rows_are_as_each_row_alone(architecture: str, attention: str, dtype: torch.dtype, side: str) -> None:
    model, _ = models(architecture, dtype, attention)

    @examples(12)
    @given(st.lists(texts, min_size=1, max_size=3), untagged_texts, st.booleans())
    def check(rows: list[list[int]], words: list[int], positions: bool) -> None:
        rows = [*rows, words]
        input_ids, mask = pad(rows, side)
        arguments = {"position_ids": positions_of(mask)} if positions else {}
        found = logits_of(model, input_ids, attention_mask=mask, **arguments)
        for number, ids in enumerate(rows):
            expected = logits_of(model, row(ids))[0]
            assert difference(found[number, mask[number] == 1], expected) <= TOLERANCE[dtype]

    check()


@every_architecture
@every_padded_kind
@both_sides
def test_tagged_row_and_untagged_row_share_a_batch(
    architecture: str, attention: str, dtype: torch.dtype, side: str
) -> None:
    model, base = models(architecture, dtype, attention)
    input_ids, mask = pad([WORDS, NESTED, OPEN_BLOCK], side)
    found = logits_of(model, input_ids, attention_mask=mask)
    assert difference(found[0, mask[0] == 1], logits_of(base, row(WORDS))[0]) <= TOLERANCE[dtype]
    assert difference(found[1, mask[1] == 1], reference_logits(base, NESTED)[0]) <= TOLERANCE[dtype]
    assert difference(found[2, mask[2] == 1], reference_logits(base, OPEN_BLOCK)[0]) <= TOLERANCE[dtype]


@every_architecture
@every_padded_kind
@both_sides
def test_gradients_of_a_padded_batch_are_the_sum_over_its_rows(
    architecture: str, attention: str, dtype: torch.dtype, side: str
) -> None:
    # A padding query sees nothing: one NaN from its softmax would spoil every weight.
    model, _ = fresh_models(architecture, dtype, attention)
    rows = [NESTED, OPEN_BLOCK, WORDS]
    wanted: dict[str, torch.Tensor] = {}
    for ids in rows:
        model.zero_grad()
        model(input_ids=row(ids)).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            wanted[name] = wanted.get(name, 0.0) + parameter.grad
    model.zero_grad()
    input_ids, mask = pad(rows, side)
    model(input_ids=input_ids, attention_mask=mask).logits[mask == 1].square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = wanted[name].abs().max().item()
        assert difference(parameter.grad, wanted[name]) <= TOLERANCE[dtype] * max(scale, 1.0), name


@every_architecture
@every_attention
@pytest.mark.parametrize("lengths", [False, True], ids=["positions", "positions and cu_seq_lens"])
def test_padding_free_row_is_as_each_document_alone(architecture: str, attention: str, lengths: bool) -> None:
    model, _ = models(architecture, torch.float64, attention)

    @examples(12)
    @given(st.lists(texts, min_size=1, max_size=3), untagged_texts, st.integers(0, 3))
    def check(documents: list[list[int]], words: list[int], place: int) -> None:
        documents.insert(place, words)
        ids = [token_id for document in documents for token_id in document]
        arguments = {}
        if lengths:
            # As TRL's padding-free collator passes them.
            sizes = torch.tensor([0, *map(len, documents)])
            borders, longest = sizes.cumsum(0).to(torch.int32), int(sizes.max())
            arguments = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            arguments |= {"max_length_q": longest, "max_length_k": longest}
        found = logits_of(model, row(ids), position_ids=restarting(documents), use_cache=False, **arguments)
        expected = torch.cat([logits_of(model, row(document)) for document in documents], dim=1)
        assert difference(found, expected) <= 1e-5

    check()


@every_architecture
def test_packed_rows_of_a_batch_have_their_own_documents(architecture: str) -> None:
    model, _ = models(architecture)
    rows = [[TWO_PATHS, OPEN_BLOCK, WORDS], [WORDS, OPEN_BLOCK, TWO_PATHS]]
    input_ids = torch.tensor([[token_id for document in documents for token_id in document] for documents in rows])
    positions = torch.cat([restarting(documents) for documents in rows])
    found = logits_of(model, input_ids, position_ids=positions)
    for logits, documents in zip(found, rows, strict=True):
        expected = torch.cat([logits_of(model, row(document))[0] for document in documents])
        assert difference(logits, expected) <= 1e-5
