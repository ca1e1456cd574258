"""Tagged text: the base model under the mask and positions of the brute-force reference."""

import pytest
import torch
from cases import TOLERANCE, every_architecture
from forward import (
    NESTED,
    TWO_PATHS,
    additive,
    difference,
    every_attention,
    every_dtype,
    examples,
    fresh_models,
    in_chunks,
    logits_of,
    models,
    opens_block,
    pad,
    reference_logits,
    reference_mask,
    restarting,
    row,
    sizes_from,
    texts,
    to_tiny,
)
from hypothesis import given
from hypothesis import strategies as st
from reference_layout import reference_layout
from strategies import packed
from tiny import TOKEN_IDS, tiny_model


@every_architecture
@every_attention
@every_dtype
def test_tagged_text_is_the_base_model_under_the_reference_layout(
    architecture: str, attention: str, dtype: torch.dtype
) -> None:
    model, base = models(architecture, dtype, attention)

    @examples(20)
    @given(texts)
    def check(ids: list[int]) -> None:
        assert difference(logits_of(model, row(ids)), reference_logits(base, ids)) <= TOLERANCE[dtype]

    assert difference(logits_of(model, row(NESTED)), reference_logits(base, NESTED)) <= TOLERANCE[dtype]
    check()


@every_architecture
def test_structure_makes_a_difference(architecture: str) -> None:
    # Otherwise the comparisons in this file would prove nothing.
    model, base = models(architecture)
    assert difference(logits_of(model, row(TWO_PATHS)), logits_of(base, row(TWO_PATHS))) > 0.1


@every_architecture
def test_packed_text_is_the_base_model_under_the_reference_layout(architecture: str) -> None:
    model, base = models(architecture)

    @examples(25)
    @given(packed(24), st.booleans())
    def check(sample, use_cache: bool) -> None:
        ids, starts = to_tiny(sample.ids), sorted({0, *sample.starts})
        if not opens_block(ids):
            return
        documents = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
        found = logits_of(model, row(ids), position_ids=restarting(documents), use_cache=use_cache)
        assert difference(found, reference_logits(base, ids, starts)) <= 1e-5

    check()


@every_architecture
@every_attention
def test_loss_and_gradients_are_the_base_models_under_the_reference_layout(architecture: str, attention: str) -> None:
    model, base = fresh_models(architecture, attention=attention)
    layout = reference_layout(NESTED, TOKEN_IDS)
    arguments = {
        "attention_mask": additive(reference_mask(layout), torch.float64),
        "position_ids": row(layout.positions),
    }
    expected = base(input_ids=row(NESTED), labels=row(NESTED), **arguments)
    expected.loss.backward()
    found = model(input_ids=row(NESTED), labels=row(NESTED))
    found.loss.backward()
    assert abs(found.loss.item() - expected.loss.item()) <= 1e-5
    wanted = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        assert difference(parameter.grad, wanted[name].grad) <= 1e-5, name


@every_architecture
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_agrees_with_sdpa(architecture: str) -> None:
    model, _ = models(architecture, torch.float32)
    flex = tiny_model(architecture, torch.float32, attention="flex_attention")
    flex.load_state_dict(model.state_dict())
    input_ids, mask = pad([NESTED, TWO_PATHS], "left")
    layout = reference_layout(NESTED, TOKEN_IDS)
    explicit = {"attention_mask": reference_mask(layout), "position_ids": row(layout.positions)}
    # The mask is what is under test: the kernel runs uncompiled, which takes seconds instead of minutes.
    with torch.compiler.set_stance("force_eager"):
        padded = logits_of(flex, input_ids, attention_mask=mask)
        chunked, _ = in_chunks(flex, row(NESTED), sizes_from([3, 20, 21, 22, 40], len(NESTED)))
        packed_row = logits_of(flex, row(TWO_PATHS + NESTED), position_ids=restarting([TWO_PATHS, NESTED]))
        masked = logits_of(flex, row(NESTED), **explicit)
    whole = logits_of(model, row(NESTED))
    assert difference(padded[mask == 1], logits_of(model, input_ids, attention_mask=mask)[mask == 1]) <= 1e-4
    assert difference(chunked, whole) <= 1e-4
    assert difference(packed_row[:, len(TWO_PATHS) :], whole) <= 1e-4
    assert difference(masked, whole) <= 1e-4
