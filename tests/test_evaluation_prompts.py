"""Prompts say what is published, and a batch of them is what each is alone."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from multiverse import TAGS
from multiverse.evaluation.prompts import chat_messages, published_prompts, render_prompt, render_prompts
from multiverse.evaluation.task_rows import Question
from multiverse.evaluation.tasks import Task, load_task
from multiverse.trainer.expression_trees import FAMILIES
from multiverse.trainer.synthetic import train_and_test
from tiny import tiny_model, tiny_tokenizer
from tokenizers import processors

TOKENIZER = tiny_tokenizer()
TOKENIZER.add_tokens(list(TAGS))

SUM = Question("a", "How much is 1+1?", "2", "math")
CHOICE = Question("b", "Which is even?", "B", "choice", ("one", "two", "three"))
SYSTEM = {"parallel": "Think step by step and in parallel.", "sequential": "Think step by step."}


def base_tokenizer():
    """Without a chat template, and as those of base models do, with a token at the beginning of every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("form", SYSTEM)
@pytest.mark.parametrize("family", FAMILIES)
def test_problems_of_the_families_are_asked_as_they_were_trained(family, form):
    _, held_out = train_and_test(0, 20, 1, test_options=FAMILIES[family]())
    asked = [chat_messages(question, form) for question in load_task(family, limit=20).questions]
    assert asked == [problem.messages(form)["prompt"] for problem in held_out]


@pytest.mark.parametrize("form", SYSTEM)
def test_questions_are_followed_by_options_and_by_the_form_of_the_answer(form):
    system = {"role": "system", "content": SYSTEM[form]}
    assert chat_messages(SUM, form) == [
        system,
        {"role": "user", "content": "How much is 1+1?\n\nPut your final answer within \\boxed{}."},
    ]
    content = "Which is even?\n\nA) one\nB) two\nC) three\n\nPut the letter of the right option within \\boxed{}."
    assert chat_messages(CHOICE, form) == [system, {"role": "user", "content": content}]


def test_instructions_take_the_place_of_the_usual_ones_by_form():
    own = {"parallel": "Be quick.", "sequential": ""}
    assert chat_messages(SUM, "parallel", own)[0] == {"role": "system", "content": "Be quick."}
    assert [message["role"] for message in chat_messages(SUM, "sequential", own)] == ["user"]
    assert chat_messages(SUM, "sequential", {"parallel": "Be quick."}) == chat_messages(SUM, "sequential")
    with pytest.raises(ValueError, match="`prompt` must be one of 'parallel', 'sequential', got 'both'"):
        chat_messages(SUM, "both")


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=5))
def test_a_row_of_a_batch_is_what_the_template_makes_of_it_alone(texts):
    conversations = [chat_messages(Question(text, text, "", "math"), "parallel") for text in texts]
    batch = render_prompts(TOKENIZER, conversations)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    longest = 0
    for ids, mask, conversation in zip(batch["input_ids"], batch["attention_mask"], conversations, strict=True):
        alone = TOKENIZER.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        padding = len(ids) - len(alone)
        assert ids.tolist() == [TOKENIZER.pad_token_id] * padding + alone
        assert mask.tolist() == [0] * padding + [1] * len(alone)
        longest = max(longest, len(alone))
    assert batch["input_ids"].shape == (len(texts), longest)
    assert render_prompt(TOKENIZER, conversations[0]).endswith("<|im_start|>assistant\n")


def test_a_batch_is_what_the_tokenizer_would_have_padded_itself():
    problems = load_task("trees", limit=6).questions
    conversations = [chat_messages(question, "parallel") for question in problems]
    batch = render_prompts(TOKENIZER, conversations)
    usual = TOKENIZER.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )
    assert all(torch.equal(batch[name], usual[name]) for name in ("input_ids", "attention_mask"))


def test_without_a_padding_token_another_stands_where_the_mask_is_zero():
    tokenizer = tiny_tokenizer()
    conversations = [chat_messages(question, "parallel") for question in (SUM, CHOICE)]
    expected = render_prompts(tokenizer, conversations)
    tokenizer.pad_token = None
    batch = render_prompts(tokenizer, conversations)
    assert tokenizer.pad_token is None, "the tokenizer is the caller's"
    mask = expected["attention_mask"]
    assert torch.equal(batch["attention_mask"], mask)
    assert torch.equal(batch["input_ids"] * mask, expected["input_ids"] * mask)
    assert set(batch["input_ids"][mask == 0].tolist()) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert set(render_prompts(tokenizer, conversations)["input_ids"][mask == 0].tolist()) == {0}


