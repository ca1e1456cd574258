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


class StopAtByRow(StoppingCriteria):
    """As evaluation harnesses have it: a list says which rows have come to the word after the batch's prompts."""

    def __init__(self, word: str, prompts: list[list[int]]) -> None:
        self.word, self.done = WORDS[word], [False] * len(prompts)
        self.start = max(map(len, prompts))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        for row, done in enumerate(self.done):
            if not done:
                self.done[row] = self.word in input_ids[row, self.start :].tolist()
        return False not in self.done


def test_criterion_with_an_entry_for_every_row_ends_rows_one_by_one() -> None:
    prompts = [tiny_ids(each) for each in ("a x b", "b", "x c d e", "f g")]
    model, seen = tiny_model(), set()
    for word in ("d", "h", "x", "3"):
        criteria = StoppingCriteriaList([StopAtByRow(word, prompts)])
        together = decode(model, prompts, Boost(), stopping_criteria=criteria, max_new_tokens=40)
        assert criteria[0].done == [False] * len(prompts), "rows have entries of their own"
        for row, prompt in enumerate(prompts):
            alone = StoppingCriteriaList([StopAtByRow(word, [prompt])])
            one = decode(model, [prompt], Boost(), stopping_criteria=alone, max_new_tokens=40)
            real = together.branch_ids[row] >= 0
            assert together.sequences[row][real].tolist() == text_of(one)
            assert together.reports[row].finish_reason == one.reports[0].finish_reason
            seen.add(one.reports[0].finish_reason)
    assert len(seen) > 1


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
