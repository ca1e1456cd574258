"""What is measured of a generation: tokens, steps, structure and times, from the output of `generate()`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from multiverse import BranchLayout, MultiverseForCausalLM
from multiverse.generation.report import RequestReport
from multiverse.structure import Block

STAGES = ("sequential", "map", "process", "reduce")


def structure_measures(made: Sequence[int], token_ids: dict[str, int]) -> dict[str, Any]:
    """Blocks, paths, depth, defects and tokens by stage of what was generated.

    Args:
        made (sequence of `int`): generated token ids, in linear order; the prompt is not looked at.
        token_ids (`dict[str, int]`): ids of the tags; empty for a plain model, whose text has no structure.

    Returns:
        `dict`: `blocks`, `paths`, `depth` (most blocks around a token), `problems` (kinds, in order) and
        `tokens_by_stage`: `process` is what stands in paths and between them; of the root's own tokens `map` is what
        stands in a block before its paths, `reduce` from its conclusion to its end, `sequential` outside of blocks.
        The engine takes time by the same stages.
    """
    if not token_ids:
        return {
            "blocks": 0,
            "paths": 0,
            "depth": 0,
            "problems": [],
            "tokens_by_stage": {"sequential": len(made), "map": 0, "process": 0, "reduce": 0},
        }
    layout = BranchLayout.from_token_ids(list(made), token_ids)
    every = list(_walk(layout.blocks))
    ends = [len(made) if block.end is None else block.end for block in every]
    # How many blocks stand around every token; a block may stand in the goal or the conclusion of another, too.
    change = np.zeros(len(made) + 1, dtype=int)
    for block, end in zip(every, ends, strict=True):
        change[block.start] += 1
        change[end] -= 1
    around = change.cumsum()
    stage_of = np.full(len(made), STAGES.index("sequential"))
    for block, end in zip(every, ends, strict=True):
        if block.branch == 0:
            reduce_begin = end if block.conclusion is None else block.conclusion
            # A path may stand behind a conclusion only where the text is malformed.
            paths_begin = min(block.paths[0].start, reduce_begin) if block.paths else reduce_begin
            # An inner block comes later and paints over its place in the outer one.
            stage_of[block.start : paths_begin] = STAGES.index("map")
            stage_of[paths_begin:reduce_begin] = STAGES.index("process")
            stage_of[reduce_begin:end] = STAGES.index("reduce")
    stage_of[layout.branch_ids.numpy() > 0] = STAGES.index("process")
    return {
        "blocks": len(every),
        "paths": sum(len(block.paths) for block in every),
        "depth": int(around.max()),
        "problems": [problem.kind for problem in layout.problems],
        "tokens_by_stage": {stage: int((stage_of == number).sum()) for number, stage in enumerate(STAGES)},
    }


def report_measures(report: RequestReport) -> dict[str, Any]:
    """Tokens, steps and ends as the engine has counted them."""
    ends = Counter(branch.finish_reason for branch in report.branches[1:] if branch.finish_reason is not None)
    return {
        "finish_reason": report.finish_reason,
        "generated_tokens": report.generated_tokens,
        "forced_tokens": report.forced_tokens,
        "sequential_steps": report.sequential_steps,
        "degree_of_parallelism": round(report.degree_of_parallelism, 6),
        "kv_slots": report.kv_slots,
        "path_finish_reasons": dict(sorted(ends.items())),
    }


def plain_measures(made: int, ended: bool, prompt_tokens: int) -> dict[str, Any]:
    """The same of a model without tags, which makes one token a step.

    Args:
        made (`int`): generated tokens, the end of the sequence included.
        ended (`bool`): whether the model has ended the answer itself.
        prompt_tokens (`int`): without padding.
    """
    return {
        "finish_reason": "eos" if ended else "length",
        "generated_tokens": made,
        "forced_tokens": 0,
        "sequential_steps": made,
        "degree_of_parallelism": 1.0,
        "kv_slots": prompt_tokens + made - 1,
        "path_finish_reasons": {},
    }


def times(report: RequestReport | None, generated: int, batch_seconds: float, rows: int) -> dict[str, Any]:
    """Wall times of a generation in its batch.

    Args:
        report (`RequestReport`, *optional*): has the time by stage; `None` for a plain model.
        generated (`int`): tokens made.
        batch_seconds (`float`): of the whole call.
        rows (`int`): generations in it.

    Returns:
        `dict`: `seconds` by stage; `first_token_seconds`, from the call until the first token is drawn, which is the
        prefill; `seconds_per_token`, of the time until this row's end; both `None` for a plain model, of whose rows
        only the batch's time is known.
    """
    seconds = None if report is None else {stage: round(value, 6) for stage, value in report.seconds.items()}
    own = None if report is None else sum(report.seconds.values())
    return {
        "seconds": seconds,
        "first_token_seconds": None if report is None else round(report.seconds["prefill"], 6),
        "seconds_per_token": None if own is None else round(own / max(generated, 1), 6),
        "batch_seconds": round(batch_seconds, 6),
        "batch_rows": rows,
    }


def made_tokens(output: Any, row: int, prompt: int, eos: Iterable[int]) -> tuple[list[int], bool]:
    """Generated ids of a row of any model's output, and whether an end of sequence is the last."""
    ids = output.sequences[row, prompt:].tolist()
    reports = getattr(output, "reports", None)
    if reports is not None:
        return ids[: reports[row].generated_tokens], reports[row].finish_reason == "eos"
    stops = set(eos)
    for place, token in enumerate(ids):
        if token in stops:
            return ids[: place + 1], True
    return ids, False


def end_of_sequence(model: MultiverseForCausalLM) -> list[int]:
    """The ids that end an answer."""
    ids = model.generation_config.eos_token_id
    return [] if ids is None else [int(each) for each in torch.atleast_1d(torch.as_tensor(ids))]


def _walk(blocks: Iterable[Block]) -> Iterable[Block]:
    for block in blocks:
        yield block
        for path in block.paths:
            yield from _walk(path.blocks)