def test_a_batch_goes_into_generate():
    model = tiny_model(vocabulary=len(TOKENIZER))
    model.config.multiverse_token_ids = {tag: TOKENIZER.convert_tokens_to_ids(tag) for tag in TAGS}
    conversations = [chat_messages(question, "sequential") for question in (SUM, CHOICE)]
    batch = render_prompts(TOKENIZER, conversations)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, conversation in enumerate(conversations):
        alone = render_prompts(TOKENIZER, [conversation])
        made = model.generate(**alone, max_new_tokens=6, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert together[row, : len(made)].tolist() == made.tolist()


def test_base_models_are_asked_in_plain_text():
    tokenizer = base_tokenizer()
    messages = chat_messages(SUM, "sequential")
    text = render_prompt(tokenizer, messages)
    assert text == (
        "Think step by step.\n\nQuestion: How much is 1+1?\n\nPut your final answer within \\boxed{}.\nAnswer:"
    )
    assert render_prompt(tokenizer, messages[1:]) == text.removeprefix("Think step by step.\n\n")
    batch = render_prompts(tokenizer, [messages, messages[1:]])
    assert batch["input_ids"][0].tolist() == [tokenizer.bos_token_id, *TOKENIZER.encode(text)]
    assert batch["attention_mask"].sum(1).tolist() == [len(text) + 1 - 5, len(text) - 21 + 1 - 5], (
        "Answer is one token"
    )


def test_a_template_brings_its_special_tokens_itself():
    tokenizer = base_tokenizer()
    tokenizer.chat_template = TOKENIZER.chat_template
    ids = render_prompts(tokenizer, [chat_messages(SUM, "parallel")])["input_ids"][0].tolist()
    assert tokenizer.decode(ids) == render_prompt(tokenizer, chat_messages(SUM, "parallel"))


def test_a_template_that_writes_the_date_writes_the_same_one_every_day():
    tokenizer = tiny_tokenizer()
    # As in Llama 3.2.
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today Date: {{ date_string }}\n" + TOKENIZER.chat_template
    )
    text = render_prompt(tokenizer, chat_messages(SUM, "parallel"))
    assert text == "Today Date: 26 Jul 2024\n" + render_prompt(TOKENIZER, chat_messages(SUM, "parallel"))


def test_a_template_that_refuses_system_messages_comes_with_a_way_out():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + TOKENIZER.chat_template
    )
    with pytest.raises(ValueError, match=r"`tokenizer`: .*System role not supported.*\{'parallel': '', "):
        render_prompts(tokenizer, [chat_messages(SUM, "parallel")])
    without = chat_messages(SUM, "parallel", {"parallel": ""})
    assert render_prompt(tokenizer, without) == render_prompt(TOKENIZER, without)
    with pytest.raises(ValueError, match="`messages` is empty"):
        render_prompts(tokenizer, [])


@pytest.mark.parametrize("instructions", [None, {"parallel": "Be quick."}])
def test_what_is_published_is_what_was_asked_but_for_the_question(instructions):
    two = Question("c", "Which is odd?", "A", "choice", ("one", "two"))
    for questions in ((SUM,), (two, CHOICE, two), load_task("sums", limit=3).questions):
        task = Task("own", tuple(questions), "here")
        published = published_prompts(task, instructions, TOKENIZER)
        assert list(published) == ["parallel", "sequential"]
        for form, prompt in published.items():
            question = max(questions, key=lambda each: len(each.choices))
            filled = json.dumps(prompt["messages"])
            for placeholder, own in [
                ("question", question.text),
                *((f"option {letter}", each) for letter, each in zip("ABC", question.choices, strict=False)),
            ]:
                assert f"{{{placeholder}}}" in prompt["text"]
                filled = filled.replace(f"{{{placeholder}}}", json.dumps(own)[1:-1])
            assert json.loads(filled) == chat_messages(question, form, instructions)
            assert prompt["text"] == render_prompt(TOKENIZER, prompt["messages"])
            assert not any(each.text in prompt["text"] for each in questions)
    assert published_prompts(Task("own", (SUM,), "here"))["parallel"]["text"] is None
