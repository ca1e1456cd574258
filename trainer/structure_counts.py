"""How much structure a batch holds: tokens, parallel tokens, samples, branches and problems of every row.

Counted where the ids are on the host, in the collator or its worker, and handed on with the batch as a small tensor.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import torch
from multiverse.layout import read_sequence
from multiverse.masking_multiverse import document_starts
from multiverse.problems import find_problems

#: What `count_structure` counts in every row of a batch, in this order.
COUNTS = ("tokens", "parallel_tokens", "samples", "branches", "problems", "malformed_samples")

#: Under this key a collator may hand the counts on with the batch. They never reach the model's forward pass.
BATCH_KEY = "structure_counts"


def count_structure(batch: Mapping[str, Any], token_ids: Mapping[str, int]) -> torch.Tensor:
    """Counts tokens, samples, branches and problems of a collated batch.

    A sample is a row, or one document of a packed row, found as the model finds it (`cu_seq_lens_q`, or zeros of
    `position_ids`, where there is no padding mask). `"wrapped"` packing carries no documents and cuts anywhere, so
    each of its rows is one sample with the problems that the cuts make.

    Args:
        batch (`Mapping`): `input_ids` of shape `(B, N)`; `attention_mask` of shape `(B, N)`, `position_ids` of shape
            `(1 or B, N)` and `cu_seq_lens_q` where the model is given them.
        token_ids (`Mapping[str, int]`): id of every tag.

    Returns:
        `torch.LongTensor` of shape `(B, 6)` on the host, columns as in `COUNTS`: real tokens; those of them inside a
        path; samples; branches, each sample's root included; problems; samples that have any.
    """
    ids = batch["input_ids"].detach().cpu()
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        rows = [(row[kept], [0]) for row, kept in zip(ids, mask.bool().cpu(), strict=True)]
    else:
        starts = document_starts(batch.get("position_ids"), batch.get("cu_seq_lens_q"), *ids.shape)
        rows = [_without_filling(row, [0, *(own or ())]) for row, own in zip(ids, starts, strict=True)]
    counts = [_count_row(row, starts, token_ids) for row, starts in rows]
    return torch.tensor(counts, dtype=torch.long).view(-1, len(COUNTS))


def _without_filling(row: torch.Tensor, starts: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Takes off what fills a packed row up: without a mask, each such token is a document of its own (position 0)."""
    starts, end = sorted(set(starts)), len(row)
    while len(starts) > 1 and end - starts[-1] == 1:
        end = starts.pop()
    return row[:end], starts


def _count_row(ids: torch.Tensor, starts: list[int], token_ids: Mapping[str, int]) -> tuple[int, ...]:
    if not len(ids):
        return (0,) * len(COUNTS)
    machine = read_sequence(ids, token_ids, starts)
    ends = [*(first for first, _, _ in machine.runs[1:]), machine.length]
    runs = zip(machine.runs, ends, strict=True)
    parallel = sum(end - first for (first, branch, _), end in runs if machine.parents[branch] >= 0)
    problems = find_problems(machine.events)
    malformed = {bisect_right(starts, problem.index) for problem in problems}
    return machine.length, parallel, len(starts), len(machine.parents), len(problems), len(malformed)


class CountingCollator:
    """Another collator, with the structure counts added to its batches (in the dataloader's worker, if it has any).

    Batches without `labels` are left as they are: where a trainer makes labels later, it picks what it hands on.

    Args:
        collator (`Callable`): makes batches with `input_ids` of shape `(B, N)`.
        token_ids (`Mapping[str, int]`): id of every tag.
    """

    def __init__(self, collator: Callable[..., Any], token_ids: Mapping[str, int]) -> None:
        self.collator = collator
        self.token_ids = dict(token_ids)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.collator(*args, **kwargs)
        if isinstance(batch, Mapping) and "labels" in batch:
            ids = batch.get("input_ids")
            if isinstance(ids, torch.Tensor) and ids.dim() == 2:
                batch[BATCH_KEY] = count_structure(batch, self.token_ids)  # type: ignore[index]
        return batch

    def __getattr__(self, name: str) -> Any:
        # A worker that is unpickling this object asks before `collator` is there.
        if name == "collator" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.collator, name)
