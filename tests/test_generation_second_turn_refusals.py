"""A cache that cannot be what the text begins with is refused by name, before anything is run or changed."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import both_modes
from decoding import FORK_AND_END, GOAL, MIXED, PROMPTS, layout_of, padded
from forward import fresh_models, in_chunks, positions_of, row
from multiverse import MultiverseForCausalLM
from multiverse.masking_multiverse import CachedStructure
from tiny import EOS, PAD, WORDS, tiny_ids, tiny_model
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer
from turns import NEWS, check_rows, check_same, count_runs, next_turn, talk

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]
Turn = Mapping[str, torch.Tensor]
#: A block whose first path has begun.
GOAL_AND_PATH = f"a <Parallel> {GOAL} <Path> g h"


def first_turn(model: MultiverseForCausalLM) -> tuple[Cache, Turn]:
    """The cache of a turn of four rows, and what they are given next."""
    cache = DynamicCache()
    output = talk(model, padded(ROWS), FORK_AND_END, past_key_values=cache)
    return cache, next_turn(output, NEWS[:4])


def next_turn_of(given: Turn) -> Turn:
    """The rows with two words more."""
    news = torch.tensor([tiny_ids("x y")] * len(given["input_ids"]))
    return {
        "input_ids": torch.cat([given["input_ids"], news], dim=1),
        "attention_mask": torch.cat([given["attention_mask"], torch.ones_like(news)], dim=1),
    }


@torch.no_grad()
def prefilled(model: MultiverseForCausalLM, ids: torch.Tensor, **arguments: Any) -> Cache:
    """The cache of a forward pass, which keeps no token ids."""
    return model(ids, past_key_values=DynamicCache(), **arguments).past_key_values


def contents(cache: Cache) -> list[torch.Tensor]:
    return [each.clone() for layer in cache.layers for each in (layer.keys, layer.values)]


def check_refused(model: MultiverseForCausalLM, turn: Turn, cache: Cache, says: str, **options: Any) -> None:
    """A `ValueError` that names what is wrong, before a token is run; the cache stays as it was."""
    before, sizes = contents(cache), count_runs(model)
    with pytest.raises(ValueError, match=says) as caught:
        talk(model, turn, FORK_AND_END, past_key_values=cache, **options)
    assert not sizes
    # Nothing was made that an interrupted call would hand over.
    assert not hasattr(caught.value, "partial_output")
    assert all(torch.equal(one, other) for one, other in zip(contents(cache), before, strict=True))


@both_modes
def test_static_cache_is_refused_empty_or_filled(parallel: bool) -> None:
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=200)
    says = "`past_key_values` has layers of the kind StaticLayer"
    with pytest.raises(ValueError, match=says):
        talk(model, padded(ROWS[:1]), past_key_values=cache, parallel=parallel)
    with torch.no_grad():
        model(row(ROWS[1]), past_key_values=cache)
    check_refused(model, padded(ROWS[1:2]), cache, says, parallel=parallel)


def test_layer_that_forgets_is_refused_among_others_that_do_not() -> None:
    model = tiny_model()
    cache = prefilled(model, row(ROWS[0]))
    forgetful = DynamicSlidingWindowLayer(sliding_window=2)
    forgetful.update(cache.layers[1].keys, cache.layers[1].values)
    cache.layers[1] = forgetful
    check_refused(
        model,
        padded([ROWS[0] + NEWS[0]]),
        cache,
        "`past_key_values` has layers of the kind DynamicSlidingWindowLayer;",
    )


class RoundedLayer(QuantizedLayer):
    """A quantised layer that needs no other package."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.round()

    def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_quantised_cache_is_refused() -> None:
    model = tiny_model()
    cache = Cache(layers=[RoundedLayer() for _ in range(model.config.num_hidden_layers)])
    with torch.no_grad():
        model(row(ROWS[1]), past_key_values=cache)
    says = "`past_key_values` has layers of the kind RoundedLayer; .* plain `DynamicCache`"
    check_refused(model, padded([ROWS[1] + NEWS[0]]), cache, says)


