"""Beam search, assisted decoding and prompt lookup: refused by name while a block may fork, exact one by one.

The references know neither caches nor branches: whole texts in the plain base class, under the mask and positions of
the brute-force layout.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import every_architecture
from decoding import PROMPTS, Boost, Watch, both_ways, layout_of, padded
from forward import (
    NESTED,
    OPEN_BLOCK,
    TWO_PATHS,
    WORDS,
    difference,
    in_chunks,
    logits_of,
    models,
    pad,
    positions_of,
    reference_logits,
    row,
    with_and_without_positions,
)
from multiverse import MultiverseForCausalLM
from tiny import EOS, PAD, TOKEN_IDS, VOCABULARY, tiny_ids, tiny_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

TAGS = sorted(TOKEN_IDS.values())
#: Prompts of two rows; those of the last pair have no block yet.
PAIRS = [
    [tiny_ids(text) for text in pair]
    for pair in (
        (PROMPTS["inside a later path"], PROMPTS["inside a goal"]),
        (PROMPTS["plain"], PROMPTS["inside a nested path"]),
        (PROMPTS["after a goal"], PROMPTS["inside a conclusion's path"]),
        ("a b c d e", "x y"),
    )
]
DRAFTED = ("plain", "after a goal", "inside a later path", "after a path", "inside a nested path", "after a block")


class Restless(LogitsProcessor):
    """Moves from branch to branch, differently after every token."""

    moving = tuple(TOKEN_IDS[tag] for tag in ("<Parallel>", "<Path>", "</Path>", "<Conclusion>", "</Parallel>"))

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.likes = 2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.likes[:, self.moving] += 3
        self.likes[:, TOKEN_IDS["<Path>"]] += 2
        self.likes[:, EOS] += 5

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + self.likes[input_ids[:, -1]].to(scores.dtype)


RESTLESS = Restless()


def stock(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *processors: LogitsProcessor, **options) -> Any:
    """`generate()` in a loop of transformers' own, for which a model without tags needs no `parallel=False`."""
    own = {"parallel": False} if getattr(model.config, "multiverse_token_ids", None) else {}
    return model.generate(
        **padded(prompts),
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
        output_scores=True,
        **{"max_new_tokens": 30, **own, **options},
    )


def three_beams(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *processors: LogitsProcessor, **options
) -> Any:
    return stock(model, prompts, *processors, num_beams=3, num_return_sequences=3, **options)


def end_of(sequence: list[int], start: int) -> int:
    """Where a returned row ends: behind its end of sequence, or with its last token."""
    return sequence.index(EOS, start) + 1 if EOS in sequence[start:] else len(sequence)


def reference_score(
    base: PreTrainedModel, sequence: list[int], padding: int, start: int, processor: LogitsProcessor
) -> float:
    """Sum of the processed log-probabilities of all that was written from `start` on, from one forward pass."""
    end = end_of(sequence, start)
    log_probs = reference_logits(base, sequence[padding:end])[0].log_softmax(-1)
    total = 0.0
    for place in range(start, end):
        total += processor(row(sequence[:place]), log_probs[None, place - 1 - padding])[0, sequence[place]].item()
    return total


