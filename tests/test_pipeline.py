"""`pipeline("text-generation")` gives what `generate()` gives: texts, chats, batches, and our own arguments."""

import logging
from pathlib import Path

import pytest
from cases import every_architecture
from decoding import Watch
from front_door import GOAL, answer, check_forked, front_door
from multiverse import BranchLayout, MultiverseForCausalLM
from transformers import AutoTokenizer, TextGenerationPipeline, pipeline

#: Of different lengths; all but the second are about to fork.
PROMPTS = [f"Sums. {GOAL}", "No block here", f"Two sums and their total. {GOAL}"]
CHAT = [{"role": "user", "content": "Add it up."}]
LONGER_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add up these two numbers."}]

GREEDY = {"do_sample": False, "max_new_tokens": 80}
#: Spread out, so that seeds matter.
SAMPLED = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 80}


@pytest.fixture(scope="module")
def door():
    return front_door()


@pytest.fixture
def pipe(door) -> TextGenerationPipeline:
    model, tokenizer = door
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


# --- Texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS, ids=["block", "no block", "longer"])
def test_string_is_continued(door, pipe, prompt: str) -> None:
    expected = answer(*door, prompt, **GREEDY)
    assert pipe(prompt, **GREEDY) == [{"generated_text": prompt + expected.text}]
    assert pipe(prompt, return_full_text=False, **GREEDY) == [{"generated_text": expected.text}]
    if prompt.endswith(GOAL):
        check_forked(expected.text)
        assert expected.report.sequential_steps < expected.report.generated_tokens
    else:
        assert "<Path>" not in expected.text


def test_nothing_is_sampled_from_an_empty_string(pipe) -> None:
    with pytest.raises(ValueError, match="`input_ids` is missing"):
        pipe("", **GREEDY)


@pytest.mark.parametrize("chat", [CHAT, LONGER_CHAT], ids=["short", "longer"])
def test_chat_gets_a_message_in_linear_order(door, pipe, chat: list) -> None:
    expected = answer(*door, chat, **GREEDY).text
    check_forked(expected)
    assert pipe(chat, **GREEDY) == [{"generated_text": [*chat, {"role": "assistant", "content": expected}]}]
    assert pipe(chat, return_full_text=False, **GREEDY) == [{"generated_text": expected}]


def test_message_that_ends_within_a_block_is_continued_there(door, pipe) -> None:
    begun = {"role": "assistant", "content": f"So: {GOAL}<Path>\n1: ab</Path>\n<Path>\n2: c"}
    (result,) = pipe([*CHAT, begun], **GREEDY)
    *kept, message = result["generated_text"]
    assert kept == CHAT
    prompt = f"<|im_start|>user\n{CHAT[0]['content']}<|im_end|><|im_start|>assistant\n{begun['content']}"
    expected = answer(*door, prompt, **GREEDY).text
    assert message == {"role": "assistant", "content": begun["content"] + expected}
    # The second path goes on, and no third one is opened.
    assert expected.split("</Path>")[0]
    assert expected.count("</Path>") == expected.count("<Conclusion>") == 1
    assert "<Path>" not in expected


# --- Batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_gives_what_its_prompts_give_alone(door, pipe, batch_size: int) -> None:
    _, tokenizer = door
    assert len({len(tokenizer.encode(prompt)) for prompt in PROMPTS}) == len(PROMPTS), "nothing would be padded"
    results = pipe(PROMPTS, batch_size=batch_size, **GREEDY)
    assert results == [[{"generated_text": prompt + answer(*door, prompt, **GREEDY).text}] for prompt in PROMPTS]


def test_batch_is_padded_on_the_left(door) -> None:
    model, tokenizer = door
    tokenizer.padding_side = "right"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    results = pipe(PROMPTS[:2], batch_size=2, return_tensors=True, **GREEDY)
    ids = [result[0]["generated_token_ids"] for result in results]
    lengths = [len(tokenizer.encode(prompt)) for prompt in PROMPTS[:2]]
    padding = lengths[0] - lengths[1]
    assert padding > 0
    assert ids[1][:padding] == [tokenizer.pad_token_id] * padding
    assert ids[1][padding : lengths[0]] == tokenizer.encode(PROMPTS[1])
    assert ids[0][: lengths[0]] == tokenizer.encode(PROMPTS[0])


def test_batch_of_chats(door, pipe) -> None:
    chats = [CHAT, LONGER_CHAT, CHAT]
    results = pipe(chats, batch_size=2, return_full_text=False, **GREEDY)
    assert results == [[{"generated_text": answer(*door, chat, **GREEDY).text}] for chat in chats]
    assert results[0] == results[2] != results[1]


# --- Arguments of `generate()` ---------------------------------------------------------------------------------------


def layout_of(door, result: list[dict]) -> BranchLayout:
    return BranchLayout.from_token_ids(result[0]["generated_token_ids"], door[0].config.multiverse_token_ids)


