"""Answers to held-out prompts that leave the training as it was, and the stop before a NaN reaches the weights."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from multiverse import BranchLayout
from multiverse.trainer.callbacks import HeldOutAnswers, StopOnNonFinite, undisturbed
from multiverse.trainer.metrics import watch
from multiverse.trainer.peft_support import add_tag_rows
from multiverse.trainer.recovery import find_complete_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training import fresh, sft_config, short_samples
from transformers import Trainer, TrainerCallback, set_seed
from trl import SFTTrainer
from watched_runs import losses, messages, tiny_trainer

ROWS = [{"prompt": messages(number), "number": number} for number in (5, 6, 7)]


def judge(text: str, row: dict) -> bool:
    """Uses up random numbers, as a judge may, and looks at the row."""
    random.random()
    np.random.rand()  # noqa: NPY002
    return row["number"] != 6


def answers(folder) -> list[dict]:
    """The lines that a callback has stored."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def generation_logs(trainer: Trainer) -> list[dict]:
    """The log entries of the answers."""
    return [entry for entry in trainer.state.log_history if "eval_generation_failed" in entry]


def trained(folder, model=None, callback: dict | None = None, **options) -> Trainer:
    """A finished run, with a `HeldOutAnswers` of the given arguments or without."""
    trainer = tiny_trainer(folder, model=model, **options)
    if callback is not None:
        trainer.add_callback(HeldOutAnswers(trainer, ROWS, judge, batch_size=2, max_new_tokens=24, **callback))
    trainer.train()
    return trainer


def adapted(folder):
    """A tiny model with an adapter that has dropout of its own."""
    model = tiny_trainer(folder).model
    torch.manual_seed(1)
    return get_peft_model(model, add_tag_rows(LoraConfig(r=4, lora_dropout=0.2), model))


@pytest.mark.parametrize("kind", ["plain", "bfloat16", "adapter and checkpointing"])
def test_the_losses_are_those_of_a_run_without_answers(kind, tmp_path):
    sampling = {"do_sample": True, "temperature": 2.0}
    options, callback = {"gradient_accumulation_steps": 2}, {"every": 1, "generation": sampling}
    models = [None] * 3
    if kind == "bfloat16":
        options = {"bf16": True}
    elif kind != "plain":
        options, callback = {"gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 1}, {}
        models = [adapted(tmp_path) for _ in range(3)]
    without = trained(tmp_path / "without", models[0], **options)
    having = trained(tmp_path / "with", models[1], callback, **options)
    assert losses(having) == losses(without)
    assert len(set(losses(without))) == 4
    for (name, weight), other in zip(
        having.model.state_dict().items(), without.model.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, other), name
    modes = [[module.training for module in trainer.model.modules()] for trainer in (having, without)]
    assert modes[0] == modes[1]
    assert having.model.config.to_dict() == without.model.config.to_dict()
    assert len(generation_logs(having)) == 4
    assert [record["row"] for record in answers(tmp_path / "with")] == [0, 1, 2] * 4
    assert {record["step"] for record in answers(tmp_path / "with")} == {1, 2, 3, 4}
    # The losses must depend on the random state, or all this shows nothing.
    other = tiny_trainer(tmp_path / "other", model=models[2], **options)
    torch.manual_seed(123)
    other.train()
    assert losses(other) != losses(without)


def test_answers_and_their_numbers_are_what_generate_gives(tmp_path):
    trainer = trained(tmp_path, callback={"every": 4})
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    made = []
    for record, row in zip(answers(tmp_path), ROWS, strict=True):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, max_new_tokens=24, use_cache=True, return_dict_in_generate=True)
        report, ids = output.reports[0], output.sequences[0]
        text = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        problems = BranchLayout.from_token_ids(ids, model.config.multiverse_token_ids).problems
        assert record == {
            "step": 4,
            "row": record["row"],
            "valid": report.finish_reason == "eos" and not problems,
            "problems": [str(problem) for problem in problems],
            "finish_reason": report.finish_reason,
            "generated_tokens": report.generated_tokens,
            "sequential_steps": report.sequential_steps,
            "text": text,
            "right": row["number"] != 6,
        }
        made.append(report)
    (logged,) = generation_logs(trainer)
    assert logged["step"] == 4
    assert logged["eval_generation_accuracy"] == pytest.approx(2 / 3)
    assert logged["eval_generation_tokens"] == pytest.approx(sum(r.generated_tokens for r in made) / 3)
    assert logged["eval_generation_steps"] == pytest.approx(sum(r.sequential_steps for r in made) / 3)
    assert logged["eval_generation_parallelism"] == pytest.approx(sum(r.degree_of_parallelism for r in made) / 3)
    # The log of the step itself is not lost, nor does it take the numbers over.
    assert len(losses(trainer)) == 4


