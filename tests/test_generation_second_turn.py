"""A second turn over `past_key_values`: the same tokens and logits as without, and only new tokens are run."""

import copy
from typing import Any

import pytest
import torch
from decoding import (
    FORK_AND_END,
    NESTED,
    PROMPTS,
    Boost,
    FailingCriterion,
    Follow,
    Say,
    Trouble,
    layout_of,
    padded,
    text_of,
)
from forward import row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multiverse.generation.cache import PathCache
from multiverse.masking_multiverse import CachedStructure
from scripted_requests import cuts
from strategies import Sample, shuffled, trees, truncated
from tiny import EOS, PAD, WORDS, from_strategy, goal, tiny_ids, tiny_model
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
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
    cut,
    next_turn,
    rows_of,
    talk,
)


@pytest.mark.parametrize("name", list(PROMPTS))
def test_second_and_third_turn_are_the_same_with_and_without_the_cache(name: str) -> None:
    number = list(PROMPTS).index(name)
    model = tiny_model(seed=number)
    cache = DynamicCache()
    turn = padded([tiny_ids(PROMPTS[name])])
    held = 0
    sizes = count_runs(model)
    for reply in (NEWS[number % len(NEWS)], NEWS[(number + 3) % len(NEWS)], ()):
        options = {"do_sample": number % 2 == 0, "max_new_tokens": 28, "max_path_tokens": 9}
        number += 1
        plain = talk(model, turn, FORK_AND_END, **options)
        sizes.clear()
        output = talk(model, turn, FORK_AND_END, **options, past_key_values=cache)
        assert output.past_key_values is cache
        # The last token of a text that has been cached whole is run again, since its logits are wanted.
        assert sizes[0] == turn["input_ids"].shape[1] - held
        assert sum(sizes) == output.sequences.shape[1] - held
        check_same(output, plain)
        assert check_rows(model, output, turn) > 0
        held = cache.get_seq_length()
        assert held == output.sequences.shape[1] - 1
        if reply:
            turn = next_turn(output, [reply])


@pytest.mark.parametrize("end", list(ENDS))
def test_turns_of_a_batch_are_the_same_with_and_without_the_cache(end: str) -> None:
    processor, options = ENDS[end]
    options = dict(options)
    model = tiny_model(seed=5)
    turn = padded([tiny_ids("b c d"), *ROWS])
    cache, held = DynamicCache(), torch.zeros(5, dtype=torch.long)
    sizes = count_runs(model)
    orders = ((0, 3, 1, 4, 2), (5, 0, 6, 2, 1), ())
    for number, order in enumerate(orders):
        # One path at a time, then greedily: what a turn leaves is the same to all ways of decoding.
        options |= {"parallel": number != 1, "do_sample": number != 2}
        replies = [NEWS[each] for each in order]
        if end == "slots":
            options["max_kv_slots"] = max(map(len, rows_of(turn))) + 25
        plain = talk(model, turn, processor, **options)
        sizes.clear()
        output = talk(model, turn, processor, **options, past_key_values=cache)
        real = output.branch_ids >= 0
        assert sum(sizes) == int((real.sum(dim=1) - held).sum())
        check_same(output, plain)
        check_rows(model, output, turn)
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        held = real[:, :-1].sum(dim=1)
        if replies:
            turn = next_turn(output, replies)
            assert len({len(each) for each in rows_of(turn)}) > 1
    reasons = {report.finish_reason for report in output.reports}
    wanted = {
        "end of sequence": "eos",
        "steps": "max_sequential_steps",
        "slots": "max_kv_slots",
        "criterion": "stopped",
    }
    assert wanted.get(end, "length") in reasons


@pytest.mark.parametrize(
    ("architecture", "dtype", "attention", "decode_attention"),
    [
        ("qwen2", torch.float64, "sdpa", "auto"),
        ("qwen3", torch.float64, "sdpa", "auto"),
        ("llama", torch.float64, "sdpa", "auto"),
        ("llama", torch.float32, "sdpa", "auto"),
        ("llama", torch.float64, "sdpa", "model"),
        ("llama", torch.float64, "eager", "auto"),
    ],
)
def test_second_turn_of_every_kind_of_model_has_the_logits_of_one_forward_pass(
    architecture: str, dtype: torch.dtype, attention: str, decode_attention: str
) -> None:
    model = tiny_model(architecture, dtype, attention=attention)
    options = {"decode_attention": decode_attention, "max_new_tokens": 45, "do_sample": True}
    turn, cache = padded(ROWS), DynamicCache(config=model.config)
    output = talk(model, turn, FORK_AND_END, **options, past_key_values=cache)
    turn = next_turn(output, NEWS[1:5])
    output = talk(model, turn, FORK_AND_END, **options, past_key_values=cache)
    assert check_rows(model, output, turn) >= 40
    assert sum(len(report.branches) > 2 for report in output.reports) >= 2, "there is little to see without forks"


