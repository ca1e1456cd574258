"""Gives a model and its tokenizer the twelve tags."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint_tags import tag_fields
from .tags import TAGS


def add_multiverse_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Adds the missing control tags as single tokens and tells the model's configuration about all of them.

    A new row (of the input embedding and, when it is a matrix of its own, of the output head) starts from the mean
    of the rows of the tag's word: `<Path>` from "Path", `</Path>` from "/Path", so that opening and closing tags
    differ. Rows of tags that the tokenizer already has stay as they are, which makes the call idempotent and right for
    checkpoints that come with tags. Tags are added as ordinary (not special) tokens: a decoded answer shows its
    structure, also with `skip_special_tokens=True`.

    Args:
        model (`PreTrainedModel`): changed in place: embeddings, `config.vocab_size`, `config.multiverse_token_ids`,
            `config.multiverse_separator_ids`, `config.multiverse_label_ids`.
        tokenizer (`PreTrainedTokenizerBase`): changed in place.

    Returns:
        `dict[str, int]`: id of every tag.

    Raises:
        ValueError: if the model has no input embeddings, or the tokenizer splits a tag it claims to know.
    """
    embeddings = model.get_input_embeddings()
    if not isinstance(getattr(embeddings, "weight", None), torch.Tensor):
        raise ValueError(f"`model` ({type(model).__name__}) has no input embeddings to grow. Pass a causal LM.")
    known = tokenizer.get_vocab()
    missing = [tag for tag in TAGS if tag not in known]
    rows_before = _rows(_token_matrices(model)[0])
    # Read before the tags exist: afterwards "Path" could be split differently around them.
    pieces = {tag: _word_ids(tokenizer, tag) for tag in TAGS}
    if missing:
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in missing])
    fields = tag_fields(tokenizer)
    token_ids = fields["multiverse_token_ids"]

    rows = max(token_ids.values()) + 1
    if rows > _rows(_token_matrices(model)[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    matrices = _token_matrices(model)
    with torch.no_grad(), _whole(matrices):
        for weight in matrices:
            # Also tags that the tokenizer knows from another model and this one has only now grown rows for.
            for tag in TAGS:
                if tag in missing or token_ids[tag] >= rows_before:
                    weight[token_ids[tag]] = weight[pieces[tag]].mean(dim=0)

    for name, value in fields.items():
        setattr(model.config, name, value)
    return token_ids


def _word_ids(tokenizer: PreTrainedTokenizerBase, tag: str) -> list[int]:
    return tokenizer.encode(tag.strip("<>"), add_special_tokens=False)


def _token_matrices(model: PreTrainedModel) -> list[torch.Tensor]:
    """The matrices that hold one row per token: one for tied weights, two otherwise (and an output bias)."""
    inputs = getattr(model.get_input_embeddings(), "weight")  # noqa: B009  (the attribute's type is not declared)
    matrices: list[torch.Tensor] = [inputs]
    head = model.get_output_embeddings()
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if weight is not None and weight is not inputs:
        matrices += [weight] if bias is None else [weight, bias]
    return matrices


def _rows(weight: torch.Tensor) -> int:
    """Rows of a matrix; DeepSpeed's ZeRO-3 leaves an empty tensor in the place of what it has sharded."""
    return getattr(weight, "ds_shape", weight.shape)[0]


@contextmanager
def _whole(weights: list[torch.Tensor]) -> Iterator[None]:
    """Gathers what ZeRO-3 has sharded, and shares out again what is written meanwhile."""
    sharded = [weight for weight in weights if hasattr(weight, "ds_shape")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0):
        yield
