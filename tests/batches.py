"""Batches of every kind, with and without a prepared layout, and what the plain backbone is given for them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import multiverse.modeling_multiverse
import pytest
import torch
from forward import pad, positions_of, restarting, row
from multiverse import MultiverseForCausalLM
from multiverse.kernels.dense import DenseMask
from multiverse.kernels.path_mask import PathMask
from multiverse.trainer.collator import LayoutCollator
from tiny import PAD
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlamaModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

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
    if isinstance(one, DenseMask):
        return same(one.visible, other.visible)
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
