"""What stock trainers would accept and train wrongly without a word."""

from typing import Any

from peft import PeftModel
from transformers import Trainer

#: Ways of packing and cutting that leave pieces which begin inside a block.
_PIECES = ("bfd_split", "wrapped")


def check_trainer(trainer: Trainer, allow_pieces: bool = False) -> None:
    """Refuses set-ups of a trainer under which a model with branches learns something else than its texts say.

    Args:
        trainer (`Trainer`): stock `Trainer`, `SFTTrainer`, `DPOTrainer`, ..., before training starts.
        allow_pieces (`bool`): whether samples may be cut at their beginning. A piece whose `<Parallel>` was cut off
            has ordinary tokens for tags, so its later paths see the earlier ones.

    Raises:
        ValueError: for prompt tuning, a reference model without branches, cut samples, and Liger kernels, which know
            none of the model classes.
    """
    model, args = trainer.model, trainer.args
    if isinstance(model, PeftModel) and any(each.is_prompt_learning for each in model.peft_config.values()):
        raise ValueError(
            "`peft_config` is prompt learning, which gives the model embeddings in the place of `input_ids`, so it "
            "would be trained without branches. Use LoRA (`multiverse.trainer.peft_support.add_tag_rows`)."
        )
    reference: Any = getattr(trainer, "ref_model", None)
    tags = getattr(trainer.model.config, "multiverse_token_ids", None)  # type: ignore[union-attr]
    if reference is not None and getattr(reference.config, "multiverse_token_ids", None) != tags:
        raise ValueError(
            f"`ref_model` is a {type(reference).__name__} without the tags of the model, so its log-probabilities are "
            "those of another text. Pass a `MultiverseForCausalLM` with the same tags as `ref_model`."
        )
    strategy = getattr(args, "packing_strategy", None)
    if getattr(args, "packing", False) and strategy in _PIECES and not allow_pieces:
        raise ValueError(
            f"`packing_strategy` is {strategy!r}, which cuts samples inside their blocks: later paths would see the "
            "earlier ones. Use 'bfd', or say `allow_pieces`."
        )
    if getattr(args, "truncation_mode", None) == "keep_end" and not allow_pieces:
        raise ValueError(
            "`truncation_mode` is 'keep_end', which cuts off the `<Parallel>` that later paths belong to. Use "
            "'keep_start', leave long samples out, or say `allow_pieces`."
        )
    if getattr(args, "use_liger_kernel", False):
        raise ValueError(
            "`use_liger_kernel` is True, but Liger knows none of the Multiverse model types and would change nothing. "
            "Leave it out."
        )
