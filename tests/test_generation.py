"""`generate()` with real models: parity with one forward pass, what is forked, forced, shown, counted and refused."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multiverse import BranchLayout, MultiverseForCausalLM, add_multiverse_tokens
from multiverse.forced import HeaderTokens, forced_token_mask
from multiverse.generation.branch import Branch, BranchStatus
from multiverse.generation.cache import GrowingCache, GrowingLayer
from multiverse.generation.output import MultiverseGenerateOutput, RequestReport
from multiverse.generation.request import Request
from multiverse.generation.streaming import BranchStreamer
from strategies import Sample, shuffled, trees, truncated
from tiny import (
    ARCHITECTURES,
    DIGITS,
    EOS,
    PAD,
    TOKEN_IDS,
    WORDS,
    Script,
    from_strategy,
    tiny_config,
    tiny_ids,
    tiny_model,
    tiny_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

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
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}

both_ways = pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
both_modes = pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


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


class Record(LogitsProcessor):
    """Collects what processors are shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.tolist()
        return scores


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
    """`generate()` with everything it can return."""
    return model.generate(
        **padded(prompts),
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 60, **options},
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


# Parity with one forward pass (layout contract, section 6.2).


@both_ways
@every_architecture
@pytest.mark.parametrize("name", list(PROMPTS))
def test_logits_after_a_prompt_are_those_of_one_forward_pass(name: str, architecture: str, sampled: bool) -> None:
    model = tiny_model(architecture, seed=len(name))
    prompts = [tiny_ids(PROMPTS[name])]
    output = decode(model, prompts, Boost(), do_sample=sampled, suppress_tokens=[EOS], max_new_tokens=50)
    check_structure(output, prompts, 50, whole=True)
    assert check_parity(model, output, prompts) >= 10


@both_ways
@every_architecture
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])
def test_logits_of_a_padded_batch_are_those_of_one_forward_pass(
    dtype: torch.dtype, architecture: str, sampled: bool
) -> None:
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    blocks = 0
    for seed in range(2):
        model = tiny_model(architecture, dtype, seed)
        output = decode(model, prompts, FORK_AND_END, do_sample=sampled, max_new_tokens=90)
        check_structure(output, prompts, 90, whole=True)
        assert check_parity(model, output, prompts) >= 80
        blocks += sum(len(report.branches) > 3 for report in output.reports)
    assert blocks >= 2, "there is little to see without forks"


def test_logits_under_eager_attention_are_those_of_one_forward_pass() -> None:
    model = tiny_model(attention="eager")
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    output = decode(model, prompts, Boost())
    assert check_parity(model, output, prompts) >= 80


@both_modes
@pytest.mark.parametrize("max_path_tokens", [None, 1, 6, 11])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 8, 13, 21, 34, 55])
def test_limits_cut_anywhere_without_changing_logits(
    max_new_tokens: int, max_path_tokens: int | None, parallel: bool
) -> None:
    prompts = [tiny_ids(text) for text in ("a", "b c", "d e f g", "<Think> h", "<Think> i </Think> j", "x 1 : y")]
    model = tiny_model(seed=max_new_tokens)
    options = {"max_new_tokens": max_new_tokens, "max_path_tokens": max_path_tokens, "parallel": parallel}
    output = decode(model, prompts, Boost(tags=4.0), do_sample=True, **options)
    check_structure(output, prompts, max_new_tokens, whole=True)
    check_parity(model, output, prompts)


