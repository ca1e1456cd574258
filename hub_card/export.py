"""A checkpoint as others can use it: adapter merged, tags in model and tokenizer, code and card beside the weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from multiverse import add_multiverse_tokens
from multiverse.hub_card.checkpoint import adapter_base, is_adapter, load_checkpoint, named_dtype
from multiverse.hub_card.model_card import CARD, FACTS_FILE, CardFacts, answer_example, hub_id, make_card


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
    wanted = None if dtype is None else named_dtype(dtype)
    origin = adapter_base(checkpoint) if is_adapter(checkpoint) else str(checkpoint)
    facts = _facts(Path(checkpoint), card)
    facts = replace(
        facts,
        name=name or facts.name or folder.resolve().name,
        base_model=facts.base_model or hub_id(origin),
    )
    model, tokenizer = load_checkpoint(checkpoint, base, wanted if wanted and is_adapter(checkpoint) else "auto")
    # Before the weights are widened: the tags' rows are like the others.
    add_multiverse_tokens(model, tokenizer)
    model = model.to(wanted or model.dtype)
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
