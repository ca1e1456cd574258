"""Which tokens the decoder writes by itself at a fork and a merge: one definition, for decoding and training labels.

At `</Goal>` the engine forces, per path, the separator, `<Path>`, the separator and the outline's label; after
`</Path>` the separator, and `<Conclusion>` when the last path has ended (LAYOUT.md, section 7). The model is never
asked for these tokens, so training on them is optional.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from .layout import BranchLayout
from .structure import Block


class HeaderTokens:
    """Separators and outline labels, as token ids.

    Args:
        separator_ids (`Sequence[int]`, *optional*): tokens between two tags, `config.multiverse_separator_ids`.
        label_ids (`Mapping[str, int]`, *optional*): pieces of labels, `config.multiverse_label_ids`.

    Raises:
        ValueError: if either is missing.
    """

    def __init__(self, separator_ids: Sequence[int] | None, label_ids: Mapping[str, int] | None) -> None:
        if separator_ids is None or not label_ids:
            name = "multiverse_separator_ids" if separator_ids is None else "multiverse_label_ids"
            raise ValueError(
                f"`config.{name}` is empty, so path headers cannot be written. Call "
                "`multiverse.add_multiverse_tokens(model, tokenizer)`, which fills it in."
            )
        self.separator = list(separator_ids)
        self._piece_of_id = {token_id: piece for piece, token_id in label_ids.items()}
        # Longest piece first, as a tokenizer with two-digit tokens would write it.
        self._pieces = sorted(label_ids.items(), key=lambda item: -len(item[0]))

    def skip_separators(self, ids: Sequence[int], start: int) -> int:
        """Index of the first token from `start` on that is no separator."""
        while start < len(ids) and ids[start] in self.separator:
            start += 1
        return start

    def read_label(self, ids: Sequence[int], start: int) -> tuple[str | None, int]:
        """Reads an outline's or a path's label, such as `2.3:`, after any separators.

        Args:
            ids (`Sequence[int]`): tokens.
            start (`int`): index after `<Outline>` or `<Path>`.

        Returns:
            The label without its colon and the index after the colon; `(None, index after the separators)` where no
            label stands.
        """
        after_separator = self.skip_separators(ids, start)
        text, index = "", after_separator
        while index < len(ids) and (piece := self._piece_of_id.get(ids[index])) is not None:
            index += 1
            if piece == ":":
                numbers = text.split(".")
                return (text, index) if all(number.isdecimal() for number in numbers) else (None, after_separator)
            text += piece
        return None, after_separator

    def write_label(self, label: str) -> list[int]:
        """Token ids of `label` and its colon.

        Raises:
            ValueError: if the tokenizer has no single token for one of the characters.
        """
        rest, ids = f"{label}:", []
        while rest:
            match = next(((piece, token_id) for piece, token_id in self._pieces if rest.startswith(piece)), None)
            if match is None:
                raise ValueError(
                    f"`config.multiverse_label_ids` has no piece for {rest[0]!r} of the label {label!r}. It must hold "
                    "the ten digits, '.' and ':'."
                )
            ids.append(match[1])
            rest = rest[len(match[0]) :]
        return ids


def forced_token_mask(layout: BranchLayout, input_ids: Sequence[int], header: HeaderTokens) -> torch.Tensor:
    """Marks the tokens of a sample that the engine would have forced.

    Args:
        layout (`BranchLayout`): structure of `input_ids`.
        input_ids (`Sequence[int]` of length N): token ids.
        header (`HeaderTokens`): separators and labels.

    Returns:
        `torch.BoolTensor` of shape `(N,)`: True for separators around path tags, `<Path>`, path labels and
        `<Conclusion>`. Blocks whose goal never closed have no forced tokens: nothing forks there.
    """
    mask = torch.zeros(len(layout), dtype=torch.bool)
    for block in _all_blocks(layout.blocks):
        if block.goal_close is None or not block.paths:
            continue
        mask[block.goal_close + 1 : header.skip_separators(input_ids, block.goal_close + 1)] = True
        for path in block.paths:
            if block.conclusion is not None and path.start > block.conclusion:
                continue
            own = input_ids[: path.end]
            mask[path.start : header.read_label(own, path.start + 1)[1]] = True
            if path.close is not None:
                mask[path.close + 1 : header.skip_separators(own, path.close + 1)] = True
        if block.conclusion is not None:
            mask[block.conclusion] = True
    return mask


def _all_blocks(blocks: Iterable[Block]) -> Iterable[Block]:
    for block in blocks:
        yield block
        for path in block.paths:
            yield from _all_blocks(path.blocks)