@settings(deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(truncated(trees(60)) | shuffled(50), st.booleans())
def test_prompt_of_any_kind_is_continued_as_its_layout_says(sample: Sample, parallel: bool) -> None:
    prompt = from_strategy(sample.ids) or tiny_ids("a")
    model = tiny_model()
    output = decode(model, [prompt], FORK_AND_END, max_new_tokens=120, max_path_tokens=9, parallel=parallel)
    check_structure(output, [prompt], 120)
    check_parity(model, output, [prompt])


def test_logits_stay_right_when_the_cache_grows() -> None:
    prompts = [tiny_ids("a b"), tiny_ids(PROMPTS["after a goal"])]
    model = tiny_model()
    output = decode(model, prompts, Boost(), max_new_tokens=420, max_path_tokens=120, suppress_tokens=[EOS])
    assert [report.generated_tokens > 400 for report in output.reports] == [True, True]
    check_structure(output, prompts, 420, whole=True)
    check_parity(model, output, prompts)


def test_row_of_a_batch_is_what_it_is_alone() -> None:
    prompts = [tiny_ids(text) for text in PROMPTS.values()]
    model = tiny_model(seed=3)
    options = {"max_new_tokens": 70, "max_path_tokens": 12}
    together = decode(model, prompts, FORK_AND_END, **options)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], FORK_AND_END, **options)
        assert text_of(alone) == real_tokens(together, prompts, row)
        assert alone.reports[0] == together.reports[row]


# Parallel and sequential.


def test_both_modes_write_the_same_tokens() -> None:
    forked = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        model = tiny_model(ARCHITECTURES[seed % 3], seed=seed)
        lengths = torch.randint(1, 7, (10,), generator=generator).tolist()
        prompts = [torch.randint(WORDS["a"], 64, (length,), generator=generator).tolist() for length in lengths]
        outputs = [
            decode(model, prompts, FORK_AND_END, max_new_tokens=400, max_path_tokens=24, parallel=parallel)
            for parallel in (True, False)
        ]
        for row in range(len(prompts)):
            beside, alone = (output.reports[row] for output in outputs)
            assert alone.sequential_steps >= beside.sequential_steps
            asked = int(outputs[1].sampled[row].sum()) + sum(path.finish_reason == "eos" for path in alone.branches)
            if "length" in (beside.finish_reason, alone.finish_reason):
                assert alone.sequential_steps in (asked, asked + 1), "an answer that does not fit is not written"
                continue
            assert real_tokens(outputs[0], prompts, row) == real_tokens(outputs[1], prompts, row)
            assert alone.sequential_steps == asked
            forked += len(beside.branches) > 1
    assert forked >= 60


# Untagged decoding.


def plain_model(model: MultiverseForCausalLM, architecture: str) -> Any:
    """The base class with the same weights."""
    base = AutoModelForCausalLM.from_config(tiny_config(architecture)).to(model.dtype).eval()
    base.load_state_dict(model.state_dict())
    return base


UNTAGGED_OPTIONS = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampled": {"do_sample": True, "top_k": 0},
    "sampled by nucleus": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
}


@every_architecture
@pytest.mark.parametrize("name", list(UNTAGGED_OPTIONS))
def test_untagged_decoding_is_that_of_the_base_class(name: str, architecture: str) -> None:
    model = tiny_model(architecture)
    base = plain_model(model, architecture)
    banned = list(TOKEN_IDS.values())
    bans: list[dict[str, Any]] = [{"suppress_tokens": banned}, {"bad_words_ids": [[token_id] for token_id in banned]}]
    for seed, text in enumerate(("a", "a b c d", "x y 1 : _ z", "q")):
        given = {"input_ids": torch.tensor([tiny_ids(text)]), **UNTAGGED_OPTIONS[name], **bans[seed % 2]}
        rows = []
        for each in (model, base):
            torch.manual_seed(seed)
            rows.append(each.generate(**given, max_new_tokens=25)[0].tolist())
        assert rows[0] == rows[1]


def test_maximum_length_given_as_a_criterion_is_kept() -> None:
    model = tiny_model()
    stop = StoppingCriteriaList([MaxLengthCriteria(max_length=7)])
    options = {"suppress_tokens": list(TOKEN_IDS.values()), "max_new_tokens": 40, "stopping_criteria": stop}
    ids = torch.tensor([tiny_ids("a b")])
    expected = plain_model(model, "llama").generate(ids, **options)
    assert expected.shape[1] == 7
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_untagged_decoding_of_a_padded_batch_is_that_of_the_base_class() -> None:
    model = tiny_model()
    given = padded([tiny_ids("a b c d e f"), tiny_ids("g"), tiny_ids("h i j")])
    options = {"suppress_tokens": list(TOKEN_IDS.values()), "max_new_tokens": 40}
    expected = plain_model(model, "llama").generate(**given, **options)
    assert model.generate(**given, **options).tolist() == expected.tolist()


