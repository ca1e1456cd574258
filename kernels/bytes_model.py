"""What a decode step reads and writes, exactly as `path_decode` does it, and what that predicts for branches.

Letters: n new (query) tokens of a request, S slots that it reads, G query heads per key-value head, HKV key-value
heads, D head dim, e bytes per element, W words of branch bits. Per layer, summed over requests:

    passes            = ceil(n * G / block_m)           how often a request's keys and values are read
    keys and values   = 2 * S * HKV * D * e * passes
    slot index        = 4 * S * HKV * passes
    slot bits         = 4 * W * S * HKV * passes
    queries           = n * G * HKV * (D * e + 8) * splits         each with its table row and limit
    shares            = 2 * n * G * HKV * (D + 1) * 4 * splits     written and read again; none with a single split
    outputs           = n * G * HKV * (D * e + 4)                  and their log-sum-exp

where splits = max(1, ceil(S / split_length)). A few bytes per program that say where its request begins are left out.
Only keys, values and shares are new to the caches of a GPU; the rest is small, and read again it comes from them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .decode_plan import ROWS_PER_WORD
from .launch_table import decode_grid

_INT = 4
_FLOAT = 4


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer.

    Attributes:
        heads, kv_heads (`int`): HQ and HKV.
        head_dim (`int`): D.
        element_size (`int`): bytes per element of queries, keys and values, 2 or 4.
    """

    heads: int
    kv_heads: int
    head_dim: int
    element_size: int

    @property
    def group(self) -> int:
        """Query heads per key-value head, G."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one layer in one step; see the module for what they are."""

    keys_values: int
    slot_index: int = 0
    slot_bits: int = 0
    queries: int = 0
    shares: int = 0
    outputs: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


def decode_bytes(
    requests: Sequence[tuple[int, int]],
    shape: AttentionShape,
    words: int = 1,
    split_length: int | None = None,
    processors: int = 132,
) -> StepBytes:
    """Bytes that a call of `path_decode` reads and writes.

    Args:
        requests (`Sequence[tuple[int, int]]`): per request its new tokens and the slots that it reads.
        words (`int`): W.
        split_length (`int`, *optional*): as of `path_decode`; by default what it chooses.
        processors (`int`): multiprocessors of the GPU, for that choice.

    Raises:
        ValueError: if a count is negative.
    """
    if any(new < 0 or slots < 0 for new, slots in requests):
        raise ValueError(f"`requests` must hold counts of at least 0, got {list(requests)}.")
    new = [count for count, _ in requests]
    grid = decode_grid(
        len(requests),
        sum(new),
        max(new, default=0),
        max((slots for count, slots in requests if count), default=0),
        (shape.heads, shape.kv_heads),
        shape.head_dim,
        shape.element_size,
        processors,
        split_length,
    )
    read = written = used = 0
    for count, slots in requests:
        if count:
            read += slots * shape.kv_heads * math.ceil(count * shape.group / grid.launch.block_m)
            written += count * shape.heads
            used += count * shape.heads * max(1, math.ceil(slots / grid.split_length))
    return StepBytes(
        keys_values=2 * read * shape.head_dim * shape.element_size,
        slot_index=_INT * read,
        slot_bits=_INT * words * read,
        queries=used * (shape.head_dim * shape.element_size + 2 * _INT),
        shares=2 * used * (shape.head_dim + 1) * _FLOAT if grid.splits > 1 else 0,
        outputs=written * (shape.head_dim * shape.element_size + _FLOAT),
    )


@dataclass(frozen=True)
class BranchPrediction:
    """Bytes of a step of branches over a shared prefix, by two ways to decode them.

    Attributes:
        paths (`StepBytes`): one cache, by `path_decode`.
        rows (`StepBytes`): every branch a batch row with its own copy of the prefix. Its keys and values, queries and
            outputs alone: the least that any kernel must move.
    """

    paths: StepBytes
    rows: StepBytes

    @property
    def ratio(self) -> float:
        """How many times more the batch rows move."""
        return self.rows.total / self.paths.total


def predict_branches(
    branches: int, prefix: int, own: int, shape: AttentionShape, processors: int = 132
) -> BranchPrediction:
    """Predicts a step in which every one of P branches runs one token.

    With nothing but keys and values counted, the ratio is P * (prefix + own) / (prefix + P * own) as long as
    P * G rows fit in one block.

    Args:
        branches (`int`): P.
        prefix (`int`): slots that all branches see.
        own (`int`): slots that every branch has of its own, the new token's included.

    Raises:
        ValueError: if there is no branch, or a branch has no slot of its own.
    """
    if branches < 1 or prefix < 0 or own < 1:
        raise ValueError(
            f"`branches` and `own` must be at least 1 and `prefix` at least 0, got {branches}, {own} and {prefix}."
        )
    words = math.ceil(branches / ROWS_PER_WORD)
    paths = decode_bytes([(branches, prefix + branches * own)], shape, words, processors=processors)
    per_token = shape.head_dim * shape.element_size
    rows = StepBytes(
        keys_values=2 * branches * (prefix + own) * shape.kv_heads * per_token,
        queries=branches * shape.heads * per_token,
        outputs=branches * shape.heads * per_token,
    )
    return BranchPrediction(paths, rows)