def test_cache_is_taken_over_and_given_back_under_the_decode_kernel() -> None:
    model = tiny_model(dtype=torch.float32, num_hidden_layers=1)
    prompt, cache = tiny_ids(f"a {goal('bc')}"), DynamicCache()
    with torch.no_grad():
        model(row(prompt[:5]), past_key_values=cache)
    turn = padded([prompt])
    output = talk(model, turn, Boost(), decode_attention="path_decode", max_new_tokens=22, past_key_values=cache)
    assert check_rows(model, output, turn) >= 2
    check_forward(model, output, torch.tensor([NEWS[0]]))


@pytest.mark.parametrize("length", cuts(NESTED)[::19])
def test_script_is_followed_from_a_cache_of_any_length(length: int) -> None:
    """A script's answers depend on what the layout says is seen; the logits, on what the cache holds."""
    model = tiny_model()
    turn = padded([NESTED.ids[:length]])
    for cached in {1, length // 2, length} - {0}:
        cache = DynamicCache()
        with torch.no_grad():
            model(row(NESTED.ids[:cached]), past_key_values=cache)
        output = talk(model, turn, Follow(NESTED), max_new_tokens=300, past_key_values=cache)
        assert text_of(output) == NESTED.ids
        check_rows(model, output, turn)


@settings(deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(truncated(trees(60)) | shuffled(50), st.integers(0, 60), st.booleans(), st.booleans())
def test_text_of_any_kind_goes_on_from_a_cache_of_any_length(
    sample: Sample, cached: int, parallel: bool, by_generate: bool
) -> None:
    model = tiny_model()
    prompt = from_strategy(sample.ids) or tiny_ids("a")
    options = {"max_new_tokens": 60 + len(prompt), "max_path_tokens": 9, "parallel": parallel}
    turn, cache = padded([prompt]), DynamicCache()
    if by_generate:
        turn = next_turn(talk(model, turn, FORK_AND_END, **options, past_key_values=cache), [prompt])
    elif cached := cached % (len(prompt) + 1):
        with torch.no_grad():
            model(row(prompt[:cached]), past_key_values=cache)
    plain = talk(model, turn, FORK_AND_END, **options)
    output = talk(model, turn, FORK_AND_END, **options, past_key_values=cache)
    check_same(output, plain)
    check_rows(model, output, turn, whole=False)


@pytest.mark.parametrize("as_dict", [True, False])
def test_cache_that_is_passed_is_filled_in_place(as_dict: bool) -> None:
    model = tiny_model()
    # A mask that is left out follows from the padding, which must not be written then.
    options = {
        "max_new_tokens": 40,
        "suppress_tokens": [PAD],
        "logits_processor": LogitsProcessorList([FORK_AND_END]),
    }
    ids = row(ROWS[1])
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        output = model.generate(ids, past_key_values=cache, return_dict_in_generate=as_dict, **options)
        sequences = output.sequences if as_dict else output
        assert sequences.tolist() == model.generate(ids, **options).tolist()
        assert cache.get_seq_length() == sequences.shape[1] - 1
        longer = torch.cat([sequences, row(NEWS[3])], dim=1)
        again = model.generate(longer, past_key_values=cache, **options)
        assert again.tolist() == model.generate(longer, **options).tolist()
        assert cache.get_seq_length() == again.shape[1] - 1


def test_cache_that_is_returned_unasked_serves_a_second_turn() -> None:
    model = tiny_model()
    sizes = count_runs(model)
    for end in ("end of sequence", "inside blocks"):
        processor, options = ENDS[end]
        turn = padded(ROWS)
        sizes.clear()
        output = talk(model, turn, processor, **options)
        length = output.past_key_values.get_seq_length()
        # Without a wish for it nothing is run for its sake.
        assert sum(sizes) == sum(report.kv_slots for report in output.reports)
        assert turn["input_ids"].shape[1] <= length < output.sequences.shape[1]
        turn = next_turn(output, NEWS[:4])
        sizes.clear()
        again = talk(model, turn, processor, **options, past_key_values=output.past_key_values)
        assert sizes[0] == sum(map(len, rows_of(turn))) - int((output.branch_ids[:, :length] >= 0).sum())
        check_rows(model, again, turn)


@pytest.mark.parametrize("removed", [1, 9, 30])
@pytest.mark.parametrize("kind", ["tagged", "untagged"])
def test_cropped_cache_goes_on_with_the_same_and_with_other_text(kind: str, removed: int) -> None:
    model = tiny_model()
    rows = ROWS if kind == "tagged" else UNTAGGED
    processor = FORK_AND_END if kind == "tagged" else Boost(-50.0, 0.02)
    options = {"past_key_values": DynamicCache(), "do_sample": True, "temperature": 2.0}
    output = talk(model, padded(rows), processor, **options)
    cache = output.past_key_values
    cache.crop(-removed)
    length = output.sequences.shape[1] - 1 - removed
    assert cache.get_seq_length() == length
    whole = next_turn(output, [NEWS[0]] * len(rows))
    other = add(cut(whole, length), [NEWS[1 + number] for number in range(len(rows))])
    for turn in (whole, other):
        check_rows(model, talk(model, turn, FORK_AND_END, past_key_values=copy.deepcopy(cache)), turn)
    cropped = copy.copy(output)
    cropped.branch_ids = output.branch_ids[:, :length]
    check_forward(model, cropped, torch.tensor([NEWS[4]] * len(rows)))


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [0, 0, 2, 2, 1], [1], [3, 3, 3, 0, 3]], ids=str)
def test_rows_that_were_reordered_with_their_blocks_go_on(order: list[int]) -> None:
    model = tiny_model()
    output = talk(model, padded(ROWS), FORK_AND_END, past_key_values=DynamicCache())
    turn = next_turn(output, NEWS[:4])
    turn = {name: each[order] for name, each in turn.items()}
    cache = output.past_key_values
    CachedStructure.reorder(cache, torch.tensor(order))
    output = talk(model, turn, FORK_AND_END, past_key_values=cache)
    check_rows(model, output, turn)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS, UNTAGGED], ids=["one row", "four rows", "untagged"])