def test_keys_and_values_in_tuples_are_refused() -> None:
    model = tiny_model()
    cache = prefilled(model, row(ROWS[0]))
    with pytest.raises(ValueError, match="past_key_values"):
        talk(model, padded([ROWS[0] + NEWS[0]]), past_key_values=tuple((e.keys, e.values) for e in cache.layers))


@pytest.mark.parametrize("kept", [[0], [0, 1, 2], [0, 1, 2, 3, 3]], ids=str)
def test_other_number_of_rows_is_refused(kept: list[int]) -> None:
    model = tiny_model()
    cache, turn = first_turn(model)
    chosen = {name: each[kept] for name, each in turn.items()}
    says = rf"`past_key_values` holds 4 rows, the call has {len(kept)} .*`batch_repeat_interleave`"
    check_refused(model, chosen, cache, says)


def test_several_sequences_for_a_row_need_as_many_rows_in_the_cache() -> None:
    model = tiny_model()
    cache, turn = first_turn(model)
    says = r"`past_key_values` holds 4 rows, the call has 8 \(`num_return_sequences` included\)"
    check_refused(model, turn, cache, says, num_return_sequences=2, do_sample=True)


def test_rows_that_were_chosen_without_their_blocks_are_refused() -> None:
    model = tiny_model()
    cache, turn = first_turn(model)
    # Methods of transformers, which know nothing of blocks.
    cache.batch_select_indices(torch.tensor([1, 2]))
    says = r"`past_key_values` holds 2 rows, the structure recorded with it 4.*`CachedStructure.reorder`"
    check_refused(model, {name: each[1:3] for name, each in turn.items()}, cache, says)
    cache, turn = first_turn(model)
    order = [3, 2, 1, 0]
    cache.reorder_cache(torch.tensor(order))
    check_refused(model, {name: each[order] for name, each in turn.items()}, cache, "`past_key_values`")


@both_modes
@pytest.mark.parametrize("by", ["generate", "forward"])
def test_cache_that_is_longer_than_the_text_is_refused(by: str, parallel: bool) -> None:
    model = tiny_model()
    prompt = ROWS[1]
    if by == "forward":
        cache = prefilled(model, row(prompt))
    else:
        cache = DynamicCache()
        prompt = talk(model, padded([prompt]), FORK_AND_END, past_key_values=cache).sequences[0].tolist()
    length = cache.get_seq_length()
    says = rf"`past_key_values` holds {length} tokens, `input_ids` only {length - 1}"
    check_refused(model, padded([prompt[: length - 1]]), cache, says, parallel=parallel)


def test_only_the_new_tokens_are_not_the_text() -> None:
    """What transformers' loops would take as well: the text must come whole."""
    model = tiny_model()
    cache, _ = first_turn(model)
    check_refused(model, padded(NEWS[:4]), cache, "`past_key_values` holds .* Pass the whole text")


@pytest.mark.parametrize("where", [0.0, 0.7, 1.0])
def test_first_token_that_differs_is_named(where: float) -> None:
    model = tiny_model()
    cache, turn = first_turn(model)
    ids, length = turn["input_ids"].clone(), cache.get_seq_length()
    real = turn["attention_mask"][:, :length] == 1
    places = [real[number].nonzero().flatten().tolist() for number in range(4)]
    changed = [(number, each[int(where * (len(each) - 1))]) for number, each in enumerate(places) if number in (1, 3)]
    for number, column in changed:
        ids[number, column] = (int(ids[number, column]) + 1) % PAD
    number, column = changed[0]
    old, new = int(turn["input_ids"][number, column]), int(ids[number, column])
    says = (
        rf"`input_ids` differs from the tokens of `past_key_values` at row {number}, column {column}: "
        rf"{new} instead of {old}\."
    )
    check_refused(model, {**turn, "input_ids": ids}, cache, says)
    # What stands in padding is nobody's token.
    ids = turn["input_ids"].masked_fill(turn["attention_mask"] == 0, WORDS["q"])
    output = talk(model, {**turn, "input_ids": ids}, FORK_AND_END, past_key_values=cache)
    check_rows(model, output, {**turn, "input_ids": ids})