@every_architecture
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_scores_of_beams_are_those_of_one_forward_pass(architecture: str, penalty: float) -> None:
    model, base = models(architecture)
    moves = parted = tags = 0
    for prompts in PAIRS:
        start = max(map(len, prompts))
        output = three_beams(model, prompts, RESTLESS, length_penalty=penalty)
        layouts: list[set[tuple[int, ...]]] = [set(), set()]
        assert output.sequences.shape[0] == 6
        for number, sequence in enumerate(output.sequences.tolist()):
            prompt = prompts[number // 3]
            padding, end = start - len(prompt), end_of(sequence, start)
            assert sequence[padding:start] == prompt
            score = reference_score(base, sequence, padding, start, RESTLESS) / (end - start) ** penalty
            assert output.sequences_scores[number].item() == pytest.approx(score, abs=1e-4)

            sources = output.beam_indices[number, : end - start].tolist()
            moves += sum(one != other for one, other in itertools.pairwise(sources))
            tags += sum(token_id in TAGS for token_id in sequence[start:end])
            layouts[number // 3].add(tuple(layout_of(sequence[padding:end]).branch_ids.tolist()))
        parted += sum(len(each) > 1 for each in layouts)
    assert moves >= 20, "beams go over to other rows of the cache"
    assert parted >= 1, "beams of one prompt differ in their blocks"
    assert tags >= 40


@every_architecture
@both_ways
def test_beams_are_those_of_decoding_without_a_cache(architecture: str, sampled: bool) -> None:
    model, _ = models(architecture)
    for prompts in PAIRS:
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            outputs.append(three_beams(model, prompts, RESTLESS, do_sample=sampled, use_cache=use_cache))
        cached, whole = outputs
        assert set(TAGS) & set(cached.sequences[:, max(map(len, prompts)) :].flatten().tolist())
        assert cached.sequences.tolist() == whole.sequences.tolist()
        assert torch.allclose(cached.sequences_scores, whole.sequences_scores, rtol=0, atol=1e-4)


UNTAGGED: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "allowed tokens": {
        "num_beams": 2,
        "prefix_allowed_tokens_fn": lambda number, _: tiny_ids("a b c d e f") if number else tiny_ids("u v w x y z"),
    },
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "sampled prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": True},
}


@every_architecture
@pytest.mark.parametrize("name", list(UNTAGGED))
@pytest.mark.parametrize("knows_tags", [True, False], ids=["tags", "no tags"])
def test_untagged_text_is_that_of_the_base_class(architecture: str, name: str, knows_tags: bool) -> None:
    model, base = models(architecture)
    if not knows_tags:
        model = tiny_model(architecture)
        model.load_state_dict(base.state_dict())
        model.config.multiverse_token_ids = None
    prompts = [tiny_ids("a b a b c"), tiny_ids("x y")][: 1 if "lookup" in name else 2]
    rows = []
    for each in (model, base):
        torch.manual_seed(7)
        options = {"suppress_tokens": TAGS, "min_new_tokens": 12, **UNTAGGED[name]}
        rows.append(stock(each, prompts, **options).sequences.tolist())
    assert len(rows[0][0]) >= len(prompts[0]) + 12
    assert rows[0] == rows[1]


def drafts_of(kind: str, architecture: str) -> dict[str, Any]:
    """What makes the drafts. The smaller model is the first layer of the model; the plain one knows no branches."""
    model, base = models(architecture)
    if kind == "prompt lookup":
        return {"prompt_lookup_num_tokens": 3}
    if kind == "early exit":
        return {"assistant_early_exit": 1}
    if kind == "plain model":
        return {"assistant_model": base}
    assistant = tiny_model(architecture, num_hidden_layers=1 if kind == "smaller model" else 2)
    assistant.load_state_dict(model.state_dict(), strict=kind != "smaller model")
    return {"assistant_model": assistant}


