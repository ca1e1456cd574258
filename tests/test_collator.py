"""Batches that bring their layout: the model computes from them, to the last bit, what it computes by itself."""

import contextlib
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import multiverse.modeling_multiverse
import pytest
import torch
from accelerate.utils import send_to_device
from accelerate.utils.operations import concatenate, slice_tensors
from datasets import Dataset
from forward import (
    NESTED,
    OPEN_BLOCK,
    TWO_PATHS,
    WORDS,
    examples,
    pad,
    positions_of,
    restarting,
    row,
    tagged_texts,
    texts,
    untagged_texts,
)
from hypothesis import given
from hypothesis import strategies as st
from multiverse import MultiverseForCausalLM
from multiverse.kernels.path_mask import PathMask
from multiverse.trainer.collator import LayoutCollator, add_layouts
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from peft import LoraConfig
from tiny import PAD, tiny_config, tiny_model
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.parallel import DistributedDataParallel
from training import RUN, documents_of, fresh, losses, sft_config, short_samples
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DynamicCache,
    LlamaModel,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

ATTENTION = ("eager", "sdpa", "flex_attention", "multiverse", "multiverse_triton")
# Not flex_attention, which has no backward pass on the CPU.
TRAINABLE = [("eager", torch.float32), ("sdpa", torch.float64), ("multiverse", torch.float64)]

Batch = dict[str, Any]


def padded(rows: list[list[int]], side: str = "right") -> Batch:
    input_ids, mask = pad(rows, side)
    return {"input_ids": input_ids, "attention_mask": mask}


def padded_with_positions(rows: list[list[int]]) -> Batch:
    batch = padded(rows, "left")
    return {**batch, "position_ids": positions_of(batch["attention_mask"])}


def padded_everywhere(rows: list[list[int]]) -> Batch:
    """Padding after every third token, too."""
    holes = [[token for index, real in enumerate(ids) for token in [real, -1][: 1 + (index % 3 == 2)]] for ids in rows]
    batch = padded(holes)
    hidden = batch["input_ids"] == -1
    batch["attention_mask"][hidden] = 0
    batch["input_ids"][hidden] = PAD
    return batch


def of_equal_length(rows: list[list[int]]) -> Batch:
    length = min(map(len, rows))
    return {"input_ids": torch.tensor([ids[:length] for ids in rows])}


def packed(rows: list[list[int]]) -> Batch:
    """As packed by position ids alone."""
    return {"input_ids": row([*itertools.chain(*rows)]), "position_ids": restarting(rows)}


def packed_with_lengths(rows: list[list[int]]) -> Batch:
    """As TRL's padding-free collator does."""
    features = [{"input_ids": ids} for ids in rows]
    return DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)(features)


def packed_rows(rows: list[list[int]]) -> Batch:
    batches = [packed(rows), packed(rows[::-1])]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


KINDS: dict[str, Callable[[list[list[int]]], Batch]] = {
    "right": padded,
    "left": lambda rows: padded(rows, "left"),
    "left with positions": padded_with_positions,
    "holes": padded_everywhere,
    "unpadded": of_equal_length,
    "packed": packed,
    "packed with lengths": packed_with_lengths,
    "packed rows": packed_rows,
}


def with_layout(model: MultiverseForCausalLM, batch: Batch) -> Batch:
    """`batch` as a `LayoutCollator` returns it."""
    return LayoutCollator(model.config, lambda features: dict(batch))([])


@contextlib.contextmanager
def no_reading() -> Iterator[None]:
    """Within it, a model that reads the tags of a batch fails. Whoever prepares a layout may still read them."""
    reading = ("has_block", "structured_inputs", "read_tokens", "untagged_path_mask")
    with contextlib.ExitStack() as stack:
        for name in reading:
            failure = AssertionError(f"the model called {name}")
            stack.enter_context(mock.patch.object(multiverse.modeling_multiverse, name, side_effect=failure))
        yield


