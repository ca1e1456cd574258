"""What a training run takes in memory, per rank, before anything is loaded.

Parameters are counted on a model without storage (PyTorch's meta device) with the run's own LoRA configuration, so
their number, and the bytes of gradients and optimiser states, are exact. Activations come from `activation_memory`.
The peak is the largest of a few moments of a step; benchmarks/memory_plan.py holds it against runs measured on a CPU.

Not counted: the CUDA context and communication buffers of the driver (about 1 GB a GPU), fragmentation, the dataset.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from multiverse import TAGS, MultiverseConfig, MultiverseForCausalLM
from multiverse.kernels.dispatch import PATH_MASK_ATTENTION, SUPPORTED_ATTENTION, TRITON
from multiverse.trainer.activation_memory import (
    TrainingStep,
    additive_mask_bytes,
    checkpoint_bytes,
    head_bytes,
    head_working_bytes,
    layer_bytes,
    layer_working_bytes,
    outer_bytes,
    shared_mask_bytes,
)
from multiverse.trainer.peft_support import add_tag_rows
from multiverse.trainer.state_memory import OPTIMIZER_STATES, StateBytes, base_model
from peft import get_peft_model
from torch import nn
from transformers.training_args import OptimizerNames
from trl import ModelConfig, SFTConfig, get_peft_config

#: Ways to share a run out: not at all; gradients averaged; ZeRO stages 1 to 3 of DeepSpeed; FSDP2.
SHARDING = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp2")
_FLOAT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that one rank needs.

    Attributes:
        ranks (`int`), sharding (`str`), device (`str`): what the plan is for.
        parameters, trained_parameters (`int`): of the whole model.
        weights, gradients, optimizer (`int`): of this rank's share.
        buffers (`int`): weights and gradients of layers that are gathered from other ranks, communication buckets.
        activations (`int`): what is kept between forward and backward, the mask left out.
        mask (`int`): in all its forms.
        moments (`dict[str, int]`): everything there is at once at the moments of a step that may be its peak.
        notes (`tuple[str, ...]`): what the plan does not know exactly.
    """

    ranks: int
    sharding: str
    device: str
    parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    mask: int
    moments: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def peak_moment(self) -> str:
        """When the most memory is needed."""
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def peak(self) -> int:
        """Bytes at that moment."""
        return self.moments[self.peak_moment]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "peak": self.peak, "peak_moment": self.peak_moment}


