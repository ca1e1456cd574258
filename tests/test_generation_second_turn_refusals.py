"""`past_key_values` that cannot be what the text begins with is refused by name, and left as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding import GOAL, MIXED, PROMPTS, Boost, padded
from forward import fresh_models, in_chunks, positions_of, row
from multiverse import MultiverseForCausalLM
from tiny import EOS, PAD, TOKEN_IDS, tiny_ids, tiny_model
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer
from turns import NEWS, add, cut, next_turn, talk

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]
TAGGED = tiny_ids(f"a <Parallel> {GOAL} <Path> g h </Path> <Path> i")

Case = tuple[dict[str, Any], str]


def first_turn(model: MultiverseForCausalLM, **options: Any) -> Any:
    """A turn after which rows of different lengths are cached."""
    output = talk(model, padded(ROWS), Boost(4.0), max_new_tokens=25, **options, past_key_values=DynamicCache())
    assert not (output.branch_ids[:, -1] >= 0).all()
    return output


def followed(model: MultiverseForCausalLM) -> tuple[dict[str, torch.Tensor], DynamicCache]:
    output = first_turn(model)
    return dict(next_turn(output, [NEWS[0]] * len(ROWS))), output.past_key_values


def static(model: MultiverseForCausalLM, filled: bool) -> Case:
    cache = StaticCache(config=model.config, max_cache_len=200)
    if filled:
        with torch.no_grad():
            model(row(TAGGED), past_key_values=cache)
    return {
        "input_ids": row(TAGGED + NEWS[0]),
        "past_key_values": cache,
    }, "StaticLayer.*plain `DynamicCache`.*leave it"


class RoundedLayer(QuantizedLayer):
    """A quantised layer that needs no other package."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.round()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def quantised(model: MultiverseForCausalLM) -> Case:
    cache = Cache(layers=[RoundedLayer() for _ in range(model.config.num_hidden_layers)])
    with torch.no_grad():
        model(row(TAGGED), past_key_values=cache)
    return {
        "input_ids": row(TAGGED + NEWS[0]),
        "past_key_values": cache,
    }, "RoundedLayer.*plain `DynamicCache`.*leave it"


def sliding(model: MultiverseForCausalLM) -> Case:
    cache = Cache(layers=[DynamicSlidingWindowLayer(8) for _ in range(model.config.num_hidden_layers)])
    return {"input_ids": row(TAGGED), "past_key_values": cache}, "DynamicSlidingWindowLayer.*plain `DynamicCache`"


