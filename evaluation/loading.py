"""The checkpoint that is evaluated: a Multiverse model, a plain one, or an adapter over either."""

import hashlib
import json
import os
from typing import Any

import torch
from multiverse import MultiverseForCausalLM
from multiverse.evaluation.settings import DEMO, EvaluationSettings
from multiverse.hub_card.base_model import prepare_base_model
from multiverse.hub_card.checkpoint import ADAPTER, load_checkpoint
from transformers import PreTrainedTokenizerBase


def load(settings: EvaluationSettings) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer as `settings` name them, on their device and in evaluation mode.

    A checkpoint whose tokenizer knows no tags is evaluated as what it is, by transformers' own decoding.

    Raises:
        ValueError: if a plain model is to decode in parallel, or the checkpoint cannot be loaded.
    """
    options: dict[str, Any] = {}
    if settings.attn_implementation is not None:
        options["attn_implementation"] = settings.attn_implementation
    if settings.revision is not None:
        options["revision"] = settings.revision
    checkpoint, base = settings.model, settings.base
    if checkpoint == DEMO:
        checkpoint, base = str(ADAPTER), base or str(prepare_base_model())
    model, tokenizer = load_checkpoint(checkpoint, base, settings.dtype, **options)
    if not model.config.multiverse_token_ids and "parallel" in settings.modes:
        raise ValueError(
            f"`modes` holds 'parallel', but the tokenizer of {settings.model} knows no tags, so nothing can fork. "
            "Pass 'sequential' only, for a plain model."
        )
    return model.to(device_of(settings)).eval(), tokenizer


def device_of(settings: EvaluationSettings) -> torch.device:
    """Where the model is to run: what was asked for, or the GPU of this process, or the CPU."""
    if settings.device is not None:
        return torch.device(settings.device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def checkpoint_facts(model: MultiverseForCausalLM, settings: EvaluationSettings) -> dict[str, Any]:
    """What tells this checkpoint from another, and what its own generation configuration adds to the settings.

    The hash covers names, shapes and the first 64 values of all weights, so that 32B parameters take seconds.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        values = weight.detach().flatten()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(values[:64].float().cpu().numpy().tobytes())
    own = {
        name: value
        for name, value in model.generation_config.to_diff_dict().items()
        if name not in _SET_BY_US and not name.startswith("_") and name != "transformers_version"
    }
    return {
        "architecture": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "knows_tags": bool(model.config.multiverse_token_ids),
        "commit": getattr(model.config, "_commit_hash", None),
        "weights_sha256": digest.hexdigest(),
        "generation_config": json.loads(json.dumps(own, default=str)),
    }


#: Fields of a generation configuration that an evaluation sets itself.
_SET_BY_US = frozenset(
    ("do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "max_length", "seed", "parallel")
) | {"max_sequential_steps", "decode_attention", "return_dict_in_generate"}
