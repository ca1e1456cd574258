"""What is said of answers whose form is left to the model."""

import json

import pytest
from grpo_runs import fresh
from multiverse.trainer import choice_results
from multiverse.trainer.choice import CHOICE_PROBLEMS, free_messages
from multiverse.trainer.synthetic import generate_problems

LONGEST = 60


@pytest.fixture
def speaker():
    model, tokenizer = fresh()
    tokenizer.padding_side = "right"
    return model.eval(), tokenizer


def test_a_batch_is_answered_as_its_problems_are_one_by_one(speaker):
    """Whatever side the tokenizer pads by itself: prompts of a batch differ in length."""
    model, tokenizer = speaker
    problems = sorted(generate_problems(4, 0, CHOICE_PROBLEMS), key=lambda problem: len(problem.question))
    texts = [tokenizer.apply_chat_template(free_messages(each, "parallel")["prompt"]) for each in problems]
    assert len({len(text["input_ids"]) for text in texts}) > 1
    options = {"do_sample": False, "max_new_tokens": LONGEST, "sequence_bias": bias(model)}
    together = list(choice_results.answers(model, tokenizer, problems, **options))
    alone = [next(iter(choice_results.answers(model, tokenizer, [each], **options))) for each in problems]
    assert together == alone
    assert len({record["sequential_steps"] for record in together}) > 1, "or nothing is compared"
    assert any(record["forked"] for record in together)


def bias(model):
    """Makes a random model fork and end."""
    tags = [[[token_id], 4.0] for token_id in model.config.multiverse_token_ids.values()]
    return [*tags, [[model.config.eos_token_id], 3.0]]


def test_the_command_counts_what_it_kept(speaker, tmp_path, monkeypatch):
    monkeypatch.setattr(choice_results, "load_demo_model", lambda adapter, base: speaker)
    output = tmp_path / "kept" / "results.json"
    choice_results.answer(tmp_path, output, problems=3, seed=0, batch_size=2, max_new_tokens=LONGEST, base=None)
    results = json.loads(output.read_text())
    for name in ("greedy", "sampled"):
        assert results[name]["problems"] == 3
        assert results[name]["sequential_steps"] <= LONGEST
        parts = [results[name][form]["of"] for form in ("forked", "sequential") if form in results[name]]
        assert sum(parts) == 3