def test_minimum_of_new_tokens_counts_from_the_end_of_every_rows_prompt() -> None:
    class LikeTheEnd(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, EOS] += 99.0
            return scores

    given = padded([tiny_ids("a b c d e f g h"), tiny_ids("i")])
    model = tiny_model()
    options = {"min_new_tokens": 3, "max_new_tokens": 20, "suppress_tokens": list(TOKEN_IDS.values())}
    processors = LogitsProcessorList([LikeTheEnd()])
    expected = plain_model(model, "llama").generate(**given, **options, logits_processor=processors)
    assert (expected[:, 8 + 3] == EOS).all()
    assert model.generate(**given, **options, logits_processor=processors).tolist() == expected.tolist()


def test_prefix_function_is_told_the_row() -> None:
    rows = set()

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        rows.add(row)
        return [WORDS["a"], WORDS["b"]] if row == 0 else [WORDS["c"]]

    model = tiny_model()
    given = padded([tiny_ids("x"), tiny_ids("y z")])
    sequences = model.generate(**given, prefix_allowed_tokens_fn=allowed, max_new_tokens=4)
    assert rows == {0, 1}
    assert set(sequences[1, 2:].tolist()) == {WORDS["c"]}


@both_ways
def test_model_without_tags_decodes_as_its_base_class(sampled: bool) -> None:
    model = tiny_model()
    base = plain_model(model, "llama")
    model.config.multiverse_token_ids = None
    given = padded([tiny_ids("a <Parallel> b"), tiny_ids("c")])
    rows = []
    for each in (model, base):
        torch.manual_seed(1)
        options = {"do_sample": sampled, "return_dict_in_generate": True, "output_scores": True}
        output = each.generate(**given, **options, max_new_tokens=20)
        rows.append((output.sequences.tolist(), torch.stack(output.scores)))
    assert rows[0][0] == rows[1][0]
    assert torch.equal(rows[0][1], rows[1][1])


def test_sampling_repeats_with_its_seed() -> None:
    model = tiny_model()
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(decode(model, prompts, Boost(), do_sample=True).sequences.tolist())
    assert rows[0] == rows[1] != rows[2]


def test_several_sequences_are_drawn_for_one_prompt() -> None:
    model = tiny_model()
    prompt = tiny_ids(PROMPTS["after a goal"])
    output = decode(model, [prompt], Boost(), do_sample=True, num_return_sequences=3)
    check_structure(output, [prompt] * 3, 60, whole=True)
    check_parity(model, output, [prompt] * 3)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3


# What the engine does.

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


@both_modes
@pytest.mark.parametrize(("script", "starts"), [(TWO_PATHS, [1]), (NESTED, [1, 81])], ids=["two paths", "nested"])
def test_scripted_text_is_returned_with_its_forced_tokens(script: Script, starts: list[int], parallel: bool) -> None:
    model = tiny_model()
    output = follow(script, model=model, parallel=parallel)
    assert text_of(output) == script.ids
    assert forced_in(output, 1) == script.forced
    assert output.reports[0].finish_reason == "eos"
    assert [block.start for block in output.blocks[0]] == starts
    check_structure(output, [script.ids[:1]], 500, whole=True)
    check_parity(model, output, [script.ids[:1]])


def test_report_counts_the_two_paths_of_a_script() -> None:
    report = follow(TWO_PATHS).reports[0]
    # 21 answers up to </Goal>, 5 of the longer path, 6 from the conclusion to the end of sequence.
    assert report.sequential_steps == 21 + 5 + 6
    assert report.forced_tokens == len(TWO_PATHS.forced) == 12
    assert report.generated_tokens == 21 + 3 + 5 + 6 + 12
    assert report.degree_of_parallelism == 47 / 32
    root, first, second = report.branches
    assert [branch.label for branch in report.branches] == ["", "1", "2"]
    assert [branch.tokens for branch in report.branches] == [29, 8, 10]
    assert (root.first_step, root.last_step) == (1, 32)
    # Headers are written in the step that closes the goal.
    assert (first.first_step, first.last_step) == (21, 24)
    assert (second.first_step, second.last_step) == (21, 26)
    assert follow(TWO_PATHS, parallel=False).reports[0].sequential_steps == 21 + 3 + 5 + 6
    assert RequestReport(**{k: v for k, v in report.to_dict().items() if k != "degree_of_parallelism"})