def test_padding_must_stand_where_the_cache_has_it() -> None:
    model = tiny_model()
    cache, turn = first_turn(model)
    mask, length = turn["attention_mask"], cache.get_seq_length()
    hidden = mask.clone()
    column = int(mask[2].nonzero()[4])
    hidden[2, column] = 0
    says = rf"`attention_mask` hides a token of `past_key_values` at row 2, column {column}\."
    check_refused(model, {**turn, "attention_mask": hidden}, cache, says)
    shown = mask.clone()
    number, column = (mask[:, :length] == 0).nonzero()[0].tolist()
    shown[number, column] = 1
    says = rf"`attention_mask` shows padding of `past_key_values` at row {number}, column {column}\."
    check_refused(model, {**turn, "attention_mask": shown}, cache, says)


def test_mask_that_is_left_out_is_refused_where_padding_may_be_text() -> None:
    """With an end of sequence for padding, as is common, transformers takes every token for text."""
    model = tiny_model()
    cache, turn = first_turn(model)
    says = r"`attention_mask` shows padding of `past_key_values` at row 0, column 0\."
    given = {"input_ids": turn["input_ids"]}
    check_refused(model, given, cache, says, eos_token_id=[EOS, PAD])


def test_what_stands_behind_the_cached_tokens_may_differ() -> None:
    model = tiny_model()
    cache, turn = first_turn(model)
    held = cache.get_seq_length()
    ids, mask = turn["input_ids"].clone(), turn["attention_mask"].clone()
    ids[:, held:] = WORDS["q"]
    mask[1, held] = 0
    turn = {"input_ids": ids, "attention_mask": mask}
    check_rows(model, talk(model, turn, FORK_AND_END, past_key_values=cache), turn)


WHOLE = (
    "a <Parallel> <Goal> <Outline> b </Outline> </Goal> <Path> c </Path> <Conclusion> d </Conclusion> </Parallel> e"
)


@pytest.mark.parametrize(
    ("cached", "text"),
    [
        (WHOLE, WHOLE.replace("<Path>", "f")),
        (WHOLE.replace("<Path>", "f"), WHOLE),
        (WHOLE.replace("<Parallel>", "f"), WHOLE),
        (WHOLE, WHOLE.replace("<Parallel>", "f")),
        (WHOLE.replace("c </Path>", "</Path> c"), WHOLE),
        (WHOLE.replace("</Outline>", "</Goal>"), WHOLE),
    ],
)
def test_other_tags_are_refused(cached: str, text: str) -> None:
    """A forward pass leaves no ids, but the tags decide who sees whom."""
    model = tiny_model()
    cache = prefilled(model, torch.tensor([tiny_ids(WHOLE), tiny_ids(cached)]))
    turn = padded([tiny_ids(f"{WHOLE} x"), tiny_ids(f"{text} x")])
    says = "`past_key_values` was filled with other tags than row 1 of `input_ids` begins with"
    check_refused(model, turn, cache, says)


def test_blocks_that_a_plain_model_has_read_as_text_are_refused() -> None:
    _, base = fresh_models("llama")
    says = "`past_key_values` was filled with other tags than row 0 .* leave the cache out"
    check_refused(tiny_model(), padded([ROWS[1] + NEWS[0]]), prefilled(base, row(ROWS[1])), says)


def test_tags_before_the_first_block_mean_nothing_and_are_not_compared() -> None:
    """A pass without a block reads them as plain text."""
    model = tiny_model()
    before, block = tiny_ids("<Think> a </Think> b </Path> c"), tiny_ids(GOAL_AND_PATH)
    cache = DynamicCache()
    in_chunks(model, row(before + block), [len(before), len(block)], cache)
    turn = padded([before + block + NEWS[0]])
    check_same(talk(model, turn, FORK_AND_END, past_key_values=cache), talk(model, turn, FORK_AND_END))


