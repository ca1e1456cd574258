"""Which ways to spread a run over processes Multiverse Attention survives, and what sharded models need beside them.

| way | here |
|---|---|
| DDP, FSDP2, DeepSpeed ZeRO | right: every rank sees whole sequences |
| tensor parallelism of transformers (`distributed_config`) | right: heads are split, the mask is the same for all |
| context parallelism (`cp_size`) | refused: accelerate drops the mask and attends causally |
| sequence parallelism (`sp_size`) | refused: DeepSpeed drops the mask, and takes position resets for documents |

The last two also cut `input_ids` before the backbone reads it, so that a rank sees paths whose block it does not know.
Neither raises by itself: siblings would see each other, without a word.
"""

import os
from typing import Any, cast

from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

#: What cuts sequences into pieces, as `ParallelismConfig` calls it.
_SPLITS_SEQUENCES = {"cp_size": "context", "sp_size": "sequence"}


def check_parallelism(source: Accelerator | ParallelismConfig | TrainingArguments | None = None) -> None:
    """Refuses parallelism that would train something else than what was asked for.

    What `accelerate launch` has put into the environment counts too: called with the training arguments before
    anything is loaded, it sees what the accelerator will be given later.

    Args:
        source (`Accelerator`, `ParallelismConfig` or `TrainingArguments`, *optional*): what the run is configured by;
            the environment alone by default.

    Raises:
        ValueError: if sequences are split over ranks; for an accelerator also if it knows nothing of the processes
            that torchrun has started, or was asked for FSDP and does not shard (both happen on CPUs, without a word).
    """
    config = source if isinstance(source, ParallelismConfig) or source is None else source.parallelism_config
    if config is None and _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()
    for name, kind in _SPLITS_SEQUENCES.items():
        size = getattr(config, name, None) or 1
        if size > 1:
            raise ValueError(
                f"`parallelism_config.{name}` is {size}: {kind} parallelism splits sequences over ranks and drops the "
                "attention mask, so that the paths of a block would see each other. Set it to 1, and save memory with "
                "FSDP2, gradient checkpointing and `attn_implementation='multiverse'`, whose mask does not grow with "
                "the square of the length."
            )
    if isinstance(source, Accelerator):
        _check_processes(source)


def _check_processes(accelerator: Accelerator) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise ValueError(
            f"`WORLD_SIZE` is {started}, but accelerate runs each process by itself on {accelerator.device.type}: all "
            "would train the same. Set `use_cpu` to train on CPUs, or run on a machine with as many GPUs."
        )
    sharded = accelerator.distributed_type is DistributedType.FSDP
    if accelerator.num_processes > 1 and _is_set("ACCELERATE_USE_FSDP") and not sharded:
        raise ValueError(
            f"`fsdp` was asked for, but accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}, where it shards nothing: every process holds the whole model. Leave `fsdp` "
            "out, or run on GPUs."
        )


def gather_trained_head(trainer: Trainer) -> None:
    """Lets LoRA train the tag rows of a head that FSDP2 has sharded.

    FSDP2 gathers a module's weights when its forward is called, and TRL's fused LM head reads the head's weight
    without calling it; with trained rows PEFT then puts a sharded matrix and whole rows together, which raises in the
    first step (seen with peft 0.21.2, trl 1.16.0 and accelerate 1.15.0). Here the head is gathered when the backbone
    runs; after the backward FSDP2 reduces its gradients and shards it again with everything else.

    To be called after the trainer is made; of no effect without FSDP or without trained rows.

    Raises:
        ValueError: if the head is tied to the embeddings: accelerate cannot shard a matrix that two of PEFT's wrappers
            share.
    """
    if not trainer.is_fsdp_enabled or not isinstance(trainer.model, PeftModel):
        return
    model: Any = cast(Any, trainer.model).get_base_model()
    head = model.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return
    if model.config.tie_word_embeddings:
        raise ValueError(
            "`model.config.tie_word_embeddings` is True, and FSDP cannot shard tied embeddings whose tag rows LoRA "
            "trains. Use DDP, which holds a model of this size on every rank, or train all weights."
        )

    def gather(*_: Any) -> None:
        if isinstance(head, FSDPModule):
            head.unshard()

    model.base_model.register_forward_pre_hook(gather)


def save_consolidated(trainer: Trainer, output_dir: str | None = None) -> None:
    """Saves the whole model, which `from_pretrained` loads in any process, however it is sharded.

    `Trainer.save_model` writes nothing at all where FSDP keeps its checkpoints sharded
    (`fsdp_state_dict_type: SHARDED_STATE_DICT`, best while training). To be called on every rank; checkpoints that are
    saved afterwards are whole, too.

    Args:
        trainer (`Trainer`): at the end of its training.
        output_dir (`str`, *optional*): `trainer.args.output_dir` by default.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(output_dir)


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
