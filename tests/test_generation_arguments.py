"""Arguments and configuration of `generate()`: what is refused by name, what is returned, how lengths count."""

from typing import Any

import pytest
import torch
from decoding import PROMPTS, TWO_PATHS, Boost
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tiny import TOKEN_IDS, tiny_ids, tiny_model
from transformers import GenerationConfig, LogitsProcessorList

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
    "beams": ({"input_ids": IDS, "num_beams": 2}, "`num_beams` is 2.*`parallel=False`"),
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
    "seed as text": ({"input_ids": IDS, "seed": "7"}, "`seed`"),
    "seeds of other rows": ({"input_ids": IDS, "seed": [7, 8, 9], "do_sample": True}, "`seed`"),
    "unknown decode attention": ({"input_ids": IDS, "decode_attention": "fast"}, "`decode_attention`"),
    "no depth": ({"input_ids": IDS, "max_depth": 0}, "`max_depth`"),
    "half a path at a time": ({"input_ids": IDS, "max_paths": 0.5}, "`max_paths`"),
    "no steps": ({"input_ids": IDS, "max_sequential_steps": 0}, "`max_sequential_steps`"),
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


def test_continuous_batching_is_refused_before_any_memory_is_taken() -> None:
    model = tiny_model()
    for start in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(ValueError, match="Continuous batching"):
            start([[1, 2, 3]])


@pytest.mark.parametrize("adapter", [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_of_peft_are_refused_not_left_out(adapter: type) -> None:
    model = tiny_model(dtype=torch.float32)
    tuned = get_peft_model(model, adapter(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prefix tuning"):
        tuned.generate(input_ids=IDS, attention_mask=ONES, max_new_tokens=5, do_sample=False)
    # Without its wrapper the model decodes again.
    assert model.generate(IDS, attention_mask=ONES, max_new_tokens=5, do_sample=False).shape[1] > IDS.shape[1]