def fewer_rows(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    turn = {name: each[:3] for name, each in turn.items()}
    return {**turn, "past_key_values": cache}, "holds 4 rows, the call has 3 .*`batch_repeat_interleave`"


def more_sequences(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    options = {"num_return_sequences": 2, "do_sample": True}
    return {**turn, **options, "past_key_values": cache}, "holds 4 rows, the call has 8 .*`batch_repeat_interleave`"


def chosen_rows(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    cache.batch_select_indices(torch.tensor([0, 1, 2]))
    turn = {name: each[:3] for name, each in turn.items()}
    return {**turn, "past_key_values": cache}, "holds 3 rows, the structure .* 4.*`CachedStructure.reorder`"


def swapped_rows(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    order = torch.tensor([1, 0, 2, 3])
    cache.reorder_cache(order)
    turn = {name: each[order] for name, each in turn.items()}
    # The padding on the left tells them apart already.
    return {**turn, "past_key_values": cache}, "(`attention_mask`.*|differs.*)row 0, column"


def longer_than_the_text(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    length = cache.get_seq_length()
    given = cut(turn, length - 1)
    return {**given, "past_key_values": cache}, f"holds {length} tokens, `input_ids` only {length - 1}.*crop"


def new_tokens_alone(model: MultiverseForCausalLM) -> Case:
    _, cache = followed(model)
    length = cache.get_seq_length()
    return {"input_ids": row(NEWS[0]).repeat(4, 1), "past_key_values": cache}, f"holds {length} tokens.*whole text"


def other_text(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    turn["input_ids"] = turn["input_ids"].clone()
    column = turn["input_ids"].shape[1] - len(NEWS[0]) - 40
    before = int(turn["input_ids"][3, column])
    assert turn["attention_mask"][3, column] == 1
    after = tiny_ids("q")[0] if before != tiny_ids("q")[0] else tiny_ids("r")[0]
    turn["input_ids"][3, column] = after
    turn["input_ids"][3, column + 1 :] += 1
    return (
        {**turn, "past_key_values": cache},
        f"`input_ids` differs .* row 3, column {column}: {after} instead of {before}.*returned `sequences`",
    )


def padding_shown(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    cached = turn["attention_mask"][:, : cache.get_seq_length()]
    row_, column = (cached == 0).nonzero()[-1].tolist()
    turn["attention_mask"][row_, column] = 1
    return {
        **turn,
        "past_key_values": cache,
    }, f"`attention_mask` shows padding .* row {row_}, column {column}.*Give it 0"


def token_hidden(model: MultiverseForCausalLM) -> Case:
    turn, cache = followed(model)
    turn["attention_mask"][3, 5] = 0
    return {**turn, "past_key_values": cache}, "`attention_mask` hides a token .* row 3, column 5.*1 for all else"


def mask_left_out(model: MultiverseForCausalLM) -> Case:
    """Where a padding token may be text, as the end of sequence often is, transformers takes all for text."""
    turn, cache = followed(model)
    options = {"pad_token_id": PAD, "eos_token_id": [EOS, PAD]}
    ids = turn["input_ids"]
    return {"input_ids": ids, **options, "past_key_values": cache}, "`attention_mask` shows padding .* row 0, column 0"


def other_tags(model: MultiverseForCausalLM) -> Case:
    cache = DynamicCache()
    with torch.no_grad():
        model(row(TAGGED), past_key_values=cache)
    other = list(TAGGED)
    place = max(index for index, token_id in enumerate(other) if token_id == TOKEN_IDS["<Path>"])
    other[place] = TOKEN_IDS["<Conclusion>"]
    return {"input_ids": row(other + NEWS[0]), "past_key_values": cache}, "other tags than row 0.*leave the cache out"


def tags_where_none_were(model: MultiverseForCausalLM) -> Case:
    cache = DynamicCache()
    with torch.no_grad():
        model(row(tiny_ids("a b c d e f")), past_key_values=cache)
    return {"input_ids": row(TAGGED + NEWS[0]), "past_key_values": cache}, "other tags than row 0.*leave the cache out"


def tags_of_a_plain_model(model: MultiverseForCausalLM) -> Case:
    """It has read the blocks as plain text."""
    _, base = fresh_models("llama")
    cache = DynamicCache()
    with torch.no_grad():
        base(row(TAGGED), past_key_values=cache)
    return {"input_ids": row(TAGGED + NEWS[0]), "past_key_values": cache}, "other tags than row 0.*leave the cache out"


def mask_of_four_dimensions(model: MultiverseForCausalLM) -> Case:
    cache, count = DynamicCache(), len(TAGGED)
    mask = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
    with torch.no_grad():
        model(row(TAGGED), attention_mask=mask, position_ids=torch.arange(count)[None], past_key_values=cache)
    return {"input_ids": row(TAGGED + NEWS[0]), "past_key_values": cache}, "4D `attention_mask`.*Leave it out"


def positions_of_slots(model: MultiverseForCausalLM, tagged: bool) -> Case:
    """Left padding that was cached without `position_ids` counts as text in its positions."""
    given = padded([tiny_ids("a b c d e f"), tiny_ids("g h")])
    sizes = [6]
    if tagged:
        given, sizes = add(given, [TAGGED, TAGGED]), [6, len(TAGGED)]
    cache = DynamicCache()
    in_chunks(model, given["input_ids"], sizes, cache, attention_mask=given["attention_mask"])
    turn = add(given, [NEWS[1], NEWS[1]])
    return {**turn, "past_key_values": cache}, "goes on at position .* in row 1.*`position_ids` that leave padding out"


def other_padding(model: MultiverseForCausalLM) -> Case:
    """The rows were cached by a forward pass that saw one more token, as its positions tell."""
    given = padded([tiny_ids("a b c d e f"), tiny_ids("g h")])
    cache = DynamicCache()
    mask = given["attention_mask"]
    in_chunks(model, given["input_ids"], [6], cache, attention_mask=mask, position_ids=positions_of(mask))
    turn = add(given, [NEWS[0], NEWS[0]])
    turn["attention_mask"][1, 4] = 0
    return {**turn, "past_key_values": cache}, "goes on at position 2 in row 1, its tokens at 1.*`attention_mask`"


def beside_prompt_lookup(model: MultiverseForCausalLM) -> Case:
    cache = DynamicCache()
    with torch.no_grad():
        model(row(TAGGED), past_key_values=cache)
    options = {"parallel": False, "prompt_lookup_num_tokens": 3}
    message = f"holds {len(TAGGED)} tokens.*`prompt_lookup_num_tokens`.*empty cache"
    return {"input_ids": row(TAGGED + NEWS[0]), **options, "past_key_values": cache}, message


REFUSED: dict[str, Callable[[MultiverseForCausalLM], Case]] = {
    "static": lambda model: static(model, filled=True),
    "static and empty": lambda model: static(model, filled=False),
    "quantised": quantised,
    "sliding": sliding,
    "fewer rows": fewer_rows,
    "more sequences": more_sequences,
    "rows chosen unseen": chosen_rows,
    "rows swapped unseen": swapped_rows,
    "longer than the text": longer_than_the_text,
    "new tokens alone": new_tokens_alone,
    "other text": other_text,
    "padding shown": padding_shown,
    "token hidden": token_hidden,
    "mask left out": mask_left_out,
    "other tags": other_tags,
    "tags where none were": tags_where_none_were,
    "tags of a plain model": tags_of_a_plain_model,
    "mask of four dimensions": mask_of_four_dimensions,
    "positions of slots": lambda model: positions_of_slots(model, tagged=False),
    "positions of slots under tags": lambda model: positions_of_slots(model, tagged=True),
    "other padding": other_padding,
    "beside prompt lookup": beside_prompt_lookup,
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_cache_that_does_not_fit_is_refused_by_name(name: str) -> None:
    model = tiny_model()
    given, message = REFUSED[name](model)
    cache = given["past_key_values"]
    before = [None if layer.keys is None else layer.keys.clone() for layer in cache.layers]

    def fail(*_: Any) -> None:
        raise AssertionError("work was done before the cache was looked at")

    model.model.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match=rf"`past_key_values`.*{message}|{message}") as caught:
        model.generate(**given, max_new_tokens=30)
    assert "`past_key_values`" in str(caught.value)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert keys is None if layer.keys is None else torch.equal(layer.keys, keys)


def test_what_stands_behind_the_cached_tokens_may_differ() -> None:
    """The last token that was returned is not cached, and a mask may hide what follows."""
    model = tiny_model()
    turn, cache = followed(model)
    held = cache.get_seq_length()
    assert held == turn["input_ids"].shape[1] - len(NEWS[0]) - 1
    turn["input_ids"][:, held] = tiny_ids("q")[0]
    turn["attention_mask"][1, held] = 0
    assert model.generate(**turn, max_new_tokens=40, past_key_values=cache).shape[0] == len(ROWS)


def test_tags_before_the_first_block_mean_nothing_and_are_not_compared() -> None:
    model = tiny_model()
    prefix = tiny_ids("<Think> a </Think> b </Path> c")
    cache = DynamicCache()
    in_chunks(model, row(prefix + TAGGED), [len(prefix), len(TAGGED)], cache)
    turn = padded([prefix + TAGGED + NEWS[0]])
    assert cache.get_seq_length() == len(prefix) + len(TAGGED)
    found = talk(model, turn, Boost(), past_key_values=cache)
    assert found.sequences.tolist() == talk(model, turn, Boost()).sequences.tolist()
