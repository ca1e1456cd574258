"""What goes wrong outside the engine: nothing that was made is lost, and the reason is named."""

from collections.abc import Sequence

import pytest
import torch
from cases import both_modes
from decoding import (
    MIXED,
    PROMPTS,
    Boost,
    FailingCriterion,
    Say,
    Trouble,
    check_parity,
    decode,
    layout_of,
    padded,
    real_tokens,
)
from multiverse.generation.attention import PATH_ATTENTION
from multiverse.generation.output import MultiverseGenerateOutput
from multiverse.generation.request import Request
from multiverse.generation.streaming import BranchStreamer
from tiny import TOKEN_IDS, tiny_ids, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]


class FailingStep(BranchStreamer):
    def __init__(self, step: int, error: type[BaseException]) -> None:
        self.left, self.error = step, error

    def put_step(self, requests: Sequence[Request]) -> None:
        self.left -= 1
        if not self.left:
            raise self.error


class FailingPut(BaseStreamer):
    def __init__(self, calls: int) -> None:
        self.left = calls

    def put(self, value: torch.Tensor) -> None:
        self.left -= 1
        if not self.left:
            raise Trouble

    def end(self) -> None:
        pass


def check_partial(error: BaseException, prompts: Sequence[Sequence[int]]) -> MultiverseGenerateOutput:
    """What was made until the error is there, closed, and says why it ended."""
    output = error.partial_output
    for row in range(len(prompts)):
        kinds = {problem.kind for problem in layout_of(real_tokens(output, prompts, row)).problems}
        assert not kinds & {"stray close", "path outside a block", "unclosed block"}
        assert output.reports[row].finish_reason in ("interrupted", "eos", "length")
    assert "interrupted" in {report.finish_reason for report in output.reports}
    return output


@both_modes
@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("step", [1, 2, 9, 30])
def test_error_in_a_streamer_leaves_what_was_made(step: int, error: type[BaseException], parallel: bool) -> None:
    model = tiny_model()
    options = {"max_new_tokens": 120, "parallel": parallel}
    with pytest.raises(error) as caught:
        decode(model, ROWS, Boost(), streamer=FailingStep(step, error), **options)
    output = check_partial(caught.value, ROWS)
    check_parity(model, output, ROWS)
    assert max(report.sequential_steps for report in output.reports) == step
    # The model is as it was.
    assert model.config._attn_implementation != PATH_ATTENTION
    assert (
        decode(model, ROWS, Boost(), **options).sequences.tolist()
        == decode(model, ROWS, Boost(), **options).sequences.tolist()
    )


@pytest.mark.parametrize("calls", [2, 7, 25])
def test_error_in_an_ordinary_streamer_leaves_what_was_made(calls: int) -> None:
    with pytest.raises(Trouble) as caught:
        decode(tiny_model(), ROWS[:1], Boost(), streamer=FailingPut(calls), max_new_tokens=120)
    check_partial(caught.value, ROWS[:1])


@pytest.mark.parametrize("calls", [1, 10, 60])
def test_error_in_a_criterion_leaves_what_was_made(calls: int) -> None:
    criteria = StoppingCriteriaList([FailingCriterion(calls)])
    with pytest.raises(Trouble) as caught:
        decode(tiny_model(), ROWS, Boost(), stopping_criteria=criteria, max_new_tokens=120)
    check_partial(caught.value, ROWS)


class NotANumber(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * torch.nan if input_ids.shape[1] > 30 else scores


@pytest.mark.parametrize("sampled", [False, True])
def test_logits_that_are_no_number_are_named(sampled: bool) -> None:
    with pytest.raises(ValueError, match="not a number") as caught:
        decode(tiny_model(), ROWS, Boost(), NotANumber(), do_sample=sampled, max_new_tokens=120)
    check_partial(caught.value, ROWS)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"row 0 .*not a number"):
        model.generate(**padded(ROWS), do_sample=sampled)


@pytest.mark.parametrize("word", ["</Path>", "<Goal>", "$"])
def test_processor_that_leaves_only_what_is_banned_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=r"path 2.*logits_processor") as caught:
        decode(tiny_model(), [tiny_ids(PROMPTS["inside a nested goal"])], Say(word))
    assert caught.value.partial_output is not None


def test_prefix_function_that_leaves_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="No token is left"):
        tiny_model().generate(
            torch.tensor(ROWS[:1]),
            prefix_allowed_tokens_fn=lambda row, ids: [TOKEN_IDS["</Path>"]],
            logits_processor=LogitsProcessorList(),
        )
