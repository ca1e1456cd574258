"""Conversations of several calls of `generate()`: what a next turn is given, and what every output must satisfy."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cases import TOLERANCE
from decoding import FORK_AND_END, MIXED, PROMPTS, Boost, layout_of, padded
from forward import difference, pad, positions_of
from multiverse import MultiverseForCausalLM
from multiverse.generation.output import MultiverseGenerateOutput
from tiny import EOS, TOKEN_IDS, WORDS, tiny_ids
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

Given = Mapping[str, torch.Tensor]

#: What a user may say next: plain text, whole blocks, and texts that end inside one.
NEWS = tuple(
    tiny_ids(text)
    for text in (
        "x y z",
        "x",
        "x <Parallel> _ <Goal> _ <Outline> _ 1 : y _ </Outline> _ <Outline> _ 2 :",
        "x <Parallel> <Goal> <Outline> y </Outline> <Outline> z </Outline> </Goal> _",
        "x <Parallel> <Goal> <Outline> y </Outline> <Outline> z </Outline> </Goal> _ <Path> _ 1 : w",
        "x <Parallel> <Goal> <Outline> y </Outline> </Goal> <Path> z </Path> _ <Conclusion> w",
        "x <Parallel> <Goal> <Outline> y </Outline> </Goal> <Path> z </Path> <Conclusion> </Conclusion> </Parallel> w",
    )
)


def talk(
    model: MultiverseForCausalLM, given: Given, *processors: LogitsProcessor, **options: Any
) -> MultiverseGenerateOutput:
    """`generate()` with everything it can return; what is sampled repeats."""
    return model.generate(
        **given,
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 40, "seed": 0, **options},
    )


def next_turn(output: MultiverseGenerateOutput, news: Sequence[Sequence[int]]) -> Given:
    """What was returned, and behind it a new text for every row, with padding in between where rows differ."""
    tail = padded(news)
    real = (output.branch_ids >= 0).long()
    return {
        "input_ids": torch.cat([output.sequences, tail["input_ids"]], dim=1),
        "attention_mask": torch.cat([real, tail["attention_mask"]], dim=1),
    }


def add(given: Given, news: Sequence[Sequence[int]]) -> Given:
    """A text and what stands behind it, padded as in [`next_turn`]."""
    tail = padded(news)
    return {name: torch.cat([given[name], tail[name]], dim=1) for name in tail}


def cut(given: Given, length: int) -> Given:
    """The first columns."""
    return {name: each[:, :length] for name, each in given.items()}


def rows_of(given: Given) -> list[list[int]]:
    """Every row without its padding."""
    return [row[kept == 1].tolist() for row, kept in zip(given["input_ids"], given["attention_mask"], strict=True)]


def count_runs(model: MultiverseForCausalLM) -> list[int]:
    """Collects how many tokens each forward pass runs."""
    sizes: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return sizes


@torch.no_grad()
def check_rows(
    model: MultiverseForCausalLM, output: MultiverseGenerateOutput, given: Given, whole: bool = True
) -> int:
    """Every row against its layout and one forward pass, wherever its padding stands; returns the tokens compared.

    Args:
        whole (`bool`): whether what was given is sound, so that what is returned must be, too.
    """
    start = given["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :start], given["input_ids"])
    assert torch.equal(output.branch_ids[:, :start] >= 0, given["attention_mask"] == 1)
    compared = 0
    texts = rows_of({"input_ids": output.sequences, "attention_mask": (output.branch_ids >= 0).long()})
    input_ids, mask = pad(texts, "right")
    logits = model(input_ids=input_ids, attention_mask=mask).logits.double()
    for row, prompt in enumerate(rows_of(given)):
        real = output.branch_ids[row] >= 0
        ids, sampled = output.sequences[row, real], output.sampled[row, real]
        layout = layout_of(ids.tolist())
        assert output.branch_ids[row, real].tolist() == layout.branch_ids.tolist()
        assert output.position_ids[row, real].tolist() == layout.position_ids.tolist()
        assert not sampled[: len(prompt)].any()
        kinds = {problem.kind for problem in layout.problems}
        assert not (whole and kinds & {"stray close", "path outside a block", "unclosed block"})

        branches = layout.branch_ids.tolist()
        places = sampled.nonzero().flatten().tolist()
        before = [max(index for index in range(place) if branches[index] == branches[place]) for place in places]
        expected = logits[row, before]
        assert output.logits[row].shape[0] == len(places)
        if places:
            assert (output.logits[row].double() - expected).abs().max() <= TOLERANCE[model.dtype], f"row {row}"
            logprobs = expected.log_softmax(-1).gather(1, ids[places][:, None])[:, 0]
            # A log-probability is off by twice as much as its logits at most.
            difference = (output.logprobs[row, real][sampled] - logprobs).abs().max()
            assert difference <= 2 * TOLERANCE[model.dtype], f"row {row}"
        assert output.logprobs[row][~output.sampled[row]].isnan().all()

        report = output.reports[row]
        assert report.generated_tokens == len(ids) - len(prompt)
        assert report.generated_tokens == sum(branch.tokens for branch in report.branches)
        assert report.generated_tokens - report.forced_tokens == len(places)
        assert EOS not in ids[len(prompt) : -1]
        assert (report.finish_reason == "eos") == (ids[-1] == EOS and len(ids) > len(prompt))
        compared += len(places)
    return compared


def check_same(found: MultiverseGenerateOutput, expected: MultiverseGenerateOutput) -> None:
    """Two outputs tell the same."""
    for name in ("sequences", "sampled", "branch_ids", "position_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for one, other in zip(found.reports, expected.reports, strict=True):
        # All but the time they took.
        assert {**one.to_dict(), "seconds": {}} == {**other.to_dict(), "seconds": {}}


ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]
UNTAGGED = [tiny_ids(text) for text in ("a b c d e f g", "h i", "j k l m")]


class StopAfter(StoppingCriteria):
    """Ends the requests whose first token is a given word, once a branch sees many tokens."""

    def __init__(self, word: str, tokens: int) -> None:
        self.token_id, self.tokens = WORDS[word], tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return (input_ids[:, 0] == self.token_id) & (input_ids.shape[1] >= self.tokens)


#: How the turns of a batch end.
ENDS: dict[str, tuple[Boost, dict[str, Any]]] = {
    "end of sequence": (FORK_AND_END, {"max_new_tokens": 300, "max_path_tokens": 12}),
    "inside blocks": (Boost(4.0), {"max_new_tokens": 25, "max_path_tokens": 5}),
    "steps": (Boost(4.0), {"max_sequential_steps": 9}),
    "slots": (Boost(4.0), {"max_kv_slots": 95}),
    "criterion": (Boost(4.0), {"stopping_criteria": StoppingCriteriaList([StopAfter("a", 30)])}),
}


def check_forward(model, output, news: torch.Tensor, positions: bool = False) -> None:
    """The returned cache gives new tokens of `model.forward` the logits that they have without one.

    Args:
        news (`torch.LongTensor` of shape `(B, new)`): behind what the cache holds.
        positions (`bool`): whether to pass positions as `generate` of transformers makes them.
    """
    cache = copy.deepcopy(output.past_key_values)
    real = (output.branch_ids[:, : cache.get_seq_length()] >= 0).long()
    mask = torch.cat([real, torch.ones_like(news)], dim=1)
    with torch.no_grad():
        found = model(
            input_ids=news,
            attention_mask=mask,
            past_key_values=cache,
            position_ids=positions_of(mask)[:, -news.shape[1] :] if positions else None,
        ).logits
        texts = rows_of({"input_ids": output.sequences[:, : real.shape[1]], "attention_mask": real})
        texts = [ids + new for ids, new in zip(texts, news.tolist(), strict=True)]
        input_ids, whole_mask = pad(texts, "left")
        expected = model(input_ids, attention_mask=whole_mask, position_ids=positions_of(whole_mask)).logits
        assert difference(found, expected[:, -news.shape[1] :]) <= TOLERANCE[model.dtype]
    assert cache.get_seq_length() == real.shape[1] + news.shape[1]


def untagged_turn(model, prompts, **options):
    return talk(model, padded(prompts), suppress_tokens=list(TOKEN_IDS.values()), **options)
