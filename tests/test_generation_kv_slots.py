"""`max_kv_slots`: a request that would need more cache slots than it may hold is closed, well-formed, in time."""

import contextlib
import re
from collections.abc import Sequence

import pytest
from cases import both_modes
from decoding import (
    FORK_AND_END,
    MIXED,
    PROMPTS,
    Boost,
    check_parity,
    decode,
    layout_of,
    padded,
    real_tokens,
)
from hypothesis import given
from multiverse.generation.cache import PathCache
from multiverse.generation.output import MultiverseGenerateOutput
from scripted_requests import (
    PLENTY,
    budgets,
    check_finished,
    closed_problems,
    cut_prompts,
    examples,
    new_request,
    path_limits,
    picking,
    picks,
    play,
    rules,
    separators,
)
from tiny import EOS, tiny_ids, tiny_model
from transformers import DynamicCache
from turns import check_rows, check_same, count_runs, next_turn, talk

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]


def check_slots(output: MultiverseGenerateOutput, prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """No row has more tokens than slots, each is closed, and one that the limit ended says so; the rows' lengths."""
    lengths = []
    for row, report in enumerate(output.reports):
        ids = real_tokens(output, prompts, row)
        assert report.kv_slots <= len(ids) <= most, f"row {row}"
        assert not closed_problems(layout_of(ids)), f"row {row}"
        assert report.finish_reason in ("eos", "max_kv_slots")
        assert (report.finish_reason == "eos") == (ids[-1] == EOS)
        lengths.append(len(ids))
    return lengths


@pytest.mark.parametrize("name", list(PROMPTS))
def test_every_kind_of_prompt_is_closed_within_its_slots(name: str) -> None:
    model = tiny_model(seed=list(PROMPTS).index(name))
    prompt = tiny_ids(PROMPTS[name])
    sizes = count_runs(model)
    for room in (27, 45):
        most = len(prompt) + room
        sizes.clear()
        options = {"max_kv_slots": most, "max_new_tokens": 900, "do_sample": room == 45}
        output = decode(model, [prompt], Boost(4.0), **options, suppress_tokens=[EOS])
        assert output.reports[0].finish_reason == "max_kv_slots"
        # What is run takes a slot, and nothing else does.
        assert sum(sizes) == output.reports[0].kv_slots
        check_slots(output, [prompt], most)
        check_parity(model, output, [prompt])


@pytest.mark.parametrize("name", list(PROMPTS))
def test_least_number_of_slots_is_named_and_enough(name: str) -> None:
    model = tiny_model()
    prompt = tiny_ids(PROMPTS[name])
    says = (
        rf"`max_kv_slots` is 1, but a prompt of {len(prompt)} tokens .* need (\d+)\. Raise it, or shorten the prompt"
    )
    with pytest.raises(ValueError, match=says) as caught:
        decode(model, [prompt], max_kv_slots=1)
    found = re.search(says, str(caught.value))
    assert found is not None
    least = int(found[1])
    assert least > len(prompt)
    with pytest.raises(ValueError, match=rf"`max_kv_slots` is {least - 1}, .* need {least}\."):
        decode(model, [prompt], max_kv_slots=least - 1)
    output = decode(model, [prompt], Boost(), max_kv_slots=least)
    # What closes the prompt, to the last slot.
    assert check_slots(output, [prompt], least) == [least]


def test_one_row_of_a_batch_that_does_not_fit_is_enough() -> None:
    model = tiny_model()
    sizes = count_runs(model)
    most = max(map(len, ROWS))
    with pytest.raises(ValueError, match=rf"`max_kv_slots` is {most}, but a prompt of {most} tokens"):
        decode(model, ROWS, max_kv_slots=most)
    assert not sizes, "before anything is run"


def test_every_row_of_a_batch_has_as_many_slots() -> None:
    """Padding takes none: a row's own prompt counts."""
    model = tiny_model()
    prompts = [tiny_ids("a"), *ROWS]
    options = {"max_kv_slots": 90, "max_new_tokens": 900, "suppress_tokens": [EOS], "do_sample": True}
    output = decode(model, prompts, Boost(4.0), **options)
    lengths = check_slots(output, prompts, 90)
    check_parity(model, output, prompts)
    assert {report.finish_reason for report in output.reports} == {"max_kv_slots"}
    # A block is opened only where there is room to close it, so little is left of the budget.
    assert min(lengths) > 70
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], Boost(4.0), **options, seed=row)
        assert real_tokens(alone, [prompt], 0) == real_tokens(output, prompts, row)


@both_modes
@pytest.mark.parametrize("difference", [-9, -1, 1, 9])
def test_whichever_of_two_limits_is_reached_first_ends_the_request(difference: int, parallel: bool) -> None:
    model = tiny_model()
    for prompt in ROWS[1:3]:
        options = {"suppress_tokens": [EOS], "parallel": parallel}
        new = 40
        slots = len(prompt) + new + difference
        output = decode(model, [prompt], Boost(4.0), max_new_tokens=new, max_kv_slots=slots, **options)
        # The same as under the stricter one alone.
        alone = decode(model, [prompt], Boost(4.0), max_new_tokens=min(new, new + difference), **options)
        assert output.sequences.tolist() == alone.sequences.tolist()
        assert output.reports[0].finish_reason == ("length" if difference > 0 else "max_kv_slots")
        assert alone.reports[0].finish_reason == "length"


