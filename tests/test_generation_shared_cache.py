"""One cache between `generate()`, forward passes of the model, and the loops of transformers."""

import copy

import pytest
import torch
from decoding import (
    FORK_AND_END,
    GOAL,
    PROMPTS,
    Boost,
    padded,
)
from forward import difference, in_chunks, positions_of, row
from multiverse.masking_multiverse import CachedStructure
from tiny import tiny_ids, tiny_model
from transformers import DynamicCache
from turns import (
    ENDS,
    NEWS,
    ROWS,
    UNTAGGED,
    add,
    check_forward,
    check_rows,
    check_same,
    count_runs,
    next_turn,
    rows_of,
    talk,
    untagged_turn,
)

PREFIXES = {
    "untagged": "a b c d e f g h",
    "tags without a block": "<Think> a b </Think> c </Goal> d",
    "after a block": PROMPTS["after a block"],
    "inside a path": PROMPTS["inside a later path"],
    "after a goal": PROMPTS["after a goal"],
}


@pytest.mark.parametrize("name", list(PREFIXES))
def test_prefix_that_a_forward_pass_has_cached_serves_many_questions(name: str) -> None:
    model = tiny_model()
    prefix = tiny_ids(PREFIXES[name])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        cache = model(row(prefix), past_key_values=cache).past_key_values
    sizes = count_runs(model)
    for question in (NEWS[0], NEWS[1], NEWS[3]) if name != "inside a path" else (NEWS[0], NEWS[1], NEWS[4]):
        turn = padded([prefix + question])
        sizes.clear()
        output = talk(model, turn, FORK_AND_END, past_key_values=copy.deepcopy(cache))
        assert sizes[0] == len(question)
        check_rows(model, output, turn, whole=name != "tags without a block")
    assert cache.get_seq_length() == len(prefix), "the copies are filled, not the cache itself"


@pytest.mark.parametrize("opening", [1, 2, 3], ids=["with the question", "in a second pass", "in a third pass"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_prefixes_that_forward_passes_have_cached_serve_a_batch(opening: int, attention: str) -> None:
    """Where the first passes were plain text, a block that opens later must not count the padding."""
    model = tiny_model(dtype=torch.float32, attention=attention)
    given = padded(UNTAGGED)
    tails = [padded([tiny_ids(f"x <Parallel> {GOAL} <Path> g")] * 3), padded([tiny_ids("h </Path> <Path> i")] * 3)]
    cache = DynamicCache()
    whole = given
    for tail in tails[: opening - 1]:
        whole = {key: torch.cat([whole[key], tail[key]], dim=1) for key in whole}
    in_chunks(
        model,
        whole["input_ids"],
        [7, *(tail["input_ids"].shape[1] for tail in tails[: opening - 1])],
        cache,
        attention_mask=whole["attention_mask"],
        position_ids=positions_of(whole["attention_mask"]),
    )
    turn = add(whole, [tiny_ids("y z"), tiny_ids("y"), tiny_ids("x y z")] if opening > 1 else NEWS[2:5])
    output = talk(model, turn, FORK_AND_END, past_key_values=cache)
    check_rows(model, output, turn)


def test_padding_of_a_cached_plain_prefix_is_not_seen_where_a_block_opens_behind_it() -> None:
    """Under attention that knows padding by its branch alone."""
    model = tiny_model(dtype=torch.float32, attention="multiverse")
    given, tail = padded(UNTAGGED), padded([tiny_ids(f"x <Parallel> {GOAL} <Path> g")] * 3)
    whole = {key: torch.cat([given[key], tail[key]], dim=1) for key in given}
    positions = positions_of(whole["attention_mask"])
    width = tail["input_ids"].shape[1]
    found, _ = in_chunks(model, whole["input_ids"], [7, width], DynamicCache(), whole["attention_mask"], positions)
    for number, ids in enumerate(rows_of(whole)):
        with torch.no_grad():
            expected = model(row(ids)).logits[0, -width:]
        assert difference(found[number, -width:], expected) <= 1e-4


@pytest.mark.parametrize("end", ["end of sequence", "inside blocks"])
@pytest.mark.parametrize("wanted", [True, False], ids=["given", "returned"])
def test_cache_serves_forward_passes(end: str, wanted: bool) -> None:
    processor, options = ENDS[end]
    model = tiny_model()
    more = {"past_key_values": DynamicCache()} if wanted else {}
    output = talk(model, padded(ROWS), processor, **options, **more)
    for reply in NEWS[2:5:2]:
        check_forward(model, output, torch.tensor([reply] * len(ROWS)))


@pytest.mark.parametrize("reply", [NEWS[0], NEWS[4]], ids=["plain", "block"])
def test_cache_of_untagged_rows_serves_forward_passes(reply: list[int]) -> None:
    model = tiny_model()
    news = torch.tensor([reply] * 3)
    # Rows of one length have the positions of their slots; so have padded ones where the caller says so.
    even = untagged_turn(model, [ids[:2] for ids in UNTAGGED], suppress_tokens_at_begin=None, eos_token_id=None)
    assert even.past_key_values.get_seq_length() > 30
    check_forward(model, even, news)
    uneven = untagged_turn(model, UNTAGGED, eos_token_id=None)
    check_forward(model, uneven, news, positions=True)
    # Padding behind a row that ended early, and a block that opens with no word on positions.
    ended = untagged_turn(model, UNTAGGED, past_key_values=DynamicCache(), do_sample=True, temperature=2.0)
    assert len({int(each.sum()) for each in ended.branch_ids >= 0}) > 1
    check_forward(model, ended, news, positions=True)
    check_forward(model, ended, torch.tensor([NEWS[4]] * 3))


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "untagged"])
def test_beams_go_on_from_the_cache(tagged: bool) -> None:
    model = tiny_model()
    turn = padded(ROWS if tagged else UNTAGGED)
    processor = Boost() if tagged else Boost(-50.0)
    output = talk(model, turn, processor, past_key_values=DynamicCache())
    turn = next_turn(output, NEWS[: len(turn["input_ids"])] if tagged else [NEWS[0]] * 3)
    options = {"num_beams": 2, "parallel": False, "seed": None, "max_new_tokens": 12}
    plain = talk(model, turn, processor, **options)
    repeated = torch.arange(len(turn["input_ids"])).repeat_interleave(2)
    CachedStructure.reorder(output.past_key_values, repeated)
    found = talk(model, turn, processor, **options, past_key_values=output.past_key_values)
    assert found.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("name", ["plain", "inside a later path", "inside a nested goal", "after a block"])
def test_cache_that_prompt_lookup_has_filled_serves_the_engine(name: str) -> None:
    model = tiny_model()
    turn, cache = padded([tiny_ids(PROMPTS[name])]), DynamicCache()
    stock = {"parallel": False, "prompt_lookup_num_tokens": 3, "seed": None, "max_new_tokens": 15}
    output = talk(model, turn, Boost(), **stock, past_key_values=cache)
    held = cache.get_seq_length()
    assert held >= turn["input_ids"].shape[1]
    # That loop writes one token after another and bans nothing: what it leaves need not be sound.
    ids = torch.cat([output.sequences, row(NEWS[0])], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = talk(model, turn, FORK_AND_END, max_new_tokens=90)
    sizes = count_runs(model)
    output = talk(model, turn, FORK_AND_END, max_new_tokens=90, past_key_values=cache)
    assert sizes[0] == ids.shape[1] - held
    check_same(output, plain)
    check_rows(model, output, turn, whole=False)