def plan_memory(
    config: SFTConfig,
    model_config: ModelConfig,
    base: MultiverseConfig | None = None,
    ranks: int = 1,
    sharding: str | None = None,
    device: str = "cuda",
    tokenizer_length: int | None = None,
    mask_levels: int = 4,
) -> MemoryPlan:
    """Plans the memory of `SFTTrainer` for a Multiverse model, for batches full of tagged text.

    Args:
        config (`SFTConfig`): of the run. Read are batch size, `max_length`, packing, gradient accumulation and
            checkpointing, precision and optimiser.
        model_config (`ModelConfig`): of the run. Read are dtype, attention, LoRA and quantisation.
        base (`MultiverseConfig`, *optional*): of the model; read from `model_config.model_name_or_path` by default.
        ranks (`int`): processes.
        sharding (`str`, *optional*): one of `SHARDING`; by default FSDP2 where `config` says so, else DDP if there are
            several ranks.
        device (`str`): `"cuda"` or `"cpu"`.
        tokenizer_length (`int`, *optional*): number of tokens that the tokenizer knows. A model whose rows are fewer
            than these and the tags gets more rows.
        mask_levels (`int`): nesting levels of paths in a sample, for attention that takes a `PathMask`.

    Raises:
        ValueError: if something that decides the memory is not known here (an optimiser, `max_length`, the attention).
    """
    sharding = _checked(config, model_config, ranks, sharding, device)
    model, base = _meta_model(config, model_config, base, tokenizer_length, sharding)
    step, notes = _step(config, model_config, model, base, sharding, device)
    state = StateBytes.of(config, model_config, model, ranks, sharding, step)
    layer = layer_bytes(base, step)
    outer, head, working = outer_bytes(base, step), head_bytes(base, step), layer_working_bytes(base, step)
    head_forward, head_backward = head_working_bytes(base, step)
    layers, hidden_bytes = base.num_hidden_layers, checkpoint_bytes(base, step)
    options = config.activation_checkpointing_kwargs
    every = int(options.get("every_n_layers", 1)) if isinstance(options, dict) else 1
    checkpointed = math.ceil(layers / every) if _checkpoints(config) else 0
    whole = layers - checkpointed
    shared_mask = shared_mask_bytes(step, mask_levels)
    # A layer that is computed again needs the mask; else autograd holds what it wants of it.
    mask_backward = shared_mask if checkpointed or step.attention != "sdpa" else additive_mask_bytes(step)
    kept = outer + checkpointed * hidden_bytes + whole * layer.total
    recomputed = layer.total if checkpointed else 0
    standing = state.gradients if config.gradient_accumulation_steps > 1 else 0
    # Autocast keeps what it has converted of the trained weights until the forward ends.
    cached = state.linear_elements * step.compute if _converts(step) and step.trained else 0
    cached = cached * checkpointed // layers if layers else 0
    head_gradient = base.vocab_size * base.hidden_size * step.stream if step.trained_head else 0
    first = (hidden_bytes if checkpointed else 0) + layer.total
    fixed = state.weights + state.optimizer + state.buffers
    moments = {
        "forward, LM head": fixed + standing + kept + head + shared_mask + cached + head_forward,
        "backward, LM head": fixed + standing + kept + head + mask_backward + head_backward,
        "backward, last layer": fixed
        + max(standing, min(state.gradients, head_gradient))
        + kept
        + recomputed
        + mask_backward
        + hidden_bytes
        + working,
        "backward, first layer": fixed + state.gradients + outer + first + mask_backward + working,
        "backward, embedding": fixed + state.gradients + head_gradient + hidden_bytes,
        "optimiser step": fixed + state.gradients + state.optimizer_working,
    }
    copies = (whole + (1 if checkpointed else 0)) * layer.mask
    return MemoryPlan(
        ranks=ranks,
        sharding=sharding,
        device=device,
        parameters=state.parameters,
        trained_parameters=state.trained_parameters,
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buffers=state.buffers,
        activations=kept + head - whole * layer.mask + (layer.activations if checkpointed else 0),
        mask=shared_mask + copies,
        moments=moments,
        notes=notes,
    )


def _checked(config: SFTConfig, model_config: ModelConfig, ranks: int, sharding: str | None, device: str) -> str:
    """The sharding, after a look at everything that the plan depends on."""
    if ranks < 1:
        raise ValueError(f"`ranks` must be at least 1, got {ranks}.")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"`device` must be 'cpu' or 'cuda', got {device!r}.")
    if sharding is None:
        sharding = "fsdp2" if config.fsdp else ("ddp" if ranks > 1 else "none")
    if sharding not in SHARDING:
        raise ValueError(f"`sharding` must be one of {SHARDING}, got {sharding!r}.")
    if config.max_length is None:
        raise ValueError(
            "`max_length` is None, so there is no bound to plan for. Give the length of the longest sample."
        )
    optimizer = OptimizerNames(config.optim).value
    if optimizer not in OPTIMIZER_STATES:
        raise ValueError(
            f"`optim` is {optimizer!r}, whose states are not known here. Plan with one of {tuple(OPTIMIZER_STATES)}."
        )
    if model_config.attn_implementation not in (None, *SUPPORTED_ATTENTION):
        raise ValueError(
            f"`attn_implementation` is {model_config.attn_implementation!r}; known are {SUPPORTED_ATTENTION}."
        )
    if (model_config.load_in_4bit or model_config.load_in_8bit) and not model_config.use_peft:
        raise ValueError("`load_in_4bit` and `load_in_8bit` hold weights that cannot be trained. Set `use_peft`.")
    return sharding