class Reached(Exception):
    """The parent class was called, with `arguments`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


def given_to_parent(model: MultiverseForCausalLM, batch: Batch) -> dict[str, Any]:
    """The arguments that the plain backbone gets for `batch`."""

    def stop(self: LlamaModel, **arguments: Any) -> None:
        raise Reached(arguments)

    with mock.patch.object(LlamaModel, "forward", stop), pytest.raises(Reached) as reached:
        model.model(**{name: value for name, value in batch.items() if name != "labels"})
    return reached.value.arguments


def same(one: Any, other: Any) -> bool:
    """Equality of arguments to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, PathMask):
        names = ("hidden_start", "hidden_end", "branch_ids", "queries")
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, BlockMask):
        *tables, predicate = one.as_tuple()
        *other_tables, other_predicate = other.as_tuple()
        places = torch.meshgrid(*(torch.arange(size) for size in one.shape), indexing="ij")
        return all(map(same, tables, other_tables)) and same(predicate(*places), other_predicate(*places))
    return one == other


def assert_same_arguments(model: MultiverseForCausalLM, batch: Batch) -> dict[str, Any]:
    expected = given_to_parent(model, batch)
    prepared = with_layout(model, batch)
    with no_reading():
        found = given_to_parent(model, prepared)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same(found[name], value), name
    return found


@pytest.mark.parametrize("attention", ATTENTION)
def test_mask_and_positions_are_those_that_the_model_makes(attention: str) -> None:
    model = tiny_model(attention=attention)

    @examples(6)
    @given(st.lists(st.one_of(texts, untagged_texts), max_size=2), tagged_texts, st.integers(0, 2))
    def check(rows: list[list[int]], tagged: list[int], place: int) -> None:
        rows.insert(place, tagged)
        for batch_of in KINDS.values():
            assert_same_arguments(model, batch_of(rows))

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_kind_of_batch_has_a_mask_of_its_own(attention: str, kind: str) -> None:
    model = tiny_model(attention=attention)
    rows = [NESTED, OPEN_BLOCK + WORDS, WORDS]
    batch = KINDS[kind](rows)
    found = assert_same_arguments(model, batch)
    if kind != "unpadded":
        # Against the causal mask, so that equality is not equality of two masks that were never made.
        model.config.multiverse_token_ids = None
        plain = given_to_parent(model, batch)
        assert not same(found["attention_mask"], plain["attention_mask"]) or "path_mask" in found
        assert not same(found.get("path_mask"), plain.get("path_mask")) or "path_mask" not in found
        assert not same(found["position_ids"], plain["position_ids"])