def test_report_counts_the_longest_way_through_nested_paths() -> None:
    parallel, sequential = (follow(NESTED, parallel=each).reports[0] for each in (True, False))
    # Path 2: 13 answers up to its goal's end, 4 in path 2.1 (the end of sequence counts), 5 after it.
    assert parallel.sequential_steps == 19 + (12 + 4 + 5) + (8 + 2 + 6)
    answers = len(NESTED.ids) - 1 - len(NESTED.forced) + 2
    assert sequential.sequential_steps == answers
    reasons = {branch.label: branch.finish_reason for branch in parallel.branches[:6]}
    assert reasons == {"": None, "1": "closed", "2": "closed", "2.1": "eos", "2.7": "closed", "3": "eos"}


@pytest.mark.parametrize("script", [TWO_PATHS, NESTED], ids=["two paths", "nested"])
def test_fork_and_merge_cost_no_pass_of_their_own(script: Script) -> None:
    model = tiny_model()
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    output = follow(script, model=model)
    # The prompt's pass gives the first answer, and the last answer is not run.
    assert len(sizes) == output.reports[0].sequential_steps
    assert sizes[0] == 1
    assert sum(sizes) == len(script.ids) - 1


def test_prompt_that_ends_at_a_fork_costs_one_pass_more_than_its_steps() -> None:
    model = tiny_model()
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    output = follow(TWO_PATHS, 22, model=model)
    assert text_of(output) == TWO_PATHS.ids
    assert output.reports[0].sequential_steps == 5 + 6
    assert len(calls) == 1 + 5 + 6


