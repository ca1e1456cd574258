"""Runs `generate()` on tiny models: prompts, processors, and what every output must satisfy."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import TOLERANCE
from multiverse import BranchLayout, MultiverseForCausalLM
from multiverse.generation.branch import BranchStatus
from multiverse.generation.output import MultiverseGenerateOutput
from multiverse.generation.request import Request
from multiverse.generation.streaming import BranchStreamer
from tiny import EOS, PAD, TOKEN_IDS, WORDS, Script, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria

GOAL = "<Goal> _ <Outline> _ 1 : b _ </Outline> _ <Outline> _ 2 : c _ </Outline> _ <Outline> d </Outline> _ </Goal>"
NESTED_GOAL = "<Parallel> <Goal> <Outline> 2 . 1 : e </Outline> <Outline> f </Outline> </Goal>"
#: Where a prompt may end.
PROMPTS = {
    "plain": "a b c",
    "inside a goal": "a <Parallel> _ <Goal> _ <Outline> _ 1 : b _ </Outline> _ <Outline> _ 2 :",
    "after a goal": f"a b <Parallel> _ {GOAL}",
    "after a goal and its separator": f"a b <Parallel> _ {GOAL} _",
    "inside the first path": f"a <Parallel> _ {GOAL} _ <Path> _ 1 : g h",
    "inside a later path": f"a <Parallel> _ {GOAL} _ <Path> _ 1 : g h i j </Path> _ <Path> _ 2 : k",
    "inside a path's header": f"a <Parallel> _ {GOAL} _ <Path> _ 1 : g h </Path> _ <Path>",
    "after a path": f"a <Parallel> _ {GOAL} _ <Path> _ 1 : g h </Path>",
    "after a path and its separator": f"a <Parallel> _ {GOAL} _ <Path> _ 1 : g h </Path> _",
    "after the last path": (
        f"a <Parallel> _ {GOAL} _ <Path> _ 1 : g h </Path> _ <Path> _ 2 : i </Path> _ <Path> _ 3 : j k l </Path>"
    ),
    "inside a nested goal": f"a <Parallel> {GOAL} _ <Path> _ 1 : g </Path> _ <Path> 2 : h <Parallel> <Goal> <Outline>",
    "inside a nested path": (
        f"a <Parallel> {GOAL} _ <Path> _ 1 : g </Path> _ <Path> _ 2 : h {NESTED_GOAL} _ "
        "<Path> _ 2 . 1 : i j k </Path> _ <Path> _ 2 . 2 : l"
    ),
    "inside the first nested path": f"a <Parallel> {GOAL} _ <Path> _ 1 : h {NESTED_GOAL} <Path> _ 2 . 1 : i j",
    "inside a conclusion": f"a <Parallel> {GOAL} <Path> g h </Path> _ <Path> i </Path> _ <Conclusion> j",
    "inside a conclusion's path": (
        f"a <Parallel> {GOAL} <Path> g h </Path> <Path> i </Path> <Conclusion> {NESTED_GOAL} <Path> 2 . 1 : j"
    ),
    "after a block": f"a <Parallel> {GOAL} <Path> g h </Path> <Path> i </Path> <Conclusion> </Conclusion> </Parallel>",
}
MIXED = ("plain", "inside a later path", "after a goal", "inside a nested path")

both_ways = pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])


class Boost(LogitsProcessor):
    """Makes random models fork a lot; with `haste`, what ends blocks and rows gains with every token seen."""

    ending = (*(tag for tag in TOKEN_IDS if tag.startswith("</")), "<Goal>")

    def __init__(self, tags: float = 2.5, haste: float = 0.0) -> None:
        self.tags, self.haste = tags, haste

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        gain = self.haste * input_ids.shape[1]
        scores[:, list(TOKEN_IDS.values())] += self.tags
        scores[:, [EOS, *(TOKEN_IDS[tag] for tag in self.ending)]] += gain
        scores[:, TOKEN_IDS["<Outline>"]] += gain / 2
        scores[:, TOKEN_IDS["<Parallel>"]] -= gain
        return scores


#: With this, rows have blocks and come to an end of their own.
FORK_AND_END = Boost(3.5, 0.04)


class Follow(LogitsProcessor):
    """Lets a model answer what a script says; `asked` collects the histories."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        history = input_ids[0].tolist()
        self.asked.append(history)
        answer = self.script.answer(history)
        kept = torch.full_like(scores, -torch.inf)
        # A tag that the engine bans here stays banned, and the text comes out wrong.
        kept[:, answer] = scores[:, answer]
        return kept


class Say(LogitsProcessor):
    """Lets a model say one word for ever."""

    def __init__(self, word: str) -> None:
        self.token_id = WORDS[word]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.token_id] = 0
        return kept


class Trouble(RuntimeError):
    """Raised by what a user passes in."""


