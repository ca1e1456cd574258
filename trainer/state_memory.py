"""Bytes of a training run that do not depend on the batch: weights, gradients, optimiser states, communication.

Counted on a model's own parameters, which may be without storage (PyTorch's meta device).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from multiverse import MultiverseForCausalLM
from multiverse.trainer.activation_memory import TrainingStep
from torch import nn
from transformers.training_args import OptimizerNames
from trl import ModelConfig, SFTConfig

#: Tensors of the size of the weights that an optimiser keeps.
OPTIMIZER_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1, "sgd": 0}
_FLOAT = 4
#: Elements of DeepSpeed's communication buckets.
_ZERO_BUCKET = 500_000_000
#: Elements of a block of bitsandbytes' 4-bit weights that share a scale.
_QUANTIZED_BLOCK = 64


@dataclass(frozen=True)
class StateBytes:
    """What one rank holds of a model, and what the optimiser makes of it.

    Attributes:
        parameters, trained_parameters (`int`): of the whole model.
        linear_elements (`int`): of the base model's linear layers, the LM head left out.
        weights, gradients, optimizer (`int`): bytes of this rank's share.
        optimizer_working (`int`): bytes that a step of the optimiser needs for itself.
        buffers (`int`): bytes of communication: buckets, or the layers that sharded training gathers.
    """

    parameters: int
    trained_parameters: int
    linear_elements: int
    weights: int
    gradients: int
    optimizer: int
    optimizer_working: int
    buffers: int

    @classmethod
    def of(
        cls,
        config: SFTConfig,
        model_config: ModelConfig,
        model: nn.Module,
        ranks: int,
        sharding: str,
        step: TrainingStep,
    ) -> "StateBytes":
        """Counts.

        Args:
            config (`SFTConfig`), model_config (`ModelConfig`): of the run; read are optimiser and quantisation.
            model (`nn.Module`): with the parameters, dtypes and `requires_grad` of the run.
            ranks (`int`), sharding (`str`): as of `memory_plan.plan_memory`.
            step (`TrainingStep`): precision and device.
        """
        named = list(model.named_parameters())
        trained = [parameter for _, parameter in named if parameter.requires_grad]
        elements = sum(parameter.numel() for parameter in trained)
        weights_ranks = ranks if sharding in ("zero3", "fsdp2") else 1
        gradient_ranks = ranks if sharding in ("zero2", "zero3", "fsdp2") else 1
        optimizer_ranks = ranks if sharding not in ("none", "ddp") else 1
        quantized = dict(_quantized(model, model_config))
        weights = sum(
            quantized[name] if name in quantized else _share(each, weights_ranks) * each.element_size()
            for name, each in named
        )
        gradients = sum(_share(each, gradient_ranks) * each.element_size() for each in trained)
        optimizer_name = OptimizerNames(config.optim).value
        states = OPTIMIZER_STATES[optimizer_name]
        if sharding.startswith("zero"):
            # DeepSpeed trains in 16 bit and keeps float32 copies of what is trained with the optimiser's states.
            optimizer = math.ceil(elements / optimizer_ranks) * _FLOAT * (1 + states)
        else:
            optimizer = states * sum(_share(each, optimizer_ranks) * each.element_size() for each in trained)
            optimizer += _FLOAT * len(trained) if states else 0  # a counter of steps for each
        largest = max((_share(each, optimizer_ranks) * each.element_size() for each in trained), default=0)
        working = {"adamw_torch": gradients if step.on_gpu else largest}.get(optimizer_name, 0)
        linear = [each for each in model.modules() if type(each) is nn.Linear]
        head = base_model(model).get_output_embeddings()
        return cls(
            parameters=sum(parameter.numel() for _, parameter in named),
            trained_parameters=elements,
            linear_elements=sum(each.weight.numel() for each in linear if each is not head),
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            optimizer_working=working,
            buffers=_buffer_bytes(model, trained, sharding, ranks, step),
        )


def _buffer_bytes(model: nn.Module, trained: list[nn.Parameter], sharding: str, ranks: int, step: TrainingStep) -> int:
    """Communication: DDP's and ZeRO's buckets, or the layers that sharded training gathers."""
    if ranks == 1 or sharding == "none":
        return 0
    if sharding == "ddp":
        return sum(parameter.nbytes for parameter in trained)
    if sharding in ("zero1", "zero2"):
        elements = sum(parameter.numel() for parameter in trained)
        return 2 * min(elements, _ZERO_BUCKET) * step.compute
    layers = base_model(model).model.layers
    layer = sum(parameter.numel() for parameter in layers[0].parameters())
    layer_trained = sum(parameter.numel() for parameter in layers[0].parameters() if parameter.requires_grad)
    ends = sum(parameter.numel() for parameter in model.parameters()) - len(layers) * layer
    # One layer at work and the next on its way, with their gradients; the ends stay from forward to backward.
    return (2 * layer + 2 * layer_trained + ends) * step.compute


def _share(parameter: nn.Parameter, ranks: int) -> int:
    """Elements of the largest shard: the first dimension is cut into equal pieces, of which some may be smaller."""
    if parameter.dim() == 0 or ranks == 1:
        return parameter.numel()
    rows = parameter.shape[0]
    return math.ceil(rows / ranks) * (parameter.numel() // rows) if rows else 0


def _quantized(model: nn.Module, model_config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Names and bytes of the weights that bitsandbytes quantises: those of all linear layers but the LM head."""
    if not (model_config.load_in_4bit or model_config.load_in_8bit):
        return
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not module.weight.requires_grad and "lm_head" not in name:
            elements, rows = module.weight.numel(), module.weight.shape[0]
            if model_config.load_in_8bit:
                yield f"{name}.weight", elements + _FLOAT * rows
            else:
                scales = math.ceil(elements / _QUANTIZED_BLOCK)
                yield f"{name}.weight", elements // 2 + scales * (1 if model_config.use_bnb_nested_quant else _FLOAT)


def base_model(model: Any) -> MultiverseForCausalLM:
    """The Multiverse model inside a PEFT model; itself if there is none around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
