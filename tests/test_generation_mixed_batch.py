"""One batch in which everything meets: nested and plain rows, padding, prompts that end anywhere, and every limit."""

from typing import Any

import pytest
import torch
from decoding import (
    FORK_AND_END,
    PROMPTS,
    Boost,
    check_parity,
    check_structure,
    decode,
    layout_of,
    padded,
    real_tokens,
)
from multiverse.generation.output import MultiverseGenerateOutput
from tiny import EOS, TOKEN_IDS, tiny_ids, tiny_model
from transformers import LogitsProcessor
from turns import check_rows, talk

#: Rows of very different lengths, so that all but one are padded.
ROWS = [
    tiny_ids(text)
    for text in (
        "a",
        "b c d e f g h i j k l m n o p",
        PROMPTS["inside a goal"],
        PROMPTS["after a goal"],
        PROMPTS["inside a later path"],
        PROMPTS["inside a nested path"],
        PROMPTS["inside a conclusion's path"],
        PROMPTS["after a block"],
    )
]
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}
#: Processor and options, and a finish reason of a request or path that they are there for.
CASES: dict[str, tuple[LogitsProcessor, dict[str, Any], str]] = {
    "tokens": (Boost(4.0), {"max_new_tokens": 50}, "length"),
    "path tokens": (Boost(), {"max_new_tokens": 90, "max_path_tokens": 7}, "max_path_tokens"),
    "steps": (Boost(4.0), {"max_new_tokens": 300, "max_sequential_steps": 13}, "max_sequential_steps"),
    "slots": (Boost(4.0), {"max_new_tokens": 300, "max_kv_slots": 105}, "max_kv_slots"),
    "depth": (Boost(6.0), {"max_new_tokens": 80, "max_depth": 1}, "length"),
    "width": (Boost(4.0), {"max_new_tokens": 80, "max_paths": 2}, "length"),
    "one path at a time": (Boost(4.0), {"max_new_tokens": 80, "parallel": False}, "length"),
    "end of sequence": (FORK_AND_END, {"max_new_tokens": 500, "max_path_tokens": 25}, "eos"),
    "sampled tokens": (Boost(4.0), {"max_new_tokens": 50, **SAMPLING}, "length"),
    "sampled slots": (Boost(4.0), {"max_new_tokens": 300, "max_kv_slots": 105, **SAMPLING}, "max_kv_slots"),
    "sampled, one path at a time": (
        Boost(),
        {"max_new_tokens": 80, "max_path_tokens": 9, "parallel": False, **SAMPLING},
        "max_path_tokens",
    ),
    "sampled end of sequence": (FORK_AND_END, {"max_new_tokens": 500, **SAMPLING}, "eos"),
}


def check_limits(output: MultiverseGenerateOutput, options: dict[str, Any]) -> None:
    """No limit is exceeded, and what a report says adds up."""
    for row, (prompt, report) in enumerate(zip(ROWS, output.reports, strict=True)):
        ids = real_tokens(output, ROWS, row)
        assert report.generated_tokens <= options["max_new_tokens"]
        assert report.sequential_steps <= options.get("max_sequential_steps", report.generated_tokens + 1)
        assert report.kv_slots <= len(ids) <= options.get("max_kv_slots", len(ids))
        assert report.generated_tokens == len(ids) - len(prompt) == sum(each.tokens for each in report.branches)
        assert report.forced_tokens == report.generated_tokens - int(output.sampled[row].sum())
        assert report.degree_of_parallelism == report.generated_tokens / max(report.sequential_steps, 1)
        ends = [each.last_step for each in report.branches if each.last_step is not None]
        assert max(ends) <= report.sequential_steps


@pytest.mark.parametrize("name", list(CASES))
def test_every_row_has_the_logits_of_one_forward_pass_under_every_limit(name: str) -> None:
    processor, options, reason = CASES[name]
    model = tiny_model(seed=1)
    output = decode(model, ROWS, processor, **options)
    assert output.sequences.shape[1] > max(map(len, ROWS)) + 10
    # Logits, log-probabilities, branches, positions, structure and counts.
    assert check_rows(model, output, padded(ROWS)) > 100
    check_limits(output, options)
    reasons = {report.finish_reason for report in output.reports}
    if reasons <= {"eos", "length"}:
        check_structure(output, ROWS, options["max_new_tokens"], whole=True)
    paths = [branch for report in output.reports for branch in report.branches if branch.label]
    assert reason in reasons | {path.finish_reason for path in paths}
    if name == "sampled end of sequence":
        assert "eos" in {path.finish_reason for path in paths}, "an end of sequence inside a path"
    assert len(paths) >= 8


def test_a_row_is_the_same_alone() -> None:
    processor, options, _ = CASES["sampled slots"]
    model = tiny_model(seed=1)
    output = decode(model, ROWS, processor, **options)
    for row, prompt in enumerate(ROWS):
        alone = decode(model, [prompt], processor, **options, seed=row)
        assert real_tokens(alone, [prompt], 0) == real_tokens(output, ROWS, row)
        found, expected = (each.to_dict() for each in (alone.reports[0], output.reports[row]))
        assert {**found, "seconds": {}} == {**expected, "seconds": {}}


def test_scores_are_worked_out_from_what_a_branch_sees() -> None:
    """Repetition penalty, temperature and the likeliest tokens, anew from the raw logits."""
    model = tiny_model(seed=1)
    output = decode(model, ROWS, max_new_tokens=30, suppress_tokens=[EOS], output_scores=True, **SAMPLING)
    check_parity(model, output, ROWS)
    tagged = [*TOKEN_IDS.values(), EOS]
    for row, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        ids = output.sequences[row, output.branch_ids[row] >= 0]
        places = output.sampled[row, output.branch_ids[row] >= 0].nonzero().flatten().tolist()
        visible = layout_of(ids.tolist()).attention_mask()
        assert len(places) == len(scores) > 5
        for place, raw, score in zip(places, logits.double(), scores.double(), strict=True):
            seen = ids[:place][visible[place, :place]].unique()
            expected = raw.clone()
            expected[seen] = torch.where(raw[seen] < 0, raw[seen] * 1.2, raw[seen] / 1.2)
            expected /= 0.8
            kept = score > -torch.inf
            assert kept[ids[place]]
            assert 1 <= int(kept.sum()) <= 20
            assert torch.allclose(score[kept], expected[kept], rtol=0, atol=1e-5)
            # Tags may be banned where they stand, plain words never are.
            dropped = ~kept
            dropped[tagged] = False
            assert expected[dropped].max() <= score[kept].min() + 1e-5


def test_padding_takes_nothing_from_a_penalty() -> None:
    """A penalty for repetition counts all tokens of a row, and no more, wherever padding stands."""
    model = tiny_model(seed=1)
    ids = torch.tensor([ROWS[1]])
    options = {"max_new_tokens": 20, "repetition_penalty": 3.0, "suppress_tokens": [EOS]}
    plain = talk(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **options)
    given = padded([ROWS[1], [0] * (ids.shape[1] + 9)])
    output = talk(model, {name: each[:1] for name, each in given.items()}, **options)
    assert output.sequences[0, 9:].tolist() == plain.sequences[0].tolist()
