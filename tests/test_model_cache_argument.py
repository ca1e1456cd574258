"""The argument that holds a cache: taken by the names that transformers takes, and never lost in silence."""

import functools
import re
from typing import Any

import pytest
import torch
from cases import TOLERANCE, both_modes, every_architecture
from decoding import FORK_AND_END, PROMPTS
from forward import NESTED, difference, fresh_models, logits_of, models, row
from multiverse.cache_argument import CACHE_ARGUMENT, cache_argument
from tiny import tiny_ids
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel

PROMPT = row(tiny_ids(PROMPTS["after a goal"]))
NEWS = row(tiny_ids("_ v w"))

every_name = pytest.mark.parametrize("name", ["cache", "past_key_values"])


def takes(base: PreTrainedModel, name: str) -> bool:
    """Whether a plain model of this transformers fills a cache that it is given under `name`."""
    cache = DynamicCache()
    logits_of(base, row(NESTED), **{name: cache})
    return cache.get_seq_length() == len(NESTED)


def talk(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Any:
    options = {"do_sample": False, "return_dict_in_generate": True, **options}
    options |= {"attention_mask": torch.ones_like(ids), "logits_processor": LogitsProcessorList([FORK_AND_END])}
    return model.generate(ids, max_new_tokens=60, **options)


@every_architecture
@every_name
def test_a_forward_pass_takes_a_cache_as_the_base_class_does_or_refuses_it(architecture: str, name: str) -> None:
    model, base = models(architecture)
    cut, cache = 20, DynamicCache()
    if not takes(base, name):
        with pytest.raises(ValueError, match=rf"`{name}` is a DynamicCache, .* Pass it as `{CACHE_ARGUMENT}`"):
            model(row(NESTED[:cut]), **{name: cache})
        return
    whole = logits_of(model, row(NESTED))
    parts = [logits_of(model, row(ids), **{name: cache}) for ids in (NESTED[:cut], NESTED[cut:])]
    assert difference(torch.cat(parts, dim=1), whole) <= TOLERANCE[model.dtype]
    assert cache.get_seq_length() == len(NESTED)


@both_modes
@every_name
def test_a_second_turn_takes_a_cache_as_the_base_class_does_or_refuses_it(parallel: bool, name: str) -> None:
    model, base = models("qwen3")
    cache = DynamicCache()
    if not takes(base, name):
        with pytest.raises(ValueError, match=rf"`{name}` is a DynamicCache, .* Pass it as `{CACHE_ARGUMENT}`"):
            talk(model, PROMPT, parallel=parallel, **{name: cache})
        return
    first = talk(model, PROMPT, parallel=parallel, **{name: cache})
    assert first.blocks[0]
    assert first.past_key_values is cache
    assert first[CACHE_ARGUMENT] is cache
    assert 0 < cache.get_seq_length() < first.sequences.shape[1]
    conversation = torch.cat([first.sequences, NEWS], dim=1)
    second = talk(model, conversation, parallel=parallel, **{name: cache})
    assert torch.equal(second.sequences, talk(model, conversation, parallel=parallel).sequences)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_decoding_uses_no_name_that_transformers_has_deprecated() -> None:
    model, _ = models("llama")
    first = talk(model, PROMPT, past_key_values=DynamicCache())
    conversation = torch.cat([first.sequences, NEWS], dim=1)
    talk(model, conversation, past_key_values=first[CACHE_ARGUMENT])
    talk(model, PROMPT, parallel=False, num_beams=2)


@pytest.mark.parametrize("name", ["kv", "past_key_value", "cache_params"])
def test_a_cache_under_a_name_that_nobody_takes_is_refused(name: str) -> None:
    model, _ = models("llama")
    for part in (model, model.model):
        with pytest.raises(ValueError, match=rf"`{name}` is a DynamicCache, .* Pass it as `{CACHE_ARGUMENT}`"):
            part(row(NESTED), **{name: DynamicCache()})
    with pytest.raises(ValueError, match=rf"`{name}` is a DynamicCache"):
        talk(model, PROMPT, **{name: DynamicCache()})


def test_two_caches_are_refused() -> None:
    model, base = models("llama")
    says = "is given twice" if takes(base, "cache") else f"`cache` is a DynamicCache, .* as `{CACHE_ARGUMENT}`"
    both = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    with pytest.raises(ValueError, match=says):
        model.model(row(NESTED), **both)
    with pytest.raises(ValueError, match=says):
        talk(model, PROMPT, **both)


@pytest.mark.parametrize("given", [(), [None], "dynamic"], ids=str)
def test_something_else_than_a_cache_is_refused(given: Any) -> None:
    model, _ = models("llama")
    says = re.escape(f"`past_key_values` is a {type(given).__name__}") + ".*DynamicCache"
    with pytest.raises(ValueError, match=says):
        model.model(row(NESTED), past_key_values=given)
    with pytest.raises(ValueError, match=says):
        talk(model, PROMPT, past_key_values=given)


@pytest.mark.parametrize("loop", [{}, {"parallel": False}, {"parallel": False, "num_beams": 2}], ids=str)
def test_generation_stops_where_its_cache_goes_by_another_name(loop: dict[str, Any]) -> None:
    """What a transformers that renames the argument once more would do."""
    model, _ = fresh_models("llama")
    stock = model.forward

    @functools.wraps(stock)
    def renaming(*arguments: Any, **kwargs: Any) -> Any:
        return stock(*arguments, memory=kwargs.pop(CACHE_ARGUMENT), **kwargs)

    model.forward = renaming
    with pytest.raises(ValueError, match=rf"`memory` is a \w+Cache, .* Pass it as `{CACHE_ARGUMENT}`"):
        talk(model, PROMPT, **loop)


@both_modes
def test_generation_stops_where_its_cache_is_dropped(parallel: bool) -> None:
    model, _ = fresh_models("llama")
    stock = model.forward

    @functools.wraps(stock)
    def dropping(*arguments: Any, **kwargs: Any) -> Any:
        return stock(*arguments, **{**kwargs, CACHE_ARGUMENT: None})

    model.forward = dropping
    with pytest.raises(ValueError, match=rf"`{CACHE_ARGUMENT}`, which `generate\(\)` has passed, did not arrive"):
        talk(model, PROMPT, parallel=parallel)


def test_the_name_is_one_that_all_functions_take() -> None:
    def old(input_ids=None, past_key_values=None): ...

    def new(input_ids=None, cache=None): ...

    def both(cache=None, past_key_values=None): ...

    def unknown(input_ids=None, memory=None, **kwargs): ...

    assert cache_argument(old) == cache_argument(old, both) == "past_key_values"
    assert cache_argument(new) == cache_argument(new, both) == cache_argument(both) == "cache"
    for functions in ((unknown,), (old, unknown), (old, new)):
        with pytest.raises(ValueError, match=rf"transformers .* is not supported: .*{functions[-1].__name__} take no"):
            cache_argument(*functions)