@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("name", ["plain", "inside a later path"])
def test_cache_that_was_filled_under_a_mask_from_outside_is_refused(name: str, form: str) -> None:
    model = tiny_model()
    ids = tiny_ids(PROMPTS[name])
    layout = layout_of(ids)
    mask = layout.attention_mask()[None, None]
    if form == "additive":
        mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    cache = prefilled(model, row(ids), attention_mask=mask, position_ids=layout.position_ids[None])
    says = "`past_key_values` was filled under a 4D `attention_mask`"
    check_refused(model, padded([ids + NEWS[0]]), cache, says)
    cache.crop(-1)
    check_refused(model, padded([ids + NEWS[0]]), cache, says)


def test_positions_that_count_padding_are_refused() -> None:
    """transformers counts slots where it is told nothing, so a left-padded row of plain text stands too high."""
    model = tiny_model()
    rows = [tiny_ids("a b c d e"), tiny_ids("f g")]
    given = padded(rows)
    turn = next_turn_of(given)
    cache = prefilled(model, given["input_ids"], attention_mask=given["attention_mask"])
    says = (
        r"`past_key_values` goes on at position 5 in row 1, its tokens at 2\..*`position_ids` that leave padding out"
    )
    check_refused(model, turn, cache, says)
    positions = positions_of(given["attention_mask"])
    cache = prefilled(model, given["input_ids"], attention_mask=given["attention_mask"], position_ids=positions)
    output = talk(model, turn, FORK_AND_END, past_key_values=cache)
    check_same(output, talk(model, turn, FORK_AND_END))
    check_rows(model, output, turn)


@pytest.mark.parametrize("shift", [1, 7])
def test_positions_that_start_elsewhere_are_refused(shift: int) -> None:
    model = tiny_model()
    ids = tiny_ids("a b c d e")
    cache = prefilled(model, row(ids), position_ids=torch.arange(5)[None] + shift)
    says = rf"`past_key_values` goes on at position {5 + shift} in row 0, its tokens at 5\."
    check_refused(model, padded([ids + NEWS[0]]), cache, says)


def test_padding_that_was_run_as_text_is_refused_behind_a_block() -> None:
    model = tiny_model()
    rows = [tiny_ids(f"a b {GOAL_AND_PATH}"), tiny_ids(GOAL_AND_PATH)]
    given = padded(rows)
    cache = prefilled(model, given["input_ids"])
    check_refused(model, next_turn_of(given), cache, "`past_key_values` .* row 1 of `input_ids`")


def test_mask_that_hides_what_a_forward_pass_has_seen_is_refused() -> None:
    """Its positions tell that there was one token more."""
    model = tiny_model()
    given = padded([tiny_ids("a b c d e f"), tiny_ids("g h")])
    mask = given["attention_mask"]
    cache = prefilled(model, given["input_ids"], attention_mask=mask, position_ids=positions_of(mask))
    turn = next_turn_of(given)
    turn["attention_mask"][1, 4] = 0
    check_refused(model, turn, cache, r"goes on at position 2 in row 1, its tokens at 1\. .*`attention_mask`")


@pytest.mark.parametrize("cached", [1, 9])
def test_drafted_decoding_is_refused_beside_a_filled_cache(cached: int) -> None:
    """In transformers it runs the last tokens only, whatever the cache holds; plain models go wrong in silence."""
    model = tiny_model()
    cache = prefilled(model, row(ROWS[1][:cached]))
    options = {"parallel": False, "prompt_lookup_num_tokens": 3, "seed": None}
    says = rf"`past_key_values` holds {cached} tokens, .*`prompt_lookup_num_tokens`.* Pass an empty cache"
    check_refused(model, padded(ROWS[1:2]), cache, says, **options)


def test_cache_serves_on_after_a_refusal() -> None:
    model = tiny_model()
    cache, turn = first_turn(model)
    ids = turn["input_ids"].clone()
    ids[0, int(turn["attention_mask"][0].nonzero()[0])] = WORDS["q"]
    check_refused(model, {**turn, "input_ids": ids}, cache, "`input_ids` differs")
    output = talk(model, turn, FORK_AND_END, past_key_values=cache)
    check_same(output, talk(model, turn, FORK_AND_END))
    check_rows(model, output, turn)
    assert getattr(cache, CachedStructure.ATTRIBUTE).length == cache.get_seq_length()
