"""Batches that bring their layout: the model computes from them, to the last bit, what it computes by itself."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import send_to_device
from accelerate.utils.operations import concatenate, slice_tensors
from batches import KINDS, Batch, assert_same_arguments, given_to_parent, no_reading, padded, same, with_layout
from forward import (
    NESTED,
    OPEN_BLOCK,
    TWO_PATHS,
    WORDS,
    examples,
    tagged_texts,
    texts,
    untagged_texts,
)
from hypothesis import given
from hypothesis import strategies as st
from launching import run_script
from multiverse.trainer.collator import LayoutCollator
from tiny import PAD, tiny_model
from torch.nn.parallel import DistributedDataParallel
from training import fresh
from transformers import DataCollatorForSeq2Seq, DynamicCache
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

ATTENTION = ("eager", "sdpa", "flex_attention", "multiverse", "multiverse_triton")
# Not flex_attention, which has no backward pass on the CPU.
TRAINABLE = [("eager", torch.float32), ("sdpa", torch.float64), ("multiverse", torch.float64)]


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
    """In a process of its own, which leaves without tidying up: torch's reducer waits for a thread of gloo when it is
    freed, and that thread may be waiting for the interpreter."""
    codes, printed = run_script(__file__, tmp_path / "store")
    assert codes == [0], printed
    assert "the same" in printed


KEPT: list[DistributedDataParallel] = []


def check_distributed_data_parallel(store: str) -> None:
    model = tiny_model().train()
    batch = labelled(padded([TWO_PATHS, OPEN_BLOCK, WORDS]))
    expected = loss_and_gradients(model, batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    prepared = with_layout(model, batch)
    # Kept until the process ends.
    KEPT.append(DistributedDataParallel(model))
    with no_reading():
        found = loss_and_gradients(KEPT[0], prepared)
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


if __name__ == "__main__":
    check_distributed_data_parallel(sys.argv[1])
    print("the same", flush=True)
    os._exit(0)
