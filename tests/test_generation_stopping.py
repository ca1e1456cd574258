"""Stopping criteria, time and stop strings end a request with its structure closed."""

from typing import Any

import pytest
import torch
from cases import both_modes
from decoding import NESTED, PROMPTS, Boost, Say, check_parity, decode, follow, layout_of, text_of, visible_before
from multiverse import add_multiverse_tokens
from tiny import WORDS, tiny_ids, tiny_model, tiny_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


class StopAt(StoppingCriteria):
    """Stops where a branch's last token is a given word."""

    def __init__(self, word: str) -> None:
        self.token_id = WORDS[word]
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen += input_ids.tolist()
        return input_ids[:, -1] == self.token_id


@both_modes
@pytest.mark.parametrize("word", ["b", "e", "g", "n", "o", "r", "v"])
def test_criterion_that_is_met_anywhere_ends_the_request(word: str, parallel: bool) -> None:
    criterion = StopAt(word)
    model = tiny_model()
    output = follow(NESTED, model=model, parallel=parallel, stopping_criteria=StoppingCriteriaList([criterion]))
    ids = text_of(output)
    assert output.reports[0].finish_reason == "stopped"
    assert WORDS[word] in ids
    assert not layout_of(ids).problems or word == "b", "a goal that was cut has fewer paths than outlines"
    kinds = {problem.kind for problem in layout_of(ids).problems}
    assert not kinds & {"stray close", "path outside a block", "unclosed block", "unclosed tag"}
    assert criterion.seen[-1] == [*visible_before(ids, ids.index(WORDS[word])), WORDS[word]]
    check_parity(model, output, [NESTED.ids[:1]])


def test_criterion_ends_its_own_row_alone() -> None:
    prompts = [tiny_ids("a"), tiny_ids("b c")]
    stop = StoppingCriteriaList([StopAt("x")])
    model = tiny_model()

    class SayByRow(Say):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.token_id = WORDS["x" if input_ids[0, 0] == WORDS["a"] else "y"]
            return super().__call__(input_ids, scores)

    output = decode(model, prompts, SayByRow("x"), stopping_criteria=stop, max_new_tokens=5)
    assert [report.finish_reason for report in output.reports] == ["stopped", "length"]
    assert [report.generated_tokens for report in output.reports] == [1, 5]


@pytest.mark.parametrize("name", list(PROMPTS))
def test_time_that_is_up_ends_the_request_closed(name: str) -> None:
    prompt = tiny_ids(PROMPTS[name])
    output = decode(tiny_model(), [prompt], Boost(), max_time=0.0)
    report = output.reports[0]
    assert (report.finish_reason, report.sequential_steps) == ("max_time", 1)
    kinds = {problem.kind for problem in layout_of(text_of(output)).problems}
    assert not kinds & {"stray close", "path outside a block", "unclosed block"}


def test_stop_string_inside_a_path_ends_the_request_closed() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocabulary=len(tokenizer))
    add_multiverse_tokens(model, tokenizer)
    text = "<Parallel><Goal><Outline>a</Outline><Outline>b</Outline></Goal>"
    given = tokenizer(text, return_tensors="pt")
    x, y = tokenizer.convert_tokens_to_ids(["x", "y"])

    class Alternate(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept = torch.full_like(scores, -torch.inf)
            kept[:, y if input_ids[0, -1] == x else x] = 0
            return kept

    output = model.generate(
        **given,
        tokenizer=tokenizer,
        stop_strings=["xyxy"],
        logits_processor=LogitsProcessorList([Alternate()]),
        max_new_tokens=100,
        return_dict_in_generate=True,
    )
    assert output.reports[0].finish_reason == "stopped"
    assert tokenizer.decode(output.sequences[0]) == (
        f"{text}\n<Path>\n1:xyxy</Path><Path>\n2:xyx</Path><Conclusion></Conclusion></Parallel>"
    )