def test_repeated_cache_serves_several_sequences_for_every_row(rows: list[list[int]]) -> None:
    model = tiny_model()
    output = talk(model, padded(rows), FORK_AND_END, past_key_values=DynamicCache())
    turn = next_turn(output, NEWS[: len(rows)])
    options = {"do_sample": True, "num_return_sequences": 2}
    plain = talk(model, turn, FORK_AND_END, **options)
    cache = output.past_key_values
    cache.batch_repeat_interleave(2)
    output = talk(model, turn, FORK_AND_END, **options, past_key_values=cache)
    check_same(output, plain)
    turn = {name: each.repeat_interleave(2, dim=0) for name, each in turn.items()}
    check_rows(model, output, turn)
    assert len({tuple(each) for each in output.sequences.tolist()}) > len(rows)
    turn = next_turn(output, [NEWS[0]] * (2 * len(rows)))
    check_rows(model, talk(model, turn, FORK_AND_END, past_key_values=cache), turn)


def test_repeated_cache_of_untagged_rows_serves_forward_passes_in_which_a_block_opens() -> None:
    model = tiny_model()
    output = talk(model, padded(UNTAGGED), Boost(-50.0), past_key_values=DynamicCache(), eos_token_id=None)
    output.past_key_values.batch_repeat_interleave(2)
    output.sequences = output.sequences.repeat_interleave(2, dim=0)
    output.branch_ids = output.branch_ids.repeat_interleave(2, dim=0)
    check_forward(model, output, torch.tensor([NEWS[4]] * 6))


def test_cache_is_as_it_was_after_an_interrupted_turn() -> None:
    model = tiny_model()
    output = talk(model, padded(ROWS), FORK_AND_END, past_key_values=DynamicCache())
    cache, turn = output.past_key_values, next_turn(output, NEWS[:4])
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(Trouble) as caught:
        talk(
            model,
            turn,
            FORK_AND_END,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([FailingCriterion(30)]),
        )
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    # It holds the beginning of what was made until then.
    partial = next_turn(caught.value.partial_output, [NEWS[0]] * 4)
    check_rows(model, talk(model, partial, FORK_AND_END, past_key_values=cache), partial)


def test_text_that_is_cached_whole_goes_on_after_one_token() -> None:
    model = tiny_model()
    for prompt in ROWS:
        cache = DynamicCache()
        with torch.no_grad():
            model(row(prompt), past_key_values=cache)
        sizes = count_runs(model)
        turn = padded([prompt])
        output = talk(model, turn, FORK_AND_END, past_key_values=cache)
        assert sizes[0] == 1
        check_rows(model, output, turn)


def test_nothing_of_an_earlier_turn_is_copied_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    output = talk(model, padded(ROWS), FORK_AND_END, past_key_values=DynamicCache())
    caches: list[PathCache] = []
    plain_adopt = PathCache.adopt

    def adopt(cache: PathCache, *args: Any) -> None:
        plain_adopt(cache, *args)
        caches.append(cache)

    monkeypatch.setattr(PathCache, "adopt", adopt)
    turn = next_turn(output, NEWS[:4])
    talk(model, turn, FORK_AND_END, past_key_values=output.past_key_values)
    assert [cache.moved_slots for cache in caches] == [0]


def test_answer_goes_on_where_a_limit_cut_it() -> None:
    """Nothing new is said: the cut text, which was closed, goes on behind its block."""
    model = tiny_model()
    turn, cache = padded(ROWS), DynamicCache()
    options = {"max_new_tokens": 30, "suppress_tokens": [EOS]}
    for _ in range(3):
        output = talk(model, turn, Boost(), **options, past_key_values=cache)
        check_rows(model, output, turn)
        turn = {"input_ids": output.sequences, "attention_mask": (output.branch_ids >= 0).long()}


def test_words_behind_an_end_of_sequence_are_read_with_it() -> None:
    model = tiny_model()
    output = talk(model, padded([tiny_ids("a")]), Say("$"), past_key_values=DynamicCache())
    assert text_of(output) == [WORDS["a"], EOS]
    turn = next_turn(output, [NEWS[3]])
    again = talk(model, turn, FORK_AND_END, past_key_values=output.past_key_values)
    assert layout_of(text_of(again)).blocks[0].start == 3
    check_rows(model, again, turn)
