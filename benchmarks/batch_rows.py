"""Branches without a branch engine: the paths of a block as rows of a batch, with stock transformers alone.

The prompt is run once, its cache is copied for every path, the paths are decoded as rows, and the block is joined by
running their text once more, in linear order, behind the prompt's cache: a cache of rows cannot be put in line, since
keys have been rotated to the rows' positions. What the paths write in the join sees the paths before it, so it is not
Multiverse Attention; the work is that of a program that branches with `generate()`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from multiverse.cache_argument import CACHE_ARGUMENT
from transformers.cache_utils import DynamicCache

from benchmarks.workloads import Pair


@dataclass(frozen=True)
class BlockText:
    """A block that the engine has written, as a plan of who has to write what.

    Attributes:
        ids (`torch.LongTensor` of shape `(1, N)`): prompt and all that came after it.
        prompt (`int`): tokens of the prompt, which ends in `</Goal>`.
        paths (`tuple[tuple[int, int], ...]`): first token of each path and the one after its last; all of one length.
        header (`int`): first tokens of a path that are known before it is written, the same number in all. A label of
            two digits has a token more, which is then decoded like any other.
        written (`int`): tokens of a path behind its header that are decoded.
        conclusion (`int`): index of the first decoded token of the conclusion.
        end (`int`): index after the last one; what follows closes the block.
    """

    ids: torch.Tensor
    prompt: int
    paths: tuple[tuple[int, int], ...]
    header: int
    written: int
    conclusion: int
    end: int

    @classmethod
    def read(cls, output: Any, prompt: int) -> "BlockText":
        """The plan behind an output of `generate()` whose only block forked from the prompt.

        Raises:
            ValueError: if there is no such block, or its paths differ in length.
        """
        sampled = output.sampled[0].tolist()
        blocks = output.reports[0].blocks
        if len(blocks) != 1 or blocks[0].conclusion is None:
            raise ValueError(f"`output` must hold one block with a conclusion, got {len(blocks)} blocks.")
        block = blocks[0]
        spans = tuple((path.start, path.end) for path in block.paths)
        if len({end - start for start, end in spans}) != 1:
            raise ValueError(f"`output` must hold paths of one length, got the spans {spans}.")
        header = min(sampled.index(True, start, end) - start for start, end in spans)
        start, end = spans[0]
        written = _end_of(sampled, start, end) - start - header
        conclusion = sampled.index(True, block.conclusion)
        end = _end_of(sampled, conclusion, len(sampled))
        return cls(output.sequences, prompt, spans, header, written, conclusion, end)


def _end_of(sampled: list[bool], start: int, end: int) -> int:
    """Index after the last sampled token of a span."""
    return max(index for index in range(start, end) if sampled[index]) + 1


def run_batch_rows(pair: Pair, text: BlockText) -> torch.Tensor:
    """Writes a block of the same shape with the stock model; shape `(1, N)`, as `text.ids`.

    What the engine forces (separators, headers, closing tags) is not decoded here either.

    Args:
        pair (`Pair`): its stock model writes.
        text (`BlockText`): the shape, and the tokens that are known beforehand.
    """
    ids, width = text.ids, len(text.paths)
    cache = DynamicCache(config=pair.stock.config)
    behind = {CACHE_ARGUMENT: cache}
    known = ids[:, : text.paths[0][0]]
    with torch.inference_mode():
        # Without the head: nothing is sampled here.
        pair.stock.model(ids[:, : text.prompt], use_cache=True, **behind)
        cache.batch_repeat_interleave(width)
        headers = torch.stack([ids[0, start : start + text.header] for start, _ in text.paths])
        rows = torch.cat([known.expand(width, -1), headers], dim=1)
        rows = pair.run_stock(rows, text.written, **behind)
        # The prompt's part is the same in every row.
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(text.prompt - int(cache.get_seq_length()))
        parts = [known]
        for row, (start, end) in zip(rows, text.paths, strict=True):
            closing = ids[0, start + text.header + text.written : end]
            parts.append(torch.cat([row[known.shape[1] :], closing])[None])
        joined = torch.cat([*parts, ids[:, text.paths[-1][1] : text.conclusion]], dim=1)
        whole = pair.run_stock(joined, text.end - text.conclusion, **behind)
    return torch.cat([whole, ids[:, text.end :]], dim=1)
