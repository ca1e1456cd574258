"""A checkpoint as others can use it: adapter merged, tags in model and tokenizer, code and card beside the weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.hub_card.model_card import CARD, FACTS_FILE, CardFacts, answer_example, hub_id, make_card
from transformers import AutoTokenizer

_ADAPTER = "adapter_config.json"


def export(
    checkpoint: str | Path,
    folder: str | Path,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str = "5GB",
    card: str | Path | None = None,
    name: str | None = None,
) -> Path:
    """Writes a checkpoint that loads with torch and transformers alone (`trust_remote_code=True`).

    The folder appears under its name when all of it is written.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id of a plain or Multiverse checkpoint, or folder of a LoRA
            adapter, which is merged into its base.
        folder (`str` or `Path`): to be made.
        base (`str` or `Path`, *optional*): the adapter's base, in the place of the one it names.
        dtype (`str` or `torch.dtype`, *optional*): of the weights; by default the checkpoint's, or the base's.
        max_shard_size (`str`): largest file of weights.
        card (`str` or `Path`, *optional*): YAML file of facts for the model card, see [`CardFacts`]; by default the
            card.yaml in `checkpoint`, where there is one. An example in it is answered by the model.
        name (`str`, *optional*): of the model in its card, such as its id on the Hub; by default the facts', or the
            folder's.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if `folder` holds something already, `base` is given for what is no adapter, or `card` cannot be
            read.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` ({folder}) exists and is not empty. Name another, or remove it.")
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ValueError(f"`dtype` must name a dtype such as bfloat16, got {dtype!r}.")
        dtype = named
    adapter = Path(checkpoint) / _ADAPTER
    origin = str(checkpoint)
    if adapter.is_file():
        origin = json.loads(adapter.read_text())["base_model_name_or_path"]
        base = base or origin
    elif base is not None:
        raise ValueError(
            f"`base` is {str(base)!r}, but `checkpoint` ({checkpoint}) holds no {_ADAPTER}. Leave it out."
        )
    facts = _facts(Path(checkpoint), card)
    facts = replace(
        facts,
        name=name or facts.name or folder.resolve().name,
        base_model=facts.base_model or hub_id(origin),
    )
    model = MultiverseForCausalLM.from_pretrained(base or checkpoint, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(base or checkpoint)
    add_multiverse_tokens(model, tokenizer)
    dtype = dtype or model.dtype
    if adapter.is_file():
        # In the wider of both, so that what is merged is rounded once.
        model = _merged(model.to(torch.promote_types(model.dtype, dtype)), adapter.parent)
    model = model.to(dtype)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(partial)
    make_card(facts, model.config, answer_example(facts, model, tokenizer)).save(partial / CARD)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return folder


def _facts(checkpoint: Path, card: str | Path | None) -> CardFacts:
    beside = checkpoint / FACTS_FILE
    if card is not None:
        return CardFacts.read(card)
    return CardFacts.read(beside) if beside.is_file() else CardFacts()


def _merged(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("Merging an adapter needs a package: `pip install peft`.") from error
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()
