"""LoRA for Multiverse models: which rows train, and a gap between PEFT and TRL that has to be bridged."""

from multiverse.modeling_multiverse import MultiverseForCausalLM
from peft import LoraConfig
from peft.utils.other import TrainableTokensWrapper


def add_tag_rows(peft_config: LoraConfig, model: MultiverseForCausalLM) -> LoraConfig:
    """Makes the twelve tag rows trainable next to the low-rank matrices.

    With a tied head PEFT keeps the head in step by itself; an untied head gets its own twelve rows.

    Args:
        peft_config (`LoraConfig`): changed in place and returned.
        model (`MultiverseForCausalLM`): with its tags added.

    Raises:
        ValueError: if the tags are missing.
    """
    token_ids = model.config.multiverse_token_ids
    if not token_ids:
        raise ValueError(
            "`model.config.multiverse_token_ids` is empty. Call `multiverse.add_multiverse_tokens(model, tokenizer)` "
            "before building the LoRA configuration."
        )
    rows = sorted(token_ids.values())
    peft_config.trainable_token_indices = {"embed_tokens": rows}
    if not model.config.tie_word_embeddings:
        peft_config.trainable_token_indices["lm_head"] = list(rows)
    if peft_config.target_modules is None:
        # PEFT knows default targets by model type, and ours is its own.
        peft_config.target_modules = "all-linear"
    return peft_config


def give_wrapped_head_its_bias(model: MultiverseForCausalLM) -> None:
    """Lets TRL's fused LM head read `.bias` of a head that PEFT wrapped for its trainable rows.

    The fused head reads `lm_head.weight` and `lm_head.bias`; PEFT's wrapper answers for `weight` alone and raises
    AttributeError for `bias` (seen with peft 0.21.2 and trl 1.16.0).
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper) and not hasattr(head, "bias"):
        head.bias = head.original_module.bias