class FailingCriterion(StoppingCriteria):
    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise Trouble
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Watch(BranchStreamer):
    """Keeps the requests, and for every step what its branches do."""

    def __init__(self) -> None:
        self.prompts: list[torch.Tensor] = []
        self.steps: list[list[list[tuple[str, BranchStatus]]]] = []
        self.requests: Sequence[Request] = ()
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.prompts.append(value)

    def put_step(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.steps.append([[(branch.label, branch.status) for branch in each.branches()] for each in requests])

    def end(self) -> None:
        self.ends += 1


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Rows with padding on the left."""
    length = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def decode(
    model: MultiverseForCausalLM, prompts: Sequence[Sequence[int]], *processors: LogitsProcessor, **options: Any
) -> MultiverseGenerateOutput:
    """`generate()` with everything it can return; what is sampled repeats."""
    return model.generate(
        **padded(prompts),
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 60, "seed": 0, **options},
    )


def follow(
    script: Script, length: int = 1, *, model: MultiverseForCausalLM | None = None, **options: Any
) -> MultiverseGenerateOutput:
    """Decodes a script from its first `length` tokens on."""
    return decode(model or tiny_model(), [script.ids[:length]], Follow(script), **{"max_new_tokens": 500, **options})


def continuation(output: MultiverseGenerateOutput, prompts: Sequence[Sequence[int]], row: int) -> tuple[int, int]:
    """Where a row's new tokens begin and end."""
    start = max(map(len, prompts))
    new = (output.branch_ids[row, start:] >= 0).int()
    assert new.tolist() == sorted(new.tolist(), reverse=True), "padding stands behind the new tokens"
    return start, start + int(new.sum())


def real_tokens(output: MultiverseGenerateOutput, prompts: Sequence[Sequence[int]], row: int) -> list[int]:
    """Prompt and new tokens of a row, without padding."""
    start, end = continuation(output, prompts, row)
    return output.sequences[row, start - len(prompts[row]) : end].tolist()


def layout_of(ids: Sequence[int]) -> BranchLayout:
    return BranchLayout.from_token_ids(list(ids), TOKEN_IDS)


def text_of(output: MultiverseGenerateOutput) -> list[int]:
    """The only row of an output."""
    return output.sequences[0].tolist()


def forced_in(output: MultiverseGenerateOutput, start: int) -> list[int]:
    """Indices of the only row's new tokens that the model was not asked for."""
    return [index for index in range(start, output.sequences.shape[1]) if not output.sampled[0, index]]


def check_parity(
    model: MultiverseForCausalLM, output: MultiverseGenerateOutput, prompts: Sequence[Sequence[int]]
) -> int:
    """One forward pass gives what every sampled token was drawn from; returns how many tokens were compared."""
    compared = 0
    for row in range(len(prompts)):
        start, end = continuation(output, prompts, row)
        first = start - len(prompts[row])
        ids = output.sequences[row, first:end]
        branches = layout_of(ids.tolist()).branch_ids.tolist()
        places = output.sampled[row, first:end].nonzero().flatten().tolist()
        before = [max(index for index in range(place) if branches[index] == branches[place]) for place in places]
        with torch.no_grad():
            expected = model(input_ids=ids[None]).logits[0, before]
        assert output.logits[row].shape[0] == len(places)
        assert not output.sampled[row, :start].any()
        assert not output.sampled[row, end:].any()
        if places:
            difference = (output.logits[row].double() - expected.double()).abs().max()
            assert difference <= TOLERANCE[model.dtype], f"row {row}"
        compared += len(places)
    return compared


def check_structure(
    output: MultiverseGenerateOutput, prompts: Sequence[Sequence[int]], max_new_tokens: int, whole: bool = False
) -> None:
    """Counts, branches and positions of every row; closed structure where the prompt's own is sound (`whole`)."""
    for row, prompt in enumerate(prompts):
        start, end = continuation(output, prompts, row)
        ids = output.sequences[row, start - len(prompt) : end].tolist()
        assert ids[: len(prompt)] == list(prompt)
        layout = layout_of(ids)
        assert output.branch_ids[row, start - len(prompt) : end].tolist() == layout.branch_ids.tolist()
        assert output.position_ids[row, start - len(prompt) : end].tolist() == layout.position_ids.tolist()
        assert (output.branch_ids[row, : start - len(prompt)] == -1).all()
        assert (output.sequences[row, end:] == PAD).all()
        if whole:
            kinds = {problem.kind for problem in layout.problems}
            assert not kinds & {"stray close", "path outside a block", "unclosed block"}

        report = output.reports[row]
        assert report.generated_tokens == end - start <= max_new_tokens
        assert sum(branch.tokens for branch in report.branches) == report.generated_tokens
        assert report.forced_tokens == int((~output.sampled[row, start:end]).sum())
        assert report.finish_reason in ("eos", "length")
        if report.finish_reason == "eos":
            assert ids[-1] == EOS
        assert EOS not in ids[len(prompt) : -1]


TWO_PATHS = Script(
    "a <Parallel> _ <Goal> _ <Outline> _ 1 : b _ </Outline> _ <Outline> _ 2 : c _ </Outline> _ </Goal> _* "
    "<Path>* _* 1* :* d e </Path> _* "
    "<Path>* _* 2* :* f g h _ </Path> _* "
    "<Conclusion>* _ i </Conclusion> _ </Parallel> $"
)
# Ends of sequence close paths 2.1 and 3.
NESTED = Script(
    "a <Parallel> _ <Goal> <Outline> 1 : b </Outline> <Outline> c </Outline> <Outline> d </Outline> _ </Goal> _* "
    "<Path>* _* 1* :* e f </Path> _* "
    "<Path>* _* 2* :* g <Parallel> <Goal> <Outline> h </Outline> <Outline> 2 . 7 : i </Outline> </Goal> _* "
    "<Path>* _* 2* .* 1* :* k l m </Path>! _* "
    "<Path>* _* 2* .* 7* :* n </Path> _* "
    "<Conclusion>* o </Conclusion> </Parallel> p </Path> _* "
    "<Path>* _* 3* :* q </Path>! _* "
    "<Conclusion>* r <Parallel> <Goal> <Outline> s </Outline> </Goal> _* <Path>* _* 1* :* t </Path> _* "
    "<Conclusion>* </Conclusion> </Parallel> u </Conclusion> _ </Parallel> v $"
)


def visible_before(ids: Sequence[int], index: int) -> tuple[int, ...]:
    seen = layout_of(ids).attention_mask()[index, :index]
    return tuple(ids[other] for other in seen.nonzero().flatten().tolist())
