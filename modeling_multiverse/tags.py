"""The twelve control tags, and the reading of a token-id table that names them (LAYOUT.md, section 1)."""

from collections.abc import Mapping

#: Every control tag, opening before closing. Each one is exactly one token.
TAGS: tuple[str, ...] = (
    "<Think>",
    "</Think>",
    "<Parallel>",
    "</Parallel>",
    "<Goal>",
    "</Goal>",
    "<Outline>",
    "</Outline>",
    "<Path>",
    "</Path>",
    "<Conclusion>",
    "</Conclusion>",
)


def check_token_ids(token_ids: Mapping[str, int] | None) -> dict[str, int]:
    """Returns `token_ids` as a plain `{tag: id}` dictionary after checking that it names all twelve tags once.

    Args:
        token_ids (`Mapping[str, int]`): id of every tag of `TAGS`, usually `model.config.multiverse_token_ids`.

    Raises:
        ValueError: if a tag is missing, an id is no non-negative integer, or two tags share an id.
    """
    if not token_ids:
        raise ValueError(
            "`token_ids` is empty: the model has no Multiverse tags yet. Call "
            "`multiverse.add_multiverse_tokens(model, tokenizer)` once and pass `model.config.multiverse_token_ids`."
        )
    missing = [tag for tag in TAGS if tag not in token_ids]
    if missing:
        raise ValueError(
            f"`token_ids` lacks {missing}, got {sorted(token_ids)}. Call "
            "`multiverse.add_multiverse_tokens(model, tokenizer)`, which adds and names all twelve tags."
        )
    ids = {tag: token_ids[tag] for tag in TAGS}
    for tag, token_id in ids.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise ValueError(f"`token_ids[{tag!r}]` must be a non-negative integer, got {token_id!r}.")
    if len(set(ids.values())) != len(ids):
        raise ValueError(f"`token_ids` gives one id to two tags: {ids}. Every tag needs a token of its own.")
    return ids