def _meta_model(
    config: SFTConfig,
    model_config: ModelConfig,
    base: MultiverseConfig | None,
    tokenizer_length: int | None,
    sharding: str,
) -> tuple[nn.Module, MultiverseConfig]:
    """The model without storage, with the parameters, dtypes and `requires_grad` of the run."""
    if base is None:
        base = MultiverseConfig.from_pretrained(
            str(model_config.model_name_or_path), revision=model_config.model_revision
        )
    base = MultiverseConfig.from_base(base)
    if not base.multiverse_token_ids:
        # As `add_multiverse_tokens` would: the tags follow the tokenizer's own tokens.
        first = base.vocab_size if tokenizer_length is None else tokenizer_length
        base.vocab_size = max(base.vocab_size, first + len(TAGS))
        base.multiverse_token_ids = {tag: first + number for number, tag in enumerate(TAGS)}
    dtype = base.dtype if model_config.dtype in ("auto", None) else getattr(torch, model_config.dtype)
    with torch.device("meta"):
        model: nn.Module = MultiverseForCausalLM(base)
        model.to(dtype or torch.float32)
        peft_config = get_peft_config(model_config)
        if peft_config is not None:
            model = get_peft_model(model, add_tag_rows(peft_config, model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if model_config.load_in_4bit or model_config.load_in_8bit:
        # As TRL does, following the paper of QLoRA.
        for parameter in trained:
            parameter.data = parameter.data.bfloat16()
    elif sharding == "fsdp2" and (config.bf16 or config.fp16):
        # As accelerate does before it shards, so that mixed precision has weights to collect updates in.
        for parameter in trained:
            parameter.data = parameter.data.float()
    return model, base


def _step(
    config: SFTConfig, model_config: ModelConfig, model: nn.Module, base: MultiverseConfig, sharding: str, device: str
) -> tuple[TrainingStep, tuple[str, ...]]:
    """The shape of a micro-batch and the precision it runs in, and what is not known exactly."""
    notes = []
    rows, length = config.per_device_train_batch_size, int(config.max_length or 0)
    if config.padding_free or (config.packing and config.packing_strategy != "wrapped"):
        rows, length = 1, rows * length
    embeddings = base_model(model).get_input_embeddings().weight
    mixed = config.bf16 or config.fp16
    stream = embeddings.element_size()
    if mixed and sharding in ("fsdp2", "zero3"):
        stream = 2
    compute = 2 if mixed else stream
    adapters = {
        name.split(".lora_A")[0].rpartition(".")[2]: parameter
        for name, parameter in model.named_parameters()
        if ".lora_A." in name
    }
    example = next(iter(adapters.values()), None)
    implementation = model_config.attn_implementation or "sdpa"
    attention = implementation if implementation in ("sdpa", "eager") else "path"
    if implementation in PATH_MASK_ATTENTION and implementation != TRITON and device == "cpu":
        attention = "sdpa"
    if attention == "path" and implementation in ("flex_attention", "flash_attention_2"):
        notes.append(f"{implementation} is counted like the Triton kernels.")
    if config.activation_offloading:
        notes.append("activation_offloading moves part of the activations to the host; they are counted as kept.")
    if config.use_liger_kernel:
        notes.append("use_liger_kernel keeps less of norms and MLP; they are counted without it.")
    if sharding not in ("none", "ddp"):
        notes.append("Gathered layers and buckets are estimates; shards, gradients and optimiser states are exact.")
    trained_rows = any("trainable_tokens" in name for name, _ in model.named_parameters())
    trained = next(p for name, p in model.named_parameters() if "norm" in name).requires_grad
    step = TrainingStep(
        rows=rows,
        length=length,
        attention=attention,
        stream=stream,
        compute=compute,
        autocast=mixed,
        trained=trained,
        adapted=frozenset(adapters),
        lora_rank=0 if example is None else example.shape[0],
        lora_item=_FLOAT if example is None else example.element_size(),
        lora_dropout=model_config.lora_dropout if adapters else 0.0,
        trained_head=trained or trained_rows,
        merged_head=trained_rows,
        on_gpu=device == "cuda",
    )
    return step, tuple(notes)


def _checkpoints(config: SFTConfig) -> bool:
    fsdp = config.fsdp_config if isinstance(config.fsdp_config, dict) else {}
    return bool(config.activation_checkpointing or fsdp.get("activation_checkpointing"))


def _converts(step: TrainingStep) -> bool:
    return step.autocast and step.stream != step.compute