def test_what_trl_gathers_for_its_own_log_stays_there(tmp_path):
    logs = []
    for every in (None, 1):
        model, tokenizer = fresh()
        config = sft_config(tmp_path / str(every), gradient_accumulation_steps=2, per_device_train_batch_size=2)
        trainer = SFTTrainer(model, config, train_dataset=short_samples(), processing_class=tokenizer)
        watch(trainer)
        if every is not None:
            trainer.add_callback(HeldOutAnswers(trainer, ROWS, every=every, max_new_tokens=4))
        trainer.train()
        own = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs.append([{name: entry[name] for name in entry if name != "tokens_per_second"} for entry in own])
        assert len(generation_logs(trainer)) == (0 if every is None else 2)
    assert logs[0] == logs[1]
    assert {"entropy", "mean_token_accuracy", "num_tokens", "loss_tags"} <= logs[0][1].keys()


WELL_FORMED = (
    "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal><Path>1: a</Path><Path>2: b</Path>"
    "<Conclusion>c</Conclusion></Parallel>"
)
ENDINGS = [(WELL_FORMED, "eos"), (WELL_FORMED, "length"), ("<Parallel><Path>1: a</Path></Parallel>", "eos")]


def test_valid_means_ended_and_without_a_problem(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    tokenizer = trainer.processing_class
    callback = HeldOutAnswers(trainer, ROWS, batch_size=3, every=1)

    def generate(input_ids, attention_mask, **arguments):
        rows = [tokenizer.encode(text, add_special_tokens=False) for text, _ in ENDINGS]
        width = max(map(len, rows))
        padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        reports = [
            SimpleNamespace(finish_reason=reason, generated_tokens=len(row), sequential_steps=10 + number)
            for number, (row, (_, reason)) in enumerate(zip(rows, ENDINGS, strict=True))
        ]
        return SimpleNamespace(sequences=torch.cat([input_ids, padded], dim=1), reports=reports)

    monkeypatch.setattr(trainer.model, "generate", generate, raising=False)
    trainer.add_callback(callback)
    trainer.train()
    records = answers(tmp_path)
    assert [record["valid"] for record in records] == [True, False, False]
    assert [record["text"] for record in records] == [text for text, _ in ENDINGS]
    assert [bool(record["problems"]) for record in records] == [False, False, True]
    assert "right" not in records[0]
    (logged,) = generation_logs(trainer)
    assert logged["eval_generation_valid"] == pytest.approx(1 / 3)
    assert logged["eval_generation_steps"] == 11
    assert "eval_generation_accuracy" not in logged


def test_an_evaluation_has_the_numbers_among_its_metrics(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="best",
        metric_for_best_model="eval_generation_accuracy",
        greater_is_better=True,
    )
    # Two datasets: one round of answers must do for both.
    trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
    trainer.add_callback(HeldOutAnswers(trainer, ROWS, judge, max_new_tokens=8))
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(2 / 3)
    assert trainer.state.best_global_step == 2
    assert [record["step"] for record in answers(tmp_path)] == [2, 2, 2, 4, 4, 4]


def test_a_failure_is_told_and_the_training_goes_on(tmp_path, caplog):
    def strict(text: str, row: dict) -> bool:
        if row["number"] == 7:
            raise KeyError("no such answer")
        return True

    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.add_callback(HeldOutAnswers(trainer, ROWS, strict, every=1, batch_size=2, max_new_tokens=8))
    trainer.train()
    assert len(losses(trainer)) == 2
    assert [("error" in record) for record in answers(tmp_path)] == [False, False, True] * 2
    assert answers(tmp_path)[2] == {"step": 1, "row": 2, "error": "KeyError: 'no such answer'"}
    assert [entry["eval_generation_failed"] for entry in generation_logs(trainer)] == [1, 1]
    assert [entry["eval_generation_accuracy"] for entry in generation_logs(trainer)] == [1, 1]
    warned = [record for record in caplog.records if "held-out" in record.getMessage()]
    assert len(warned) == 2
    assert warned[0].exc_info[0] is KeyError

    # Nothing works: there are no means to log, and no error either.
    broken = tiny_trainer(tmp_path / "broken", max_steps=1)
    generation = {"num_beams": 2}
    broken.add_callback(HeldOutAnswers(broken, ROWS, judge, every=1, generation=generation))
    broken.train()
    (logged,) = generation_logs(broken)
    assert logged["eval_generation_failed"] == 3
    assert set(logged) == {"eval_generation_failed", "epoch", "step"}


def test_every_kind_of_prompt_is_answered_after_its_last_question(tmp_path):
    trainer = tiny_trainer(tmp_path)
    tokenizer = trainer.processing_class
    conversation = messages(0)
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    answered = [*conversation, {"role": "assistant", "content": "an answer"}]
    rows = [{"prompt": conversation}, {"messages": answered}, {"messages": conversation}, {"prompt": text}]
    prompts = HeldOutAnswers(trainer, rows).prompts
    assert prompts == [tokenizer.encode(text, add_special_tokens=False)] * 4


def test_what_cannot_be_answered_is_named(tmp_path):
    trainer = tiny_trainer(tmp_path)
    for name in ("every", "batch_size", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"`{name}` must be a positive integer, got 0"):
            HeldOutAnswers(trainer, ROWS, **{name: 0})
    with pytest.raises(ValueError, match="`rows` is empty"):
        HeldOutAnswers(trainer, [])
    with pytest.raises(ValueError, match=r"`rows\[1\]`.*'question'"):
        HeldOutAnswers(trainer, [ROWS[0], {"question": "Why?"}])
    trainer.model.config.multiverse_token_ids = None
    with pytest.raises(ValueError, match="add_multiverse_tokens"):
        HeldOutAnswers(trainer, ROWS)
    trainer.processing_class = None
    with pytest.raises(ValueError, match=r"`trainer\.processing_class`"):
        HeldOutAnswers(trainer, ROWS)


def test_modes_and_random_states_are_put_back_after_an_error_too():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    model[1].eval()

    def draws() -> list[float]:
        return [torch.rand(()).item(), random.random(), float(np.random.rand())]  # noqa: NPY002

    def fail() -> None:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            draws()
            raise KeyError

    set_seed(0)
    expected = draws()
    set_seed(0)
    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert draws() == expected


class Poison(TrainerCallback):
    """Breaks one weight when the third step begins."""

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan


def test_a_broken_weight_stops_the_run_and_leaves_the_checkpoint(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        callbacks=[Poison()],
    )
    assert trainer.args.logging_nan_inf_filter
    trainer.add_callback(StopOnNonFinite(trainer))
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "at step 3: the loss is nan and the gradient norm nan" in message
    assert "learning rate 0.01" in message
    assert f"{tmp_path}/checkpoint-2, is intact" in message
    assert trainer.state.global_step == 2
    assert len(losses(trainer)) == 2
    assert find_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    # What the trainer makes of it by itself.
    alone = tiny_trainer(tmp_path / "alone", gradient_accumulation_steps=2, callbacks=[Poison()])
    alone.train()
    assert all(map(math.isfinite, losses(alone)))
    assert not all(weight.isfinite().all() for weight in alone.model.parameters())


def test_a_loss_over_no_label_stops_the_run_too(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train_dataset = [{**row, "labels": [-100] * len(row["labels"])} for row in trainer.train_dataset]
    trainer.add_callback(StopOnNonFinite(trainer))
    with pytest.raises(FloatingPointError, match=r"at step 1: the loss is nan.*No checkpoint has been written yet"):
        trainer.train()


class Steps:
    """A stand-in for a trainer that hands out losses and gradient norms, step by step."""

    def __init__(self, fp16: bool = False) -> None:
        self.args = SimpleNamespace(fp16=fp16, output_dir="nowhere", learning_rate=0.5)
        self.accelerator = SimpleNamespace(
            clip_grad_norm_=lambda: torch.tensor(self.norm), num_processes=1, device="cpu", process_index=0
        )
        self.loss = self.norm = 0.0
        self.made = 0

    def training_step(self) -> torch.Tensor:
        return torch.tensor(self.loss, requires_grad=True)

    def step(self, guard: StopOnNonFinite, loss: float, norm: float) -> None:
        self.loss, self.norm = loss, norm
        state = SimpleNamespace(global_step=self.made)
        guard.on_step_begin(self.args, state, None)
        for _ in range(2):
            self.training_step()
        self.accelerator.clip_grad_norm_()
        guard.on_pre_optimizer_step(self.args, state, None)
        self.made += 1


@pytest.mark.parametrize(("loss", "norm"), [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_either_number_alone_stops_the_run(loss, norm):
    steps = Steps()
    guard = StopOnNonFinite(steps)
    steps.step(guard, 1.0, 1.0)
    with pytest.raises(FloatingPointError, match="at step 2"):
        steps.step(guard, loss, norm)


def test_float16_may_overflow_while_its_scale_settles():
    steps = Steps(fp16=True)
    guard = StopOnNonFinite(steps)
    for _ in range(3):
        for _ in range(19):
            steps.step(guard, 1.0, math.inf)
        steps.step(guard, 1.0, 1.0)
    for _ in range(19):
        steps.step(guard, 1.0, math.nan)
    with pytest.raises(FloatingPointError, match="at step 80"):
        steps.step(guard, 1.0, math.inf)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        Steps.step(steps, StopOnNonFinite(steps), math.nan, 1.0)
