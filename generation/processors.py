"""Logits processors for one row at a time: transformers writes some of them for the whole, padded batch."""

import copy
from collections.abc import Callable, Iterable

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    ExponentialDecayLengthPenalty,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)

#: Processors that compare a length which counts the row's left padding, and the attribute that holds it.
_LENGTHS: dict[type[LogitsProcessor], str] = {
    ExponentialDecayLengthPenalty: "regulation_start",
    MinLengthLogitsProcessor: "min_length",
    MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    SuppressTokensAtBeginLogitsProcessor: "begin_index",
}


class RowPrefixConstraint(LogitsProcessor):
    """Stands for `prefix_allowed_tokens_fn` until the row is known that a branch belongs to.

    Args:
        function (`Callable[[int, torch.Tensor], list[int]]`): gets the row and the tokens that the branch may see.
    """

    def __init__(self, function: Callable[[int, torch.Tensor], list[int]]) -> None:
        self.function = function

    def for_row(self, row: int) -> LogitsProcessor:
        """The constraint of one row."""
        return PrefixConstrainedLogitsProcessor(lambda _, input_ids: self.function(row, input_ids), num_beams=1)


def processors_of_row(processors: Iterable[LogitsProcessor], row: int, padding: int) -> LogitsProcessorList:
    """The processors as `row` needs them: branches are shown to them without padding, and one at a time.

    Args:
        processors (`Iterable[LogitsProcessor]`): as transformers prepared them for the batch.
        row (`int`): row of the batch.
        padding (`int`): tokens of padding in the row's prompt.
    """
    own = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, RowPrefixConstraint):
            processor = processor.for_row(row)
        elif padding and type(processor) in _LENGTHS:
            name = _LENGTHS[type(processor)]
            processor = copy.copy(processor)
            setattr(processor, name, getattr(processor, name) - padding)
        elif isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor.prompt_ignore_length is not None:
            # transformers lets it skip the padding of every row of the batch.
            ignored = processor.prompt_ignore_length
            ignored = int(ignored[row]) if isinstance(ignored, torch.Tensor) else ignored
            processor = copy.copy(processor)
            processor.prompt_ignore_length = max(ignored - padding, 0)
        own.append(processor)
    return own
