"""The rest of the models' interface: cost of the mask, checkpointing, further outputs, the backbone alone."""

import multiverse.masking_multiverse
import pytest
import torch
from cases import every_architecture
from forward import (
    NESTED,
    OPEN_BLOCK,
    STRAY_TAGS,
    TWO_PATHS,
    WORDS,
    additive,
    difference,
    every_attention,
    fresh_models,
    in_chunks,
    logits_of,
    models,
    pad,
    reference_mask,
    restarting,
    row,
)
from reference_layout import reference_layout
from tiny import TOKEN_IDS


@every_architecture
def test_structured_mask_is_built_once_and_for_blocks_only(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models(architecture)
    calls: list[dict] = []
    original = multiverse.masking_multiverse.dense_causal_mask

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(multiverse.masking_multiverse, "dense_causal_mask", spy)
    input_ids, mask = pad([WORDS, STRAY_TAGS], "left")
    logits_of(model, input_ids, attention_mask=mask)
    logits_of(model, row(WORDS), position_ids=restarting([WORDS[:6], WORDS[6:]]))
    _, past_key_values = in_chunks(model, row(STRAY_TAGS), [5, len(STRAY_TAGS) - 5])
    assert len(calls) == 0
    logits_of(model, row(TWO_PATHS))
    assert len(calls) == 1
    logits_of(model, row(TWO_PATHS), past_key_values=past_key_values)
    assert len(calls) == 2


@every_architecture
@every_attention
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(architecture: str, attention: str) -> None:
    found = []
    input_ids, mask = pad([NESTED, OPEN_BLOCK], "right")
    labels = input_ids.masked_fill(mask == 0, -100)
    for checkpointing in (False, True):
        model, _ = fresh_models(architecture, attention=attention)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found.append((loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain_loss, plain_gradients), (loss, gradients) = found
    assert abs(loss - plain_loss) <= 1e-5
    for name, gradient in gradients.items():
        assert difference(gradient, plain_gradients[name]) <= 1e-5, name


@every_architecture
def test_hidden_states_and_attentions_arrive(architecture: str) -> None:
    model, _ = models(architecture, torch.float64, "eager")
    with torch.no_grad():
        output = model(input_ids=row(NESTED), output_hidden_states=True, output_attentions=True)
    length, layers = len(NESTED), model.config.num_hidden_layers
    assert [tuple(states.shape) for states in output.hidden_states] == [(1, length, 32)] * (layers + 1)
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, length, length)] * layers
    visible = torch.tensor(reference_layout(NESTED, TOKEN_IDS).visible)
    for weights in output.attentions:
        assert (weights[0, :, ~visible] == 0.0).all()
        assert (weights[0, :, visible] > 0.0).all()
        assert difference(weights.sum(dim=3), torch.ones(1, 4, length, dtype=torch.float64)) <= 1e-5


@every_architecture
def test_backbone_alone_knows_the_structure(architecture: str) -> None:
    # TRL's fused LM head calls the backbone and never the causal LM's forward.
    model, base = models(architecture)
    layout = reference_layout(NESTED, TOKEN_IDS)
    mask = additive(reference_mask(layout), torch.float64)
    with torch.no_grad():
        found = model.base_model(input_ids=row(NESTED)).last_hidden_state
        expected = base.base_model(
            input_ids=row(NESTED), attention_mask=mask, position_ids=row(layout.positions)
        ).last_hidden_state
    assert difference(found, expected) <= 1e-5