def new_ids(door, result: list[dict], prompt: str) -> list[int]:
    """Tokens behind the prompt, of a result with `return_tensors=True`."""
    length = len(door[1].encode(prompt))
    assert result[0]["generated_token_ids"][:length] == door[1].encode(prompt)
    return result[0]["generated_token_ids"][length:]


@pytest.mark.parametrize("most", [30, 47, 80])
def test_max_new_tokens_counts_all_branches(door, pipe, most: int) -> None:
    result = pipe(PROMPTS[0], do_sample=False, max_new_tokens=most, return_tensors=True)
    ids = new_ids(door, result, PROMPTS[0])
    assert len(ids) == most
    layout = layout_of(door, result)
    assert not layout.problems
    assert set(layout.branch_ids.tolist()) == {0, 1, 2}


def test_seed_repeats_a_sampled_text(door, pipe) -> None:
    texts = [pipe(PROMPTS[0], seed=seed, **SAMPLED)[0]["generated_text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == PROMPTS[0] + answer(*door, PROMPTS[0], seed=1, **SAMPLED).text
    check_forked(texts[0][len(PROMPTS[0]) :])


def test_seeds_count_over_the_rows_of_a_batch(pipe) -> None:
    alone = [pipe(prompt, seed=seed, **SAMPLED) for prompt, seed in zip(PROMPTS[:2], (7, 8), strict=True)]
    assert pipe(PROMPTS[:2], batch_size=2, seed=7, **SAMPLED) == alone
    assert pipe(PROMPTS[:2], batch_size=2, seed=[7, 8], **SAMPLED) == alone
    assert pipe(PROMPTS[:2], batch_size=2, seed=[8, 7], **SAMPLED) != alone


def test_several_sequences_of_a_prompt(pipe) -> None:
    results = pipe(PROMPTS[0], num_return_sequences=3, seed=5, **SAMPLED)
    assert results == [pipe(PROMPTS[0], seed=seed, **SAMPLED)[0] for seed in (5, 6, 7)]
    assert len({result["generated_text"] for result in results}) == 3


def steps_and_text(pipe: TextGenerationPipeline, **options) -> tuple[int, str]:
    watch = Watch()
    text = pipe(PROMPTS[0], streamer=watch, **GREEDY, **options)[0]["generated_text"]
    return len(watch.steps), text


def test_one_path_at_a_time_takes_more_steps_to_the_same_text(pipe) -> None:
    steps, text = steps_and_text(pipe, max_path_tokens=12)
    sequential_steps, sequential_text = steps_and_text(pipe, max_path_tokens=12, parallel=False)
    assert sequential_text == text
    check_forked(text[len(PROMPTS[0]) :])
    assert sequential_steps > steps


@pytest.mark.parametrize("most", [8, 13])
def test_max_path_tokens_closes_the_paths(door, pipe, most: int) -> None:
    result = pipe(PROMPTS[0], max_path_tokens=most, return_tensors=True, **GREEDY)
    layout = layout_of(door, result)
    lengths = [layout.branch_ids.tolist().count(branch) for branch in (1, 2)]
    # A path that holds this many tokens is closed, by one tag more; one may end of its own before.
    assert max(lengths) == most + 1


def test_arguments_of_the_constructor_hold_for_every_call_and_a_call_overrides_them(door) -> None:
    model, tokenizer = door
    options = {"max_path_tokens": 9, "parallel": False}
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **options)
    plain = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert steps_and_text(pipe) == steps_and_text(plain, **options)
    assert steps_and_text(pipe, parallel=True) == steps_and_text(plain, max_path_tokens=9)
    assert len({steps_and_text(plain, **each) for each in ({}, options, {"max_path_tokens": 9})}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallel": "no"}, "`parallel` must be True or False, got 'no'"),
        ({"max_path_tokens": 0}, "`max_path_tokens` must be a positive integer, got 0"),
        ({"seed": [1, 2]}, "`seed` holds 2 values for 1 rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(pipe, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **{**SAMPLED, **options})


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@every_architecture
def test_saved_checkpoint(tmp_path: Path, architecture: str) -> None:
    model, tokenizer = front_door(architecture)
    model.generation_config.max_path_tokens = 14
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=str(tmp_path))
    assert isinstance(pipe.model, MultiverseForCausalLM)
    assert type(pipe.model) is type(model)
    assert pipe.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    expected = answer(model, tokenizer, CHAT, **GREEDY).text
    check_forked(expected)
    assert pipe(CHAT, return_full_text=False, **GREEDY) == [{"generated_text": expected}]
    assert answer(model, tokenizer, CHAT, max_path_tokens=20, **GREEDY).text != expected, "the limit was not saved"


def test_model_counts_as_one_that_generates_text(door) -> None:
    model, tokenizer = door
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers.pipelines.base")
    logger.addHandler(handler)
    try:
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert not [record.getMessage() for record in records if "not supported" in record.getMessage()]
        pipe.check_model_type(["SomeOtherModel"])
        assert [record for record in records if "not supported" in record.getMessage()], "nothing would be seen"
    finally:
        logger.removeHandler(handler)