def reference_greedy(base: PreTrainedModel, prompt: list[int], processor: LogitsProcessor, count: int) -> list[int]:
    """One forward pass of the whole text for every token, and nothing forced."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and EOS not in ids[len(prompt) :]:
        scores = processor(row(ids), reference_logits(base, ids)[:, -1])[0]
        best, second = scores.topk(2).values.tolist()
        assert best - second > 1e-5, "a tie"
        ids.append(int(scores.argmax()))
    return ids


@every_architecture
@pytest.mark.parametrize("kind", ["prompt lookup", "smaller model", "same model", "plain model", "early exit"])
def test_drafted_tokens_are_those_of_greedy_decoding(architecture: str, kind: str) -> None:
    model, base = models(architecture)
    drafts = drafts_of(kind, architecture)
    queries: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: queries.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    accepted = rejected = tags = 0
    try:
        for padding, name in enumerate(DRAFTED):
            prompt = tiny_ids(PROMPTS[name])
            queries.clear()
            given = {
                "input_ids": row([PAD] * padding + prompt),
                "attention_mask": row([0] * padding + [1] * len(prompt)),
            }
            processor = Boost(2.5)
            expected = reference_greedy(base, prompt, processor, 24)
            found = model.generate(
                **given, **drafts, parallel=False, max_new_tokens=24, logits_processor=LogitsProcessorList([processor])
            )
            assert found[0].tolist() == [PAD] * padding + expected, name
            new = len(expected) - len(prompt)
            accepted += new - len(queries)
            rejected += sum(queries) - padding - len(prompt) - new + 1
            tags += sum(token_id in TAGS for token_id in expected[len(prompt) :])
    finally:
        hook.remove()
    assert tags >= 20
    if kind == "early exit":
        assert rejected > 0  # the model's own calls draft too, so what was accepted cannot be told
    elif kind == "same model":
        assert accepted > 60, "the assistant reads the blocks as the model does"
        assert rejected == 0
    else:
        assert accepted > 0, "drafts are used"
        assert rejected > 0, "the cache is cropped"


@every_architecture
@with_and_without_positions
def test_rows_of_a_cache_that_holds_blocks_may_be_reordered_repeated_and_dropped(
    architecture: str, positions: bool
) -> None:
    model, _ = models(architecture)
    starts = [NESTED[:30], OPEN_BLOCK, WORDS, TWO_PATHS[:20]]
    ends = [TWO_PATHS, OPEN_BLOCK[1:], NESTED, WORDS, NESTED[30:]]
    for order in ([3, 2, 1, 0], [0, 0, 2, 2, 1], [1], [3, 3, 3, 0, 3]):
        input_ids, mask = pad(starts, "left")
        _, past_key_values = in_chunks(model, input_ids, [11, 19], attention_mask=mask)
        past_key_values = model._reorder_cache(past_key_values, torch.tensor(order, dtype=torch.int32))
        ids, tail_mask = pad(ends[: len(order)], "right")
        whole = torch.cat([mask[order], tail_mask], dim=1)
        found, _ = in_chunks(
            model,
            ids,
            [3, 1, ids.shape[1] - 4],
            past_key_values,
            attention_mask=whole,
            position_ids=positions_of(whole)[:, 30:] if positions else None,
        )
        for number, source in enumerate(order):
            expected = logits_of(model, row(starts[source] + ends[number]))[0, len(starts[source]) :]
            assert difference(found[number, : len(ends[number])], expected) <= 1e-5


@every_architecture
def test_untagged_rows_may_be_reordered_before_a_block_opens_without_positions(architecture: str) -> None:
    model, _ = models(architecture)
    input_ids, mask = pad([WORDS, WORDS[:6]], "left")
    _, past_key_values = in_chunks(model, input_ids, [14], attention_mask=mask, position_ids=positions_of(mask))
    past_key_values = model._reorder_cache(past_key_values, torch.tensor([1, 1, 0]))
    tail = torch.tensor([TWO_PATHS] * 3)
    whole = torch.cat([mask[[1, 1, 0]], torch.ones_like(tail)], dim=1)
    found = logits_of(model, tail, attention_mask=whole, past_key_values=past_key_values)
    for number, prompt in enumerate((WORDS[:6], WORDS[:6], WORDS)):
        assert difference(found[number], logits_of(model, row(prompt + TWO_PATHS))[0, len(prompt) :]) <= 1e-5


IDS = torch.tensor([tiny_ids("a b")])
#: Arguments that ask for a loop of transformers' own; whether `parallel=False` makes it work.
ASKING: dict[str, tuple[dict[str, Any], bool]] = {
    "num_beams": ({"num_beams": 2}, True),
    "num_beams, sampled": ({"num_beams": 2, "do_sample": True}, True),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 2}, True),
    "assistant_model": ({"assistant_model": tiny_model(num_hidden_layers=1)}, True),
    "assistant_early_exit": ({"assistant_early_exit": 1}, True),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, False),
    "dola_layers": ({"dola_layers": "low"}, False),
    "num_beam_groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, False),
    "force_words_ids": ({"num_beams": 2, "force_words_ids": [[30]]}, False),
    "use_mtp": ({"use_mtp": True}, False),
}


def unused(model: MultiverseForCausalLM) -> MultiverseForCausalLM:
    """Lets the first forward pass fail."""

    def fail(*_: Any) -> None:
        raise AssertionError("work was done before the arguments were looked at")

    model.model.register_forward_pre_hook(fail)
    return model


@pytest.mark.parametrize("name", list(ASKING))
def test_loop_that_cannot_fork_is_refused_by_name(name: str) -> None:
    options, works = ASKING[name]
    argument = name.split(",")[0]
    remedy = rf"Pass `parallel=False` .* leave `{argument}` out" if works else "Leave (it|`[a-z_]+`) out"
    with pytest.raises(ValueError, match=rf"^`{argument}` is .*{remedy}"):
        unused(tiny_model()).generate(IDS, max_new_tokens=5, **options)
    if works:
        assert tiny_model().generate(IDS, max_new_tokens=5, parallel=False, **options).shape[1] <= 7
    else:
        with pytest.raises(ValueError, match=rf"^`{argument}` is .*{remedy}"):
            unused(tiny_model()).generate(IDS, max_new_tokens=5, parallel=False, **options)


def test_loop_that_cannot_fork_is_refused_wherever_it_was_asked_for() -> None:
    model = unused(tiny_model())
    with pytest.raises(ValueError, match=r"`num_beams` is 3.*`parallel=False`"):
        model.generate(IDS, generation_config=GenerationConfig(num_beams=3, max_new_tokens=5))
    model.generation_config.prompt_lookup_num_tokens = 2
    with pytest.raises(ValueError, match=r"`prompt_lookup_num_tokens` is 2.*`parallel=False`"):
        model.generate(IDS, max_new_tokens=5)
    model.generation_config.parallel = False
    with pytest.raises(AssertionError, match="work was done"):
        model.generate(IDS, max_new_tokens=5)


@pytest.mark.parametrize("loop", ["num_beams", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize(
    ("name", "value"), [("seed", 3), ("max_path_tokens", 9), ("max_sequential_steps", 9), ("streamer", Watch())]
)
def test_what_only_the_engine_honours_is_refused_beside_another_loop(loop: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` is .*`{loop}`"):
        unused(tiny_model()).generate(IDS, max_new_tokens=5, parallel=False, **{loop: 2, name: value})


def test_setting_of_the_engine_is_taken_back_with_none() -> None:
    model = tiny_model()
    expected = model.generate(IDS, max_new_tokens=5, parallel=False, num_beams=2)
    model.generation_config.max_path_tokens = 9
    with pytest.raises(ValueError, match=r"^`max_path_tokens` is 9.*None"):
        model.generate(IDS, max_new_tokens=5, parallel=False, num_beams=2)
    found = model.generate(IDS, max_new_tokens=5, parallel=False, num_beams=2, max_path_tokens=None)
    assert found.tolist() == expected.tolist()


def test_ordinary_streamer_follows_prompt_lookup() -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    streamer = Collect()
    prompt = row(tiny_ids(PROMPTS["inside a later path"]))
    options = {"parallel": False, "prompt_lookup_num_tokens": 3, "max_new_tokens": 20}
    assert tiny_model().generate(prompt, **options, streamer=streamer)[0].tolist() == streamer.ids[:-1]
    assert streamer.ids[-1] == -1