@pytest.mark.parametrize("kind", ["right", "packed"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_untagged_batches_go_to_the_parent_as_they_are(attention: str, kind: str) -> None:
    model = tiny_model(attention=attention)
    batch = KINDS[kind]([WORDS, WORDS[:5]])
    found = assert_same_arguments(model, batch)
    assert found["attention_mask"] is batch.get("attention_mask")
    assert found["position_ids"] is batch.get("position_ids")


def loss_and_gradients(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_loss_and_gradients(expected: tuple, found: tuple) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name


def labelled(batch: Batch) -> Batch:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return {**batch, "labels": batch["input_ids"].masked_fill(mask == 0, -100), "use_cache": False}


@pytest.mark.parametrize("kind", ["right", "left", "packed with lengths"])
@pytest.mark.parametrize(("attention", "dtype"), TRAINABLE, ids=[attention for attention, _ in TRAINABLE])
def test_loss_and_gradients_are_the_same(attention: str, dtype: torch.dtype, kind: str) -> None:
    model = tiny_model(dtype=dtype, attention=attention).train()
    for rows in ([TWO_PATHS, OPEN_BLOCK, WORDS], [WORDS, WORDS[:6]]):
        batch = labelled(KINDS[kind](rows))
        expected = loss_and_gradients(model, batch)
        prepared = with_layout(model, batch)
        with no_reading():
            assert_same_loss_and_gradients(expected, loss_and_gradients(model, prepared))


def test_loss_and_gradients_of_the_kernels_are_the_same() -> None:
    # A short text: they run in the interpreter.
    model = tiny_model(dtype=torch.float32, attention="multiverse_triton", num_hidden_layers=1).train()
    batch = labelled(padded([OPEN_BLOCK, WORDS[:5]]))
    expected = loss_and_gradients(model, batch)
    prepared = with_layout(model, batch)
    with no_reading():
        assert_same_loss_and_gradients(expected, loss_and_gradients(model, prepared))


@pytest.mark.parametrize("attention", ["sdpa", "multiverse"])
@pytest.mark.parametrize("given_cache", [False, True], ids=["the model's cache", "a cache of the caller"])
def test_a_cache_is_gone_on_from_as_ever(attention: str, given_cache: bool) -> None:
    model = tiny_model(attention=attention)
    rows = [TWO_PATHS[:20], OPEN_BLOCK[:9]]
    following = torch.tensor([TWO_PATHS[20:26], OPEN_BLOCK[9:15]])
    batch = padded(rows, "left")
    mask = torch.cat([batch["attention_mask"], torch.ones_like(following)], dim=1)
    found = []
    for prefill in (batch, with_layout(model, batch)):
        cache = {"past_key_values": DynamicCache(config=model.config)} if given_cache else {}
        with torch.no_grad():
            output = model(**prefill, **cache, use_cache=True)
            found.append(model(following, attention_mask=mask, past_key_values=output.past_key_values).logits)
    assert torch.equal(*found)


def test_batches_may_be_split_joined_and_moved() -> None:
    model = tiny_model()
    rows = [TWO_PATHS, OPEN_BLOCK, WORDS, NESTED]
    batch = padded(rows)
    prepared = with_layout(model, batch)

    moved = send_to_device(prepared, torch.device("meta"))
    assert moved.keys() == prepared.keys()
    assert all(tensor.is_meta for tensor in moved.values())

    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        expected = given_to_parent(model, slice_tensors(batch, part))
        with no_reading():
            found = given_to_parent(model, slice_tensors(prepared, part))
        assert all(same(found[name], expected[name]) for name in expected)
    expected = given_to_parent(model, concatenate([batch, batch]))
    with no_reading():
        found = given_to_parent(model, concatenate([prepared, prepared]))
    assert all(same(found[name], expected[name]) for name in expected)


def test_distributed_data_parallel_hands_the_layout_on(tmp_path: Path) -> None:
    model = tiny_model().train()
    batch = labelled(padded([TWO_PATHS, OPEN_BLOCK, WORDS]))
    expected = loss_and_gradients(model, batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        prepared = with_layout(model, batch)
        with no_reading():
            found = loss_and_gradients(parallel, prepared)
    finally:
        torch.distributed.destroy_process_group()
    assert_same_loss_and_gradients(
        expected, (found[0], {name.removeprefix("module."): gradient for name, gradient in found[1].items()})
    )


def test_the_default_collator_is_trls_and_workers_can_be_given_it() -> None:
    model = tiny_model(attention="multiverse")
    collator = LayoutCollator(model.config)
    features = [{"input_ids": ids, "labels": ids} for ids in (TWO_PATHS, OPEN_BLOCK)]
    batch, expected = collator(features), DataCollatorForLanguageModeling(pad_token_id=PAD)(features)
    assert {name for name in batch if not name.startswith("layout_")} == expected.keys()
    assert all(same(batch[name], expected[name]) for name in expected)
    again = pickle.loads(pickle.dumps(collator))(features)
    assert again.keys() == batch.keys()
    assert all(same(again[name], batch[name]) for name in batch)


def test_a_wrapped_tokenizer_stays_in_sight() -> None:
    model, tokenizer = fresh()
    assert LayoutCollator(model.config, DataCollatorForSeq2Seq(tokenizer)).tokenizer is tokenizer
    assert LayoutCollator(model.config).tokenizer is None


# Trainers


def compared_runs(build: Callable[[int], Trainer]) -> tuple[Trainer, Trainer]:
    """Trains without layouts and, with two workers, with them; the losses and weights must be the same."""
    plain = build(0)
    plain.train()
    prepared = build(2)
    add_layouts(prepared)
    add_layouts(prepared)  # a second time changes nothing
    assert isinstance(prepared.data_collator, LayoutCollator)
    assert not isinstance(prepared.data_collator.collator, LayoutCollator)
    with no_reading():
        prepared.train()
    assert len(losses(plain)) == plain.args.max_steps
    assert losses(prepared) == losses(plain)
    expected = plain.model.state_dict()
    for name, weight in prepared.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    return plain, prepared


SFT_MODES = {
    "padded": {"eval_strategy": "steps", "eval_steps": 1},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 600, "gradient_checkpointing": True},
    "padding free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("mode", SFT_MODES)
def test_sft_with_workers_follows_the_same_trajectory(mode: str, tmp_path: Path) -> None:
    samples = short_samples()

    def build(workers: int) -> Trainer:
        model, tokenizer = fresh(scale=0.2)
        options = {"max_steps": 3, "per_device_train_batch_size": 2, **SFT_MODES[mode]}
        config = sft_config(tmp_path, dataloader_num_workers=workers, **options)
        held_out = samples if "eval_strategy" in options else None
        return SFTTrainer(model, config, train_dataset=samples, eval_dataset=held_out, processing_class=tokenizer)

    plain, prepared = compared_runs(build)
    evaluated = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (plain, prepared)
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == (3 if mode == "padded" else 0)


def test_lora_with_checkpointing_follows_the_same_trajectory(tmp_path: Path) -> None:
    samples = short_samples()

    def build(workers: int) -> Trainer:
        model, tokenizer = fresh(scale=0.2)
        lora = add_tag_rows(LoraConfig(r=4, lora_alpha=8), model)
        config = sft_config(tmp_path, dataloader_num_workers=workers, gradient_checkpointing=True)
        trainer = SFTTrainer(model, config, train_dataset=samples, processing_class=tokenizer, peft_config=lora)
        give_wrapped_head_its_bias(model)
        return trainer

    compared_runs(build)


def test_dpo_follows_the_same_trajectory(tmp_path: Path) -> None:
    samples = short_samples()
    answers = samples["completion"]
    pairs = Dataset.from_dict({"prompt": samples["prompt"], "chosen": answers, "rejected": [*answers[1:], answers[0]]})

    def build(workers: int) -> Trainer:
        (model, tokenizer), (reference, _) = fresh(scale=0.2), fresh(scale=0.2, seed=1)
        config = DPOConfig(
            **{**RUN, "output_dir": str(tmp_path), "max_length": 4096, "dataloader_num_workers": workers}
        )
        return DPOTrainer(model, reference, config, train_dataset=pairs, processing_class=tokenizer)

    compared_runs(build)


def test_the_plain_trainer_trains_evaluates_and_predicts_the_same(tmp_path: Path) -> None:
    _, tokenizer = fresh()
    documents = documents_of(tokenizer, short_samples())
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in documents]

    def build(workers: int) -> Trainer:
        model, _ = fresh(scale=0.2)
        config = TrainingArguments(str(tmp_path), **{**RUN, "dataloader_num_workers": workers})
        # A plain list: the trainer wraps the collator to take columns out of the features.
        return Trainer(model, config, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows, eval_dataset=rows)

    plain, prepared = compared_runs(build)
    with no_reading():
        found = prepared.predict(rows)
    expected = plain.predict(rows)
    assert (found.predictions == expected.predictions).all()
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]


# Errors


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
