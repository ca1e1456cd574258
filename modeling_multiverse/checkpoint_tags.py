"""What a tokenizer says about the tags, and its reading from the files of a checkpoint that does not name them.

Published weights may be those of a plain architecture with a tokenizer that was given the tags before training
(Multiverse-32B is): nothing in their configuration tells, so the tokenizer's files are asked.
"""

import copy
import os
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from .tags import TAGS

logger = logging.get_logger(__name__)

AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)

#: What outline labels (`1:`, `2.3:`) are written with; those that are one token each are recorded.
LABEL_PIECES: tuple[str, ...] = (".", ":", *(str(number) for number in range(100)))

#: `from_pretrained` arguments that say where the files of a checkpoint are to be found.
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)

#: Files that added tokens stand in, the cheapest first.
_TOKENIZER_FILES = ("tokenizer_config.json", "added_tokens.json", "tokenizer.json")
#: Where it stands, the file lists all added tokens.
_ALL_ADDED_TOKENS = '"added_tokens_decoder"'


def tag_fields(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of a [`MultiverseConfig`] that follow from a tokenizer with tags.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): knows all tags.

    Returns:
        `dict[str, Any]`: `multiverse_token_ids`, `multiverse_separator_ids` and `multiverse_label_ids`.

    Raises:
        ValueError: if a tag is missing, or is split although the vocabulary holds it.
    """
    known = tokenizer.get_vocab()
    for tag in TAGS:
        if tag not in known or tokenizer.encode(tag, add_special_tokens=False) != [known[tag]]:
            raise ValueError(f"`tokenizer` does not encode {tag} as one token. Use a tokenizer with added tokens.")
    encoded = {piece: tokenizer.encode(piece, add_special_tokens=False) for piece in LABEL_PIECES}
    return {
        "multiverse_token_ids": {tag: known[tag] for tag in TAGS},
        "multiverse_separator_ids": tokenizer.encode("\n", add_special_tokens=False),
        "multiverse_label_ids": {piece: ids[0] for piece, ids in encoded.items() if len(ids) == 1},
    }


def with_tags_of_checkpoint(config: AnyConfig, checkpoint: Any, **arguments: Any) -> AnyConfig:
    """Names the tags where the checkpoint's own tokenizer knows all twelve and the model has rows for them.

    Left as it is: a configuration that names them already, and one whose checkpoint has no tokenizer, or a tokenizer
    without tags, or one that cannot be read (which is warned of if tags may be in it).

    Args:
        config (`PreTrainedConfig`): a Multiverse configuration.
        checkpoint (`str` or `os.PathLike`, *optional*): folder or Hub id.
        arguments: those of `from_pretrained`; the ones that say where files are to be found count.

    Returns:
        `PreTrainedConfig`: `config` itself, or a copy with tags.
    """
    if config.multiverse_token_ids is not None or not isinstance(checkpoint, str | os.PathLike):
        return config
    if arguments.get("gguf_file") is not None:
        return config  # its tokenizer stands among the weights, and takes longer to read than they do
    where = {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}
    if not _may_know_tags(checkpoint, where):
        return config
    # Without a word on it transformers would ask on the terminal, and it is the model that was asked for.
    trust = bool(arguments.get("trust_remote_code"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust, **where)
        fields = tag_fields(tokenizer) if set(TAGS) <= tokenizer.get_vocab().keys() else None
    except Exception as error:  # of whatever kind: the weights are sound without it
        logger.warning_once(
            f"The tokenizer of {checkpoint} seems to know the Multiverse tags but cannot be used, so the model is "
            f"loaded without them ({error}). Repair it, or call `multiverse.add_multiverse_tokens(model, tokenizer)`."
        )
        return config
    if fields is None or max(fields["multiverse_token_ids"].values()) >= config.vocab_size:
        return config
    tagged = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(tagged, name, value)
    return tagged


def _may_know_tags(checkpoint: str | os.PathLike, where: dict[str, Any]) -> bool:
    """Whether a file of the tokenizer holds every tag, as text: a tokenizer is read where it pays only."""
    for name in _TOKENIZER_FILES:
        try:
            path = cached_file(
                checkpoint,
                name,
                **where,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            text = "" if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
        except (OSError, ValueError) as error:
            # What hinders loading altogether is met again where the weights are loaded; a file that is there and
            # cannot be read is not, and the model would lack its tags without a word.
            logger.warning_once(
                f"{name} of {checkpoint} cannot be read, so it is not known whether its tokenizer has the Multiverse "
                f"tags ({error}). Repair it, or call `multiverse.add_multiverse_tokens(model, tokenizer)`."
            )
            continue
        if all(f'"{tag}"' in text for tag in TAGS):
            return True
        if _ALL_ADDED_TOKENS in text:
            return False
    return False
