"""What streamers get, step by step: tokens in linear order, and the branches of every row."""

import pytest
import torch
from cases import both_modes
from decoding import (
    FORK_AND_END,
    MIXED,
    PROMPTS,
    TWO_PATHS,
    Boost,
    Follow,
    Watch,
    decode,
    layout_of,
    padded,
    real_tokens,
    text_of,
)
from multiverse.generation.branch import BranchStatus
from tiny import tiny_ids, tiny_model
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


class Collect(BaseStreamer):
    """What an ordinary streamer gets."""

    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ends
        self.puts.append(value)

    def end(self) -> None:
        self.ends += 1


@both_modes
@pytest.mark.parametrize("name", list(PROMPTS))
def test_streamer_gets_the_prompt_and_then_the_tokens_in_linear_order(name: str, parallel: bool) -> None:
    prompt = tiny_ids(PROMPTS[name])
    streamer = Collect()
    output = decode(tiny_model(), [prompt], FORK_AND_END, streamer=streamer, parallel=parallel, max_path_tokens=15)
    assert streamer.ends == 1
    assert streamer.puts[0].tolist() == [prompt]
    assert [token_id for value in streamer.puts[1:] for token_id in value.tolist()] == text_of(output)[len(prompt) :]
    assert {value.dim() for value in streamer.puts[1:]} == {1}


def test_streamer_gets_root_and_first_path_at_once_and_later_paths_when_they_are_next() -> None:
    streamer = Collect()
    after_step: list[int] = []

    class Count(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            after_step.append(len(streamer.puts) - 1)
            return scores

    decode(tiny_model(), [TWO_PATHS.ids[:22]], Follow(TWO_PATHS), Count(), streamer=streamer, max_new_tokens=200)
    # Forced: `_` and path 1's header. Then per step what path 1 writes; path 2 when path 1 has ended, at its third
    # answer, by then with its header and three answers of its own.
    header, third = 1 + 4, 3 + 1 + 4 + 3
    assert after_step[2:4] == [header + 1] * 2
    assert after_step[4:6] == [header + 2] * 2
    assert after_step[6] == header + third
    assert after_step[7] == header + third + 1
    assert streamer.ends == 1


def test_branch_streamer_sees_every_step() -> None:
    watch = Watch()
    prompts = [TWO_PATHS.ids[:1]]
    output = decode(tiny_model(), prompts, Follow(TWO_PATHS), streamer=watch, max_new_tokens=200)
    assert watch.ends == 1
    assert [value.tolist() for value in watch.prompts] == [[TWO_PATHS.ids[:1]]]
    assert len(watch.steps) == output.reports[0].sequential_steps == 32
    running, waiting, finished = BranchStatus.RUNNING, BranchStatus.WAITING, BranchStatus.FINISHED
    states = [[status for _, status in rows[0]] for rows in watch.steps]
    assert states[:20] == [[running]] * 20
    assert states[20:23] == [[waiting, running, running]] * 3
    assert states[23:25] == [[waiting, finished, running]] * 2
    assert states[25:] == [[running, finished, finished]] * 7
    assert [label for label, _ in watch.steps[-1][0]] == ["", "1", "2"]


def test_branch_streamer_sees_every_row() -> None:
    watch = Watch()
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    output = decode(tiny_model(), prompts, FORK_AND_END, streamer=watch)
    assert {len(rows) for rows in watch.steps} == {len(prompts)}
    assert len(watch.steps) == max(report.sequential_steps for report in output.reports)
    assert watch.prompts[0].tolist() == padded(prompts)["input_ids"].tolist()
    made = [[token.id for token in request.root.tokens()] for request in watch.requests]
    rows = [real_tokens(output, prompts, row)[len(prompt) :] for row, prompt in enumerate(prompts)]
    assert made == rows


def test_engine_positions_are_those_of_the_layout() -> None:
    watch = Watch()
    prompts = [tiny_ids(text) for text in PROMPTS.values()]
    output = decode(tiny_model(), prompts, Boost(), streamer=watch, max_path_tokens=14)
    for row, (request, prompt) in enumerate(zip(watch.requests, prompts, strict=True)):
        layout = layout_of(real_tokens(output, prompts, row))
        assert [token.position for token in request.root.tokens()] == layout.position_ids[len(prompt) :].tolist()
