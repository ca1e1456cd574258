"""Layouts and batches that do not fit are refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batches import Batch, given_to_parent, padded, same, with_layout
from forward import OPEN_BLOCK, TWO_PATHS, WORDS, row
from multiverse import MultiverseForCausalLM
from multiverse.trainer.collator import LayoutCollator, add_layouts
from tiny import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


@pytest.fixture
def model() -> MultiverseForCausalLM:
    return tiny_model()


@pytest.mark.parametrize(
    ("attention", "name", "change"),
    [
        ("sdpa", "branch_ids", lambda tensor: tensor[:, 1:]),
        ("sdpa", "branch_ids", lambda tensor: tensor[:1]),
        ("sdpa", "position_ids", lambda tensor: tensor[:, 1:]),
        ("sdpa", "compatible", lambda tensor: tensor[:, 1:]),
        ("sdpa", "compatible", lambda tensor: tensor[:1]),
        ("multiverse", "hidden_start", lambda tensor: tensor[:, :, 1:]),
        ("multiverse", "hidden_end", lambda tensor: tensor[:1]),
    ],
)
def test_a_layout_of_another_shape_is_refused_by_name(attention: str, name: str, change: Callable) -> None:
    model = tiny_model(attention=attention)
    batch = with_layout(model, padded([TWO_PATHS, OPEN_BLOCK]))
    batch[f"layout_{name}"] = change(batch[f"layout_{name}"])
    shape = tuple(batch[f"layout_{name}"].shape)
    with pytest.raises(ValueError) as error:
        model(**batch)
    assert str(error.value).startswith(f"`layout_{name}` has shape {shape}, but `input_ids` has (2, {len(TWO_PATHS)})")


def test_changed_input_ids_are_refused(model: MultiverseForCausalLM) -> None:
    batch = with_layout(model, {"input_ids": row(TWO_PATHS)})
    batch["input_ids"] = batch["input_ids"][:, :-1]
    with pytest.raises(ValueError, match="`layout_branch_ids` has shape"):
        model(**batch)


@pytest.mark.parametrize("name", ["layout_branch_ids", "layout_position_ids"])
def test_a_part_of_a_layout_is_refused(model: MultiverseForCausalLM, name: str) -> None:
    batch = with_layout(model, padded([TWO_PATHS, OPEN_BLOCK]))
    del batch[name]
    with pytest.raises(ValueError, match=f"`{name}` is missing next to"):
        model(**batch)


@pytest.mark.parametrize(
    ("prepared_for", "attention", "name"),
    [
        ("sdpa", "multiverse", "hidden_start"),
        ("multiverse", "eager", "compatible"),
        ("eager", "flex_attention", "hidden_start"),
    ],
)
def test_a_layout_for_another_attention_is_refused(
    model: MultiverseForCausalLM, prepared_for: str, attention: str, name: str
) -> None:
    model.set_attn_implementation(prepared_for)
    batch = with_layout(model, padded([TWO_PATHS, OPEN_BLOCK]))
    model.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=f"`layout_{name}` is missing: the layout was prepared for another"):
        model(**batch)


def test_dense_attentions_share_a_layout(model: MultiverseForCausalLM) -> None:
    batch = with_layout(model, padded([TWO_PATHS, OPEN_BLOCK]))
    model.set_attn_implementation("eager")
    expected = given_to_parent(model, padded([TWO_PATHS, OPEN_BLOCK]))
    assert same(given_to_parent(model, batch)["attention_mask"], expected["attention_mask"])


def test_what_a_layout_cannot_describe_is_refused(model: MultiverseForCausalLM) -> None:
    batch = with_layout(model, {"input_ids": row(TWO_PATHS)})
    ids = batch.pop("input_ids")
    with pytest.raises(ValueError, match="`input_ids` is missing next to `layout_branch_ids`"):
        model(inputs_embeds=model.get_input_embeddings()(ids), **batch)
    with pytest.raises(ValueError, match="`attention_mask` must have the shape of `input_ids`"):
        model(ids, attention_mask=torch.zeros(1, 1, len(TWO_PATHS), len(TWO_PATHS), dtype=model.dtype), **batch)
    cache = model(row(WORDS), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`past_key_values` adds slots"):
        model(ids, past_key_values=cache, **batch)
    model.config.multiverse_token_ids = None
    with pytest.raises(ValueError, match="`token_ids` is empty"):
        model(ids, **batch)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({}, "`collator` made a batch whose `input_ids` is a NoneType"),
        ({"input_ids": [[1, 2]]}, "`collator` made a batch whose `input_ids` is a list"),
        ({"input_ids": torch.tensor([1, 2])}, r"whose `input_ids` is of shape \(2,\)"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 1, 2, 2)},
            r"an `attention_mask` that is of shape \(1, 1, 2, 2\) for `input_ids` that are of shape \(1, 2\)",
        ),
    ],
)
def test_a_batch_that_the_model_could_not_take_is_refused(
    model: MultiverseForCausalLM, batch: Batch, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        LayoutCollator(model.config, lambda features: dict(batch))([])


def test_configurations_that_cannot_serve_are_refused(model: MultiverseForCausalLM, tmp_path: Path) -> None:
    config = model.config
    config.pad_token_id = None
    with pytest.raises(ValueError, match=r"`config\.pad_token_id` is None"):
        LayoutCollator(config)
    config._attn_implementation = "flash_attention_3"
    with pytest.raises(ValueError, match="`attn_implementation` is 'flash_attention_3'"):
        with_layout(model, {"input_ids": row(TWO_PATHS)})
    config.multiverse_token_ids = None
    with pytest.raises(ValueError, match="`token_ids` is empty"):
        LayoutCollator(config)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    plain = Trainer(AutoModelForCausalLM.from_config(tiny_config("llama")), arguments)
    with pytest.raises(ValueError, match="`token_ids` is empty"):
        add_layouts(plain)
