"""Decoding without tags is that of the base class."""

from typing import Any

import pytest
import torch
from cases import every_architecture
from decoding import both_ways, padded
from multiverse import MultiverseForCausalLM
from tiny import EOS, TOKEN_IDS, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria


def plain_model(model: MultiverseForCausalLM, architecture: str) -> Any:
    """The base class with the same weights."""
    base = AutoModelForCausalLM.from_config(tiny_config(architecture)).to(model.dtype).eval()
    base.load_state_dict(model.state_dict())
    return base


UNTAGGED_OPTIONS = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}
SAMPLING_OPTIONS = {
    "plain": {"top_k": 0},
    "nucleus": {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
    "typical": {"typical_p": 0.8, "top_k": 0},
    "least probability": {"min_p": 0.02, "epsilon_cutoff": 0.001, "repetition_penalty": 1.2},
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
        rows = [each.generate(**given, max_new_tokens=25)[0].tolist() for each in (model, base)]
        assert rows[0] == rows[1]


@every_architecture
@pytest.mark.parametrize("name", list(SAMPLING_OPTIONS))
def test_untagged_tokens_are_drawn_from_the_scores_of_the_base_class(name: str, architecture: str) -> None:
    model = tiny_model(architecture)
    base = plain_model(model, architecture)
    ids = torch.tensor([tiny_ids("a b c d")])
    options = {
        **SAMPLING_OPTIONS[name],
        "do_sample": True,
        "suppress_tokens": list(TOKEN_IDS.values()),
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    output = model.generate(ids, **options, max_new_tokens=25, seed=3)
    assert output.sequences.shape[1] > 10
    for place, scores in enumerate(output.scores[0], start=ids.shape[1]):
        given = output.sequences[:, :place]
        mask = torch.ones_like(given)  # a padding token that was drawn is no padding
        expected = base.generate(given, attention_mask=mask, **options, max_new_tokens=1).scores[0][0]
        assert torch.equal(scores.isinf(), expected.isinf())
        assert torch.allclose(scores, expected, atol=1e-4, rtol=0)
        assert scores[output.sequences[0, place]] > -torch.inf


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