def test_cache_slots_are_written_once_and_never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[int, int] = {}
    plain_update = GrowingLayer.update

    def update(layer: GrowingLayer, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        used, address = layer.length, layer.keys.data_ptr() if layer.is_initialized else None
        before = layer.keys[:, :, :used].clone() if used else None
        result = plain_update(layer, keys, values, *args, **kwargs)
        assert written.get(id(layer), 0) == used
        written[id(layer)] = used + keys.shape[2]
        assert layer.length == result[0].shape[2] == result[1].shape[2] == written[id(layer)]
        assert torch.equal(result[0][:, :, used:], keys)
        if used:
            assert layer.keys.data_ptr() == address
            assert torch.equal(layer.keys[:, :, :used], before)
        return result

    monkeypatch.setattr(GrowingLayer, "update", update)
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    watch = Watch()
    model = tiny_model()
    output = model.generate(
        **padded(prompts),
        streamer=watch,
        logits_processor=LogitsProcessorList([FORK_AND_END]),
        max_new_tokens=90,
        return_dict_in_generate=True,
    )
    generated = sum(report.generated_tokens for report in output.reports)
    pending = sum(len(branch.pending) for request in watch.requests for branch in request.branches())
    assert sum(len(report.branches) for report in output.reports) > 12
    assert list(written.values()) == [sum(map(len, prompts)) + generated - pending] * 2


def test_cache_that_grows_keeps_what_it_holds() -> None:
    cache = GrowingCache(num_layers=2, capacity=3)
    chunks = [torch.randn(1, 2, count, 4) for count in (2, 1, 1, 9, 1, 20)]
    for number in range(len(chunks)):
        for layer, sign in ((0, 1), (1, -1)):
            keys, values = cache.update(sign * chunks[number], 2 * sign * chunks[number], layer)
            everything = torch.cat(chunks[: number + 1], dim=2)
            assert torch.equal(keys, sign * everything)
            assert torch.equal(values, 2 * sign * everything)
            assert cache.get_seq_length(layer) == everything.shape[2]
            assert cache.get_mask_sizes(5, layer) == (everything.shape[2] + 5, 0)


def goal(outlines: Sequence[str]) -> str:
    return "<Parallel> <Goal> " + " ".join(f"<Outline> {outline} </Outline>" for outline in outlines) + " </Goal>"


@pytest.mark.parametrize(
    ("outlines", "labels"),
    [
        (["_ 1 : a", "_ 2 : b"], ["1", "2"]),
        (["5 : a", "3 : b"], ["5", "3"]),
        (["a", "b", "c"], ["1", "2", "3"]),
        (["a", "7 : b", "c"], ["1", "7", "3"]),
        (["2 . 1 : a", "2 . 2 : b"], ["2.1", "2.2"]),
        (["4 : a"] * 3, ["4", "4", "4"]),
        (["1 0 : a", "9 9 . 1 2 : b"], ["10", "99.12"]),
        ([f"{' '.join(str(number))} : a" for number in range(1, 21)], [str(number) for number in range(1, 21)]),
        (["a"] * 20, [str(number) for number in range(1, 21)]),
    ],
)
def test_goal_forks_one_path_per_outline_with_its_own_label(outlines: list[str], labels: list[str]) -> None:
    paths = [f"<Path>* _* {' '.join(f'{piece}*' for piece in label)} :* x </Path> _*" for label in labels]
    script = Script(f"a {goal(outlines)} _* {' '.join(paths)} <Conclusion>* y </Conclusion> </Parallel> $")
    output = follow(script)
    assert text_of(output) == script.ids
    assert forced_in(output, 1) == script.forced
    assert [branch.label for branch in output.reports[0].branches] == ["", *labels]
    # All paths run side by side: `x </Path>`; after them `y </Conclusion> </Parallel> $`.
    assert output.reports[0].sequential_steps == len(tiny_ids(goal(outlines))) + 2 + 4


def test_end_of_sequence_inside_a_path_closes_it_and_is_not_written() -> None:
    output = follow(NESTED)
    ids = text_of(output)
    assert ids.index(EOS) == len(ids) - 1
    branches = output.branch_ids[0].tolist()
    # Branches in linear order: root, 1, 2, 2.1, 2.7, 3, the conclusion's.
    for branch in (3, 5):
        own = [index for index, owner in enumerate(branches) if owner == branch]
        close = next(index for index in own if ids[index] == TOKEN_IDS["</Path>"])
        assert not output.sampled[0, close]
        assert output.sampled[0, close - 1]


def test_any_of_several_end_tokens_closes_a_path_and_ends_the_request() -> None:
    other = WORDS["z"]

    class FollowToOther(Follow):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept = super().__call__(input_ids, scores)
            kept[:, other] = kept[:, EOS]
            kept[:, EOS] = -torch.inf
            return kept

    output = decode(
        tiny_model(), [NESTED.ids[:1]], FollowToOther(NESTED), eos_token_id=[EOS, other], max_new_tokens=500
    )
    assert text_of(output) == [*NESTED.ids[:-1], other]
    assert forced_in(output, 1) == NESTED.forced
    assert output.reports[0].finish_reason == "eos"


@both_modes
def test_path_budget_closes_paths_at_their_length(parallel: bool) -> None:
    prompt = tiny_ids(f"a {goal(['b', 'c'])}")
    options = {"max_path_tokens": 8, "max_new_tokens": 40, "parallel": parallel}
    output = decode(tiny_model(), [prompt], Say("x"), **options)
    path = "<Path> _ {} : x x x </Path> _"
    closed = f"_ {path.format(1)} {path.format(2)} <Conclusion>"
    assert text_of(output)[len(prompt) :][: len(tiny_ids(closed))] == tiny_ids(closed)
    report = output.reports[0]
    assert [branch.finish_reason for branch in report.branches] == [None, "max_path_tokens", "max_path_tokens"]
    assert report.finish_reason == "length"
    # The root, which has no such budget, goes on to the end of the request's.
    assert report.generated_tokens == 40
    assert text_of(output)[-3:] == tiny_ids("x </Conclusion> </Parallel>")


def test_paths_that_the_request_cut_off_have_no_reason_of_their_own() -> None:
    prompt = tiny_ids(f"a {goal(['b', 'c'])}")
    report = decode(tiny_model(), [prompt], Say("x"), max_new_tokens=20).reports[0]
    assert report.finish_reason == "length"
    assert [branch.finish_reason for branch in report.branches] == [None, None, None]


def test_flag_is_false_exactly_on_forced_tokens() -> None:
    header = HeaderTokens([WORDS["_"]], {**DIGITS, ".": WORDS["."], ":": WORDS[":"]})
    blocks = 0
    for seed in range(4):
        model = tiny_model(ARCHITECTURES[seed % 3], seed=seed)
        prompts = [tiny_ids(text) for text in ("a", "b c", "d e f", "g h i j", *map(PROMPTS.get, MIXED))]
        output = decode(model, prompts, FORK_AND_END, max_new_tokens=400, max_path_tokens=30)
        for row, prompt in enumerate(prompts):
            if output.reports[row].finish_reason != "eos":
                continue
            start, end = continuation(output, prompts, row)
            ids = real_tokens(output, prompts, row)
            layout = layout_of(ids)
            expected = forced_token_mask(layout, ids, header)
            reasons = [branch.finish_reason for branch in output.reports[row].branches]
            assert len(reasons) == len(layout.compatible)
            for index, branch in enumerate(layout.branch_ids.tolist()):
                # In the text, a path that the engine closed looks like any other.
                if ids[index] == TOKEN_IDS["</Path>"] and reasons[branch] in ("eos", "max_path_tokens"):
                    expected[index] = True
            blocks += len(reasons) > 1
            assert (~output.sampled[row, start:end]).tolist() == expected[len(prompt) :].tolist()
    assert blocks >= 20


# What processors, criteria and streamers are shown.


def visible_before(ids: Sequence[int], index: int) -> tuple[int, ...]:
    seen = layout_of(ids).attention_mask()[index, :index]
    return tuple(ids[other] for other in seen.nonzero().flatten().tolist())


@both_modes
@pytest.mark.parametrize("name", list(PROMPTS))
def test_processors_see_what_the_branch_sees(name: str, parallel: bool) -> None:
    prompt = tiny_ids(PROMPTS[name])
    record = Record()
    output = decode(tiny_model(), [prompt], record, FORK_AND_END, max_new_tokens=300, parallel=parallel)
    ids = text_of(output)
    report = output.reports[0]
    assert report.finish_reason == "eos"
    # Where the answer was the end of sequence, the `</Path>` that stands for it is forced.
    ends = [
        index
        for index in range(len(prompt), len(ids))
        if ids[index] == TOKEN_IDS["</Path>"] and not output.sampled[0, index]
    ]
    assert len(ends) == sum(branch.finish_reason == "eos" for branch in report.branches)
    asked = [*output.sampled[0].nonzero().flatten().tolist(), *ends]
    assert Counter(map(tuple, record.seen)) == Counter(visible_before(ids, index) for index in asked)


def test_processors_are_called_for_one_branch_at_a_time() -> None:
    follower = Follow(TWO_PATHS)
    decode(tiny_model(), [TWO_PATHS.ids[:1]], follower, max_new_tokens=200)
    assert len(follower.asked) == 21 + 3 + 5 + 6
    siblings = [set(tiny_ids("d e")), set(tiny_ids("f g h"))]
    for history in follower.asked:
        if TOKEN_IDS["<Conclusion>"] not in history:
            assert not all(words & set(history) for words in siblings)


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
    assert (report.finish_reason, report.sequential_steps) == ("stopped", 1)
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


def test_paths_of_different_requests_do_not_share_labels() -> None:
    watch = Watch()
    decode(tiny_model(), [tiny_ids(text) for text in PROMPTS.values()], Boost(), streamer=watch)

    def numbers(branch: Branch) -> list[int]:
        return [each.number for each in branch.tree()]

    found = [number for request in watch.requests for number in numbers(request.root)]
    assert len(found) == len(set(found))


# Arguments and configuration.

IDS = torch.tensor([tiny_ids("a b")])
ONES = torch.ones(1, 2, dtype=torch.long)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({}, "input_ids"),
    "no rows": ({"input_ids": IDS[:0]}, "`input_ids` is empty"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "`input_ids` is empty"),
    "no tokens in a batch": ({"inputs": torch.empty(3, 0, dtype=torch.long)}, "`input_ids` is empty"),
    "one dimension": ({"input_ids": IDS[0]}, "`input_ids` must be"),
    "three dimensions": ({"inputs": IDS[None]}, "`input_ids` must be"),
    "a list": ({"input_ids": IDS.tolist()}, "`input_ids` must be"),
    "embeddings": ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds"),
    "ids and embeddings": ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds"),
    "mask of one dimension": ({"input_ids": IDS, "attention_mask": ONES[0]}, "attention_mask"),
    "mask of four dimensions": ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 2, 2)}, "attention_mask"),
    "mask of other rows": ({"input_ids": IDS, "attention_mask": ONES.repeat(2, 1)}, "attention_mask"),
    "mask too short": ({"input_ids": IDS, "attention_mask": ONES[:, :1]}, "attention_mask"),
    "mask too long": ({"input_ids": IDS, "attention_mask": ONES.repeat(1, 2)}, "attention_mask"),
    "mask that hides a row": (
        {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
        "attention_mask",
    ),
    "positions": ({"input_ids": IDS, "position_ids": torch.tensor([[0, 1]])}, "position_ids"),
    "beams": ({"input_ids": IDS, "num_beams": 2}, "num_beams|BEAM_SEARCH"),
    "no new tokens": ({"input_ids": IDS, "max_new_tokens": 0}, "max_new_tokens"),
    "fewer than no new tokens": ({"input_ids": IDS, "max_new_tokens": -3}, "max_new_tokens"),
    "part of a token": ({"input_ids": IDS, "max_new_tokens": 2.5}, "max_new_tokens"),
    "no new tokens in a configuration": (
        {"input_ids": IDS, "generation_config": GenerationConfig(max_new_tokens=5, max_path_tokens=0)},
        "max_path_tokens",
    ),
    "no path tokens": ({"input_ids": IDS, "max_path_tokens": 0}, "max_path_tokens"),
    "fewer than no path tokens": ({"input_ids": IDS, "max_path_tokens": -1}, "max_path_tokens"),
    "path tokens in words": ({"input_ids": IDS, "max_path_tokens": "many"}, "max_path_tokens"),
    "parallel in words": ({"input_ids": IDS, "parallel": "yes"}, "`parallel`"),
    "parallel as a number": ({"input_ids": IDS, "parallel": 1}, "`parallel`"),
    "static cache": ({"input_ids": IDS, "cache_implementation": "static"}, "cache_implementation"),
    "paged cache": ({"input_ids": IDS, "cache_implementation": "paged"}, "cache_implementation"),
    "quantized cache": ({"input_ids": IDS, "cache_implementation": "quantized"}, "cache_implementation"),
    "no cache": ({"input_ids": IDS, "use_cache": False}, "use_cache"),
    "encoder penalty": ({"input_ids": IDS, "encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty"),
    "encoder n-grams": ({"input_ids": IDS, "encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size"),
    "scores": ({"input_ids": IDS, "output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "attentions": (
        {"input_ids": IDS, "output_attentions": True, "return_dict_in_generate": True},
        "output_attentions",
    ),
    "hidden states": (
        {"input_ids": IDS, "output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states",
    ),
    "guidance": ({"input_ids": IDS, "guidance_scale": 1.5}, "guidance_scale"),
    "prefill in chunks": ({"input_ids": IDS, "prefill_chunk_size": 1}, "prefill_chunk_size"),
    "budget below the closing": (
        {"input_ids": torch.tensor([tiny_ids("<Parallel> <Goal> <Outline>")]), "max_new_tokens": 4},
        "`max_new_tokens` is 4",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_argument_that_cannot_work_is_refused_by_name(name: str) -> None:
    given, message = REFUSED[name]
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.generate(**{"max_new_tokens": 5, **given} if "generation_config" not in given else given)


@pytest.mark.parametrize(
    ("name", "value"),
    [("parallel", "yes"), ("max_path_tokens", 0), ("max_new_tokens", 0), ("cache_implementation", "static")],
)
def test_setting_of_the_models_own_configuration_is_refused_likewise(name: str, value: Any) -> None:
    model = tiny_model()
    model.generation_config.max_new_tokens = 5
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=name):
        model.generate(input_ids=IDS)


def test_filled_cache_is_refused() -> None:
    model = tiny_model()
    cache = model(input_ids=IDS[:, :1], past_key_values=DynamicCache(config=model.config)).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(input_ids=IDS, past_key_values=cache, max_new_tokens=5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("multiverse_token_ids", {tag: TOKEN_IDS[tag] for tag in list(TOKEN_IDS)[:-1]}, "</Conclusion>"),
        ("multiverse_token_ids", {**TOKEN_IDS, "<Path>": TOKEN_IDS["<Goal>"]}, "one id to two tags"),
        ("multiverse_separator_ids", None, "multiverse_separator_ids"),
        ("multiverse_label_ids", None, "multiverse_label_ids"),
        ("multiverse_label_ids", {}, "multiverse_label_ids"),
    ],
)
def test_configuration_that_lacks_what_decoding_writes_is_refused_by_name(
    field: str, value: Any, message: str
) -> None:
    model = tiny_model()
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=IDS, max_new_tokens=5)


def is_parallel(model: MultiverseForCausalLM, **options: Any) -> bool:
    """Whether the two paths of the script run side by side."""
    output = model.generate(
        torch.tensor([TWO_PATHS.ids[:1]]),
        logits_processor=LogitsProcessorList([Follow(TWO_PATHS)]),
        return_dict_in_generate=True,
        **options,
    )
    assert text_of(output) == TWO_PATHS.ids
    steps = output.reports[0].sequential_steps
    assert steps in (32, 35)
    return steps == 32


def test_mode_is_taken_from_the_call_then_the_configuration_then_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    assert is_parallel(model, max_new_tokens=100)
    assert is_parallel(model, generation_config=GenerationConfig(max_new_tokens=100, eos_token_id=EOS))
    assert not is_parallel(model, generation_config=GenerationConfig(max_new_tokens=100, parallel=False))

    model.generation_config.parallel = False
    assert not is_parallel(model, max_new_tokens=100)
    assert not is_parallel(model, generation_config=GenerationConfig(max_new_tokens=100, eos_token_id=EOS))
    assert is_parallel(model, max_new_tokens=100, parallel=True)
    assert model.generation_config.parallel is False, "a call leaves the model's configuration alone"


def test_mode_and_path_budget_survive_saving(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.parallel = False
    model.generation_config.max_path_tokens = 8
    model.save_pretrained(tmp_path)
    loaded = MultiverseForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.generation_config.parallel is False
    assert loaded.generation_config.max_path_tokens == 8
    prompts = [tiny_ids(f"a {goal(['b', 'c'])}")]
    output = decode(loaded, prompts, Say("x"), max_new_tokens=40)
    assert [branch.finish_reason for branch in output.reports[0].branches[1:]] == ["max_path_tokens"] * 2
    assert output.sequences.tolist() == decode(model, prompts, Say("x"), max_new_tokens=40).sequences.tolist()
    # Three answers in each path, one after the other; then the root's.
    root = output.reports[0].branches[0]
    assert output.reports[0].sequential_steps == int(output.sampled.sum())
    assert root.tokens == 40 - 2 * 9


def test_only_sequences_are_returned_by_default() -> None:
    model = tiny_model()
    sequences = model.generate(torch.tensor([TWO_PATHS.ids[:1]]), max_new_tokens=5)
    assert isinstance(sequences, torch.Tensor)
    output = model.generate(torch.tensor([TWO_PATHS.ids[:1]]), max_new_tokens=5, return_dict_in_generate=True)
    assert output.sequences.tolist() == sequences.tolist()
    assert output.logits is None


def test_length_limit_counts_the_prompt() -> None:
    model = tiny_model()
    for prompt in ("a b c", PROMPTS["after a goal"]):
        ids = torch.tensor([tiny_ids(prompt)])
        limit = ids.shape[1] + 25
        by_length = model.generate(ids, max_length=limit, logits_processor=LogitsProcessorList([Boost()]))
        by_new = model.generate(ids, max_new_tokens=25, logits_processor=LogitsProcessorList([Boost()]))
        assert by_length.tolist() == by_new.tolist()
        assert by_length.shape[1] <= limit
