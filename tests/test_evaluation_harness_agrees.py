"""lm-evaluation-harness and our own runner, on the same questions: the same answers, and so the same accuracy."""

import json
from pathlib import Path

import pytest
from evaluated import settings_of, write_checkpoint, write_questions
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from multiverse.evaluation.lm_eval_model import MultiverseLM
from multiverse.evaluation.prompts import chat_messages, render_prompt
from multiverse.evaluation.runner import run
from multiverse.evaluation.tasks import TaskData, load_task
from transformers import AutoTokenizer

TASKS = Path(__file__).parent / "lm_eval_tasks"


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_the_harness_and_our_runner_agree(tmp_path, mode):
    model = write_checkpoint(tmp_path / "model")
    questions = write_questions(tmp_path / "questions.jsonl", model)
    records = run(settings_of(model, questions, modes=(mode,)), tmp_path / "run", show=False).records()
    tokenizer = AutoTokenizer.from_pretrained(model)
    task = load_task("own", TaskData(questions, kind="number"))
    rows = [
        {"prompt": render_prompt(tokenizer, chat_messages(each, "parallel")), "answer": each.expected}
        for each in task.questions
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    harness = MultiverseLM(str(model), device="cpu", batch_size=4, parallel=mode == "parallel", dtype="float64")
    metadata = {"prompts": str(tmp_path / "prompts.json")}
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load(["own_questions"])
    found = evaluate(harness, tasks, bootstrap_iters=0)
    for sample, record in zip(found["samples"]["own_questions"], records, strict=True):
        assert sample["resps"] == [[record["text"]]]
        # A text that was cut off states its answer no less; our runner does not count it, and the harness cannot tell.
        if record["finish_reason"] == "eos":
            assert sample["acc"] == record["right"]
    assert found["results"]["own_questions"]["acc,none"] == sum(each["right"] for each in records) / len(records)
    assert 0 < sum(each["right"] for each in records) < len(records)
    steps = {each["doc_id"]: each["sequential_steps"] for each in harness.records}
    assert [steps[number] for number in range(len(records))] == [each["sequential_steps"] for each in records]
