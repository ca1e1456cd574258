"""Stopping criteria for one row at a time: some keep an entry for every row of the whole, padded batch."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


class RowCriterion(StoppingCriteria):
    """Shows a criterion that counts rows a batch of as many, all of them the branch, with the padding of its row.

    lm-evaluation-harness and lighteval stop at strings by criteria of this kind: a list says which rows are done, and
    what they answer is whether all of them are.

    Args:
        criterion (`StoppingCriteria`): for the batch; copied with its lists, so that rows end by themselves.
        rows (`int`): of the batch.
        padding (`torch.LongTensor` of shape `(1, padding)`): what stands before the row's first token.
    """

    def __init__(self, criterion: StoppingCriteria, rows: int, padding: torch.Tensor) -> None:
        self.criterion = copy.copy(criterion)
        for name, value in vars(criterion).items():
            if isinstance(value, list):
                setattr(self.criterion, name, list(value))
        self.rows, self.padding = rows, padding

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Whether the branch in `input_ids` of shape `(1, length)` ends, a `bool` or a tensor of one."""
        shown = torch.cat([self.padding.to(input_ids.device), input_ids], dim=1).expand(self.rows, -1)
        met = self.criterion(shown, scores, **kwargs)  # type: ignore[arg-type]
        return met[:1] if isinstance(met, torch.Tensor) and met.dim() else met


def criteria_of_row(criteria: Iterable[StoppingCriteria], rows: int, padding: torch.Tensor) -> StoppingCriteriaList:
    """The criteria as a row of a batch needs them: those that keep a list with an entry per row get a batch to see.

    Args:
        criteria (`Iterable[StoppingCriteria]`): as they were given for the batch.
        rows (`int`): of the batch.
        padding (`torch.LongTensor` of shape `(1, padding)`): what stands before the row's first token.
    """
    return StoppingCriteriaList(
        RowCriterion(each, rows, padding) if rows > 1 and _counts_rows(each, rows) else each for each in criteria
    )


def _counts_rows(criterion: StoppingCriteria, rows: int) -> bool:
    return any(isinstance(value, list) and len(value) == rows for value in vars(criterion).values())
