"""Models as they are trained, for the tests of the memory plan."""

from typing import Any

import torch
from multiverse import MultiverseForCausalLM
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from peft import LoraConfig, get_peft_model
from tiny import TOKEN_IDS, tiny_config


def training_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "sdpa", **fields: Any
):
    torch.manual_seed(0)
    model = MultiverseForCausalLM(tiny_config(architecture, initializer_range=0.02, **fields)).to(dtype)
    model.set_attn_implementation(attention)
    model.config.multiverse_token_ids = dict(TOKEN_IDS)
    return model


def with_lora(model: torch.nn.Module, dropout: float = 0.0, targets: Any = "all-linear") -> torch.nn.Module:
    """As SFTTrainer does: LoRA around the model, then the fused head inside."""
    lora = add_tag_rows(LoraConfig(r=4, lora_dropout=dropout, target_modules=targets), model)
    wrapped = get_peft_model(model, lora)
    give_wrapped_head_its_bias(model)
    return wrapped