def test_other_limits_end_a_request_that_has_slots_left() -> None:
    model = tiny_model()
    output = decode(model, ROWS, Boost(4.0), max_kv_slots=300, max_new_tokens=900, max_sequential_steps=7)
    assert {report.finish_reason for report in output.reports} == {"max_sequential_steps"}
    options = {"max_new_tokens": 300, "do_sample": True, "max_path_tokens": 15}
    free = decode(model, ROWS, FORK_AND_END, **options)
    assert {report.finish_reason for report in free.reports} == {"eos"}
    output = decode(model, ROWS, FORK_AND_END, **options, max_kv_slots=600)
    assert output.sequences.tolist() == free.sequences.tolist()
    assert {report.finish_reason for report in output.reports} == {"eos"}


def test_limit_of_the_configuration_counts_and_the_call_may_change_it() -> None:
    model = tiny_model()
    model.generation_config.max_kv_slots = 40
    prompt = ROWS[0]
    options = {"suppress_tokens": [EOS], "max_new_tokens": 60}
    check_slots(decode(model, [prompt], Boost(), **options), [prompt], 40)
    check_slots(decode(model, [prompt], Boost(), **options, max_kv_slots=30), [prompt], 30)
    output = decode(model, [prompt], Boost(), **options, max_kv_slots=None)
    assert output.reports[0].finish_reason == "length"


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "9"])
def test_what_is_no_number_of_slots_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="`max_kv_slots` must be a positive integer"):
        decode(tiny_model(), ROWS, max_kv_slots=value)


def test_what_an_earlier_turn_has_left_counts() -> None:
    model = tiny_model()
    cache = DynamicCache()
    options = {"suppress_tokens": [EOS], "max_new_tokens": 300}
    first = talk(model, padded(ROWS[1:2]), Boost(4.0), **{**options, "max_new_tokens": 40}, past_key_values=cache)
    turn = next_turn(first, [tiny_ids("x y")])
    most = turn["input_ids"].shape[1] + 25
    plain = talk(model, turn, Boost(4.0), **options, max_kv_slots=most)
    output = talk(model, turn, Boost(4.0), **options, max_kv_slots=most, past_key_values=cache)
    check_same(output, plain)
    check_rows(model, output, turn)
    assert output.reports[0].finish_reason == "max_kv_slots"
    assert cache.get_seq_length() < output.sequences.shape[1] <= most
    # The conversation is as long as it may be.
    turn = next_turn(output, [tiny_ids("x")])
    with pytest.raises(ValueError, match=f"`max_kv_slots` is {most}"):
        talk(model, turn, Boost(4.0), **options, max_kv_slots=most, past_key_values=cache)


@both_modes
@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "not wanted"])
def test_cache_itself_never_holds_more(wanted: bool, parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where slots are given out; a cache that is wanted back is run to its last token."""
    held: dict[int, int] = {}
    plain_reserve = PathCache.reserve

    def reserve(cache: PathCache, new: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        moves = plain_reserve(cache, new)
        for number, region in enumerate(cache.regions):
            held[number] = max(region.length, held.get(number, 0))
        return moves

    monkeypatch.setattr(PathCache, "reserve", reserve)
    for seed, most in enumerate((84, 101)):
        model = tiny_model(seed=seed)
        given = padded(ROWS)
        held.clear()
        more = {"past_key_values": DynamicCache()} if wanted else {}
        options = {"max_new_tokens": 300, "max_kv_slots": most, "parallel": parallel, "do_sample": True}
        output = talk(model, given, Boost(4.0), **options, **more)
        check_rows(model, output, given)
        lengths = check_slots(output, ROWS, most)
        assert list(held.values()) == (lengths if wanted else [report.kv_slots for report in output.reports])


@pytest.mark.parametrize("loop", ["num_beams", "prompt_lookup_num_tokens"])
def test_limit_is_refused_beside_a_loop_that_does_not_honour_it(loop: str) -> None:
    options = {"parallel": False, "seed": None, loop: 2, "max_kv_slots": 50}
    with pytest.raises(ValueError, match=rf"^`max_kv_slots` is 50.*`{loop}`"):
        talk(tiny_model(), padded(ROWS[:1]), **options)


@examples(60)
@given(cut_prompts, budgets, budgets, path_limits, separators, picks)
def test_random_requests_stay_within_their_slots(
    prompt: list[int], room: int, new: int, path_limit: int | None, separator: list[int], numbers: list[int]
) -> None:
    most = len(prompt) + room
    limits = rules(PLENTY if new > 75 else new, separator, max_path_tokens=path_limit, max_kv_slots=most)
    request = None
    with contextlib.suppress(ValueError):
        request = new_request(prompt, limits)
    # Too small a budget is refused, and no other.
    whole = new_request(prompt, rules(PLENTY, separator))
    least = max(whole.made + whole.closing_cost, 1)
    assert (request is None) == (min(room, limits.max_new_tokens) < least)
    if request is None:
        return
    play(request, picking(numbers))
    layout = check_finished(request)
    assert len(layout) <= most
    assert request.finish_reason in ("eos", "length", "max_kv_slots")
    if request.finish_reason == "max_kv_slots":
        assert room < limits.max_new_tokens
    if request.finish_reason == "length":
        assert limits.max_new_tokens <= room
