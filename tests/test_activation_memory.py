"""Activations worked out from the configuration against every tensor that autograd saves; masks against real ones."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from multiverse import MultiverseConfig
from multiverse.kernels import dense
from multiverse.kernels.path_mask import PathMask
from multiverse.trainer.activation_memory import (
    TrainingStep,
    additive_mask_bytes,
    checkpoint_bytes,
    head_bytes,
    layer_bytes,
    outer_bytes,
    shared_mask_bytes,
)
from planned import training_model, with_lora
from tiny import ARCHITECTURES, TOKEN_IDS, goal, tiny_ids
from trl.trainer.utils import add_fused_lm_head

PATHS = "<Path> 1 : c d </Path> _ <Path> 2 : e </Path> _ <Conclusion> f </Conclusion> </Parallel>"
TEXT = f"a b {goal(['1', '2'])} _ {PATHS} g"
#: What the loss is divided by, an int64.
DIVISOR = 8


@contextmanager
def saved_storages(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Sizes of the storages that autograd saves, by address, without parameters and buffers."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive = []  # an address must not be used again while it is counted

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def saved_bytes(model: torch.nn.Module, rows: int, autocast: bool = False, text: str = TEXT) -> tuple[int, int]:
    """Bytes that autograd saves of a step, and the length of a row."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.tensor([tiny_ids(text)] * rows)
    model.train()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with saved_storages(model) as sizes, context:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert output.loss.requires_grad
    return sum(sizes.values()), ids.shape[1]


def expected(config: MultiverseConfig, step: TrainingStep) -> int:
    return (
        config.num_hidden_layers * layer_bytes(config, step).total
        + additive_mask_bytes(step)
        + outer_bytes(config, step)
        + head_bytes(config, step)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("block", [7, 64], ids=["in blocks", "in one block"])
def test_every_tensor_that_autograd_saves_is_counted(
    architecture: str, rows: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "QUERY_BLOCK", block)
    model = training_model(architecture)
    saved, length = saved_bytes(model, rows)
    assert saved - expected(model.config, TrainingStep(rows, length)) == DIVISOR


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "multiverse"])
def test_bfloat16_weights(architecture: str, attention: str) -> None:
    model = training_model(architecture, torch.bfloat16, attention)
    saved, length = saved_bytes(model, 2, autocast=True)
    kind = "sdpa" if attention == "multiverse" else attention
    step = TrainingStep(2, length, kind, stream=2, compute=2, autocast=True)
    assert saved - expected(model.config, step) == DIVISOR


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_of_float32_weights(architecture: str, attention: str) -> None:
    model = training_model(architecture, attention=attention)
    saved, length = saved_bytes(model, 2, autocast=True)
    step = TrainingStep(2, length, attention, stream=4, compute=2, autocast=True)
    assert saved - expected(model.config, step) == DIVISOR


@pytest.mark.parametrize("attention", ["eager", "multiverse", "multiverse_triton"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_attention(attention: str, kv_heads: int) -> None:
    model = training_model(attention=attention, num_key_value_heads=kv_heads)
    saved, length = saved_bytes(model, 2)
    kind = {"eager": "eager", "multiverse": "sdpa", "multiverse_triton": "path"}[attention]
    assert saved - expected(model.config, TrainingStep(2, length, kind)) == DIVISOR


#: The indices of the trained rows: PEFT puts them in place for the embedding, and again whenever TRL's head looks at
#: its weight, which it does three times.
TAG_INDICES = 4 * 8 * len(TOKEN_IDS)
LORA = {"trained": False, "lora_rank": 4, "merged_head": True}
ALL_LINEAR = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_lora(architecture: str, dropout: float, targets: Any) -> None:
    model = with_lora(training_model(architecture), dropout, targets)
    saved, length = saved_bytes(model, 2)
    adapted = ALL_LINEAR if targets == "all-linear" else frozenset(targets)
    step = TrainingStep(2, length, adapted=adapted, lora_dropout=dropout, **LORA)
    assert saved - expected(model.config, step) == DIVISOR + TAG_INDICES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_under_autocast(dtype: torch.dtype, dropout: float) -> None:
    model = with_lora(training_model(dtype=dtype), dropout)
    saved, length = saved_bytes(model, 2, autocast=True)
    item = dtype.itemsize
    step = TrainingStep(
        2, length, stream=item, compute=2, autocast=True, adapted=ALL_LINEAR, lora_dropout=dropout, **LORA
    )
    # Put in their place, float32 rows are converted to the dtype of the others.
    converted = 4 * len(TOKEN_IDS) * model.config.hidden_size * item if dtype is torch.bfloat16 else 0
    assert saved - expected(model.config, step) == DIVISOR + TAG_INDICES + converted


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_keeps_the_inputs_of_the_layers(lora: bool) -> None:
    model = training_model(num_hidden_layers=5)
    model.activation_checkpointing_enable()
    if lora:
        model = with_lora(model)
        model.enable_input_require_grads()
    saved, length = saved_bytes(model, 2)
    step = TrainingStep(2, length, **({**LORA, "adapted": ALL_LINEAR} if lora else {}))
    kept = 5 * checkpoint_bytes(model.config, step) + outer_bytes(model.config, step) + head_bytes(model.config, step)
    # What the last norm reads is no input of a layer; rotary tables and the mask reach the layers outside autograd.
    rotary = 2 * step.tokens * model.config.head_dim * step.stream
    assert saved - (kept - rotary) == DIVISOR + (TAG_INDICES if lora else 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "multiverse_triton"])
def test_mask_bytes(attention: str) -> None:
    model = training_model(attention=attention)
    masks = []
    keyword = {"sdpa": "dense_mask", "eager": "attention_mask", "multiverse_triton": "path_mask"}[attention]
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs[keyword]), with_kwargs=True
    )
    ids = torch.tensor([tiny_ids(TEXT)] * 2)
    model(ids)
    kind = "path" if attention == "multiverse_triton" else attention
    step = TrainingStep(2, ids.shape[1], kind)
    if isinstance(masks[0], PathMask):
        own = sum(each.nbytes for each in (masks[0].hidden_start, masks[0].hidden_end, masks[0].branch_ids))
        levels = masks[0].hidden_start.shape[1]
        assert own == shared_mask_bytes(step, levels)
    else:
        assert masks[0].nbytes == shared_mask_bytes(step, levels=0)
