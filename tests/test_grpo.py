"""Reinforcement learning for real: advantages, the script, an adapter that goes on, and the choice of form."""

import json
from pathlib import Path

import pytest
import torch
from cases import quick_collection  # noqa: F401
from datasets import Dataset
from grpo_runs import MIXED, fresh, grpo_config, recomputed, rollouts, trained_tokens, with_adapter, word_trainer
from multiverse import MultiverseForCausalLM
from multiverse.trainer.choice import CHOICE_PROBLEMS, FREE_PROMPT, mixture, rollout_row, write_mixture
from multiverse.trainer.choice_results import answers, by_form, run_log
from multiverse.trainer.grpo import GRPOScriptArguments, build_trainer, check_arguments, main, train_tag_rows_only
from multiverse.trainer.recovery import resume_option
from multiverse.trainer.rewards import AccelerationReward, AnswerReward, FormatReward
from multiverse.trainer.sft import load_model_and_tokenizer
from multiverse.trainer.synthetic import generate_problems
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, ModelConfig, TrlParser

pytestmark = pytest.mark.usefixtures("quick_collection")  # trainers collect at the start of every run


def test_advantages_are_centred_in_the_group_and_not_scaled(tmp_path: Path) -> None:
    answer = AnswerReward(judge=lambda text, expected: len(text) % 2 == expected)
    functions = [answer, FormatReward(), AccelerationReward(answer)]
    given: list[list[float]] = []

    def recording(function):
        def reward(**columns):
            given.append(function(**columns))
            return given[-1]

        return reward

    weights = [1.0, 0.2, 0.6]
    trainer = word_trainer(
        tmp_path,
        MIXED,
        rewards=[recording(function) for function in functions],
        columns={"answer": 1, "reference_steps": 60},
        reward_weights=weights,
    )
    inputs = rollouts(trainer)
    values = torch.tensor(given, dtype=torch.float64)
    assert (values[0] == 1).any()
    assert values[2].unique().numel() > 2
    totals = (torch.tensor(weights, dtype=torch.float64)[:, None] * values).sum(dim=0)
    groups = totals.view(-1, 2)
    expected = (groups - groups.mean(dim=1, keepdim=True)).flatten()
    torch.testing.assert_close(inputs["advantages"].double(), expected, atol=1e-6, rtol=0)


def script_arguments(folder: Path, model: Path, token_ids: dict[str, int], eos: int, *more: str) -> list[str]:
    """Command line of a short run on synthetic problems."""
    bias = [[[token_id], 3.0] for token_id in token_ids.values()] + [[[eos], 2.0], [[token_ids["<Parallel>"]], 6.0]]
    return [
        "--model_name_or_path", str(model), "--dtype", "float32", "--output_dir", str(folder),
        "--synthetic_samples", "6", "--synthetic_test_samples", "2", "--synthetic_paths", "2", "2",
        "--synthetic_terms", "2", "3", "--scale_rewards", "none", "--num_generations", "2",
        "--per_device_train_batch_size", "4", "--max_completion_length", "40", "--max_steps", "2",
        "--learning_rate", "1e-2", "--use_cpu", "true", "--bf16", "false", "--report_to", "none",
        "--gradient_checkpointing", "false", "--disable_tqdm", "true", "--logging_steps", "1",
        "--save_strategy", "steps", "--save_steps", "1", "--generation_kwargs", json.dumps({"sequence_bias": bias}),
        *more,
    ]  # fmt: skip


def test_the_script_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    model, tokenizer = fresh("qwen3")
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    arguments = script_arguments(
        tmp_path / "out", tmp_path / "start", model.config.multiverse_token_ids, tokenizer.eos_token_id,
        "--eval_strategy", "steps", "--eval_steps", "2", "--per_device_eval_batch_size", "4",
    )  # fmt: skip
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
    trainer = main(*parser.parse_args_and_config(arguments))
    assert trainer.state.global_step == 2
    history = trainer.state.log_history
    logged = [entry for entry in history if "fork_share" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    for entry in logged:
        assert entry["fork_share"] > 0
        assert 1 < entry["degree_of_parallelism"] <= 40
        assert 0 <= entry["rewards/format/mean"] <= 1
        assert 0 <= entry["rewards/acceleration/mean"] <= entry["rewards/answer/mean"] <= 1
        assert 0 < entry["sequential_steps"] <= 41
    (evaluated,) = [entry for entry in history if "eval_fork_share" in entry]
    assert evaluated["eval_sequential_steps"] > 0
    trained = trainer.model.state_dict()
    saved, _ = load_model_and_tokenizer(str(tmp_path / "out"))
    assert all(torch.equal(weight, trained[name]) for name, weight in saved.state_dict().items())

    # The same command goes on by itself, and trains nothing where all is done.
    again = main(*parser.parse_args_and_config(arguments))
    assert (again.state.global_step, again.is_in_train) == (2, False)
    assert [entry["step"] for entry in again.state.log_history if "fork_share" in entry] == [1, 2]
    resumed = main(*parser.parse_args_and_config([*arguments, "--max_steps", "3"]))
    assert [entry["step"] for entry in resumed.state.log_history if "fork_share" in entry] == [1, 2, 3]
    anew = main(*parser.parse_args_and_config([*arguments, "--auto_resume", "false", "--max_steps", "1"]))
    assert [entry["step"] for entry in anew.state.log_history if "fork_share" in entry] == [1]


@pytest.mark.parametrize(
    ("value", "by_itself", "expected"),
    [
        (None, True, True), (None, False, False), ("true", False, True), (True, False, True),
        ("False", True, False), ("runs/checkpoint-3", False, "runs/checkpoint-3"),
    ],
)  # fmt: skip
def test_what_a_run_resumes_from(value, by_itself: bool, expected) -> None:
    assert resume_option(value, by_itself) == expected


def test_a_step_makes_better_completions_likelier(tmp_path: Path) -> None:
    trainer = word_trainer(tmp_path, MIXED, tiny_model(dtype=torch.float32), learning_rate=1e-3, max_steps=1)
    kept: list[dict[str, torch.Tensor]] = []
    prepare = trainer._generate_and_score_completions
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}

    def keep(inputs):
        kept.append(prepare(inputs))
        kept.append({"log_probabilities": recomputed(trainer, kept[0])})
        return kept[0]

    trainer._generate_and_score_completions = keep
    trainer.train()
    inputs, start = kept
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    gained = (recomputed(trainer, inputs) - start["log_probabilities"]) * trained_tokens(inputs)
    assert (gained.sum(dim=1) * inputs["advantages"]).sum() > 0


def write_start(folder: Path) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerFast, PeftModel]:
    """A base in `start` and an adapter over it in `adapter`."""
    model, tokenizer = fresh()
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    adapter = with_adapter(model)
    adapter.save_pretrained(folder / "adapter")
    return model, tokenizer, adapter


def test_the_script_goes_on_with_an_adapter_and_keeps_it_as_reference(tmp_path: Path) -> None:
    model, tokenizer, adapter = write_start(tmp_path)
    arguments = script_arguments(
        tmp_path / "out", tmp_path / "start", model.config.multiverse_token_ids, tokenizer.eos_token_id,
        "--adapter_path", str(tmp_path / "adapter"), "--beta", "0.1", "--save_strategy", "no", "--max_steps", "1",
        "--gradient_checkpointing", "true",
    )  # fmt: skip
    parser = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig))
    script, config, model_config = parser.parse_args_and_config(arguments)
    loaded, tokenizer = load_model_and_tokenizer(str(tmp_path / "start"))
    rows = [rollout_row(problem, "free", tokenizer) for problem in generate_problems(2, 0, CHOICE_PROBLEMS)]
    dataset = {"train": Dataset.from_list(rows)}
    trainer = build_trainer(loaded, tokenizer, dataset, script, config, model_config)
    trainer.current_gradient_accumulation_steps = 1
    with torch.no_grad():
        ids = torch.tensor([tokenizer.encode("<Parallel><Goal>Answer")])
        torch.testing.assert_close(trainer.model(ids).logits, adapter(ids).logits, atol=1e-5, rtol=0)
    inputs = rollouts(trainer)
    torch.testing.assert_close(inputs["ref_per_token_logps"], recomputed(trainer, inputs), atol=1e-5, rtol=0)

    trained = main(script, config, model_config)
    assert trained.state.global_step == 1
    assert trained.state.log_history[0]["fork_share"] > 0
    base, _ = load_model_and_tokenizer(str(tmp_path / "start"))
    reloaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, trained.model.eval()(ids).logits, atol=1e-5, rtol=0)


def test_only_the_rows_of_the_tags_are_trained_where_that_is_asked_for(tmp_path: Path) -> None:
    model, tokenizer, adapter = write_start(tmp_path)
    before = {name: weight.clone() for name, weight in adapter.named_parameters()}
    arguments = script_arguments(
        tmp_path / "out", tmp_path / "start", model.config.multiverse_token_ids, tokenizer.eos_token_id,
        "--adapter_path", str(tmp_path / "adapter"), "--tag_rows_only", "true", "--save_strategy", "no",
        "--max_steps", "2",
    )  # fmt: skip
    script, config, model_config = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config(
        arguments
    )
    loaded, tokenizer = load_model_and_tokenizer(str(tmp_path / "start"))
    rows = [rollout_row(problem, "free", tokenizer) for problem in generate_problems(4, 0, CHOICE_PROBLEMS)]
    dataset = {"train": Dataset.from_list(rows)}
    answer = AnswerReward(judge=lambda text, expected: len(text) % 2 == 0)
    trainer = build_trainer(loaded, tokenizer, dataset, script, config, model_config, answer)
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all("trainable_tokens_delta" in name for name in changed)


def test_bad_script_arguments_are_named(tmp_path: Path) -> None:
    config = grpo_config(tmp_path, 2)
    with pytest.raises(ValueError, match="`dataset_name`"):
        check_arguments(GRPOScriptArguments(), config)
    with pytest.raises(ValueError, match="`synthetic_first`"):
        check_arguments(GRPOScriptArguments(synthetic_samples=1, synthetic_first=-1), config)
    with pytest.raises(ValueError, match="`scale_rewards`"):
        main(GRPOScriptArguments(synthetic_samples=1), grpo_config(tmp_path, 2, scale_rewards="group"), ModelConfig())
    with pytest.raises(ValueError, match="`tag_rows_only`"):
        check_arguments(GRPOScriptArguments(synthetic_samples=1, tag_rows_only=True), config)
    plain = get_peft_model(fresh()[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`tag_rows_only`: the adapter trains no rows"):
        train_tag_rows_only(plain)
    check_arguments(GRPOScriptArguments(synthetic_samples=1), config)
    assert config.reward_weights == [1.0, 0.1, 0.5]


def test_reference_without_branches_is_refused(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    dataset = {"train": Dataset.from_list([{"prompt": "a", "answer": 1, "reference_steps": 9}])}
    config = grpo_config(tmp_path, 2, beta=0.1)
    with pytest.raises(ValueError, match="`beta`"):
        build_trainer(model, tokenizer, dataset, GRPOScriptArguments(), config, ModelConfig())


def test_choice_shows_both_forms_under_one_prompt(tmp_path: Path) -> None:
    problems = generate_problems(10, 0, CHOICE_PROBLEMS)
    rows = mixture(problems, 0.3, seed=1)
    assert rows == mixture(problems, 0.3, seed=1) != mixture(problems, 0.3, seed=2)
    forms = []
    for problem, row in zip(problems, rows, strict=True):
        assert row["prompt"] == [
            {"role": "system", "content": FREE_PROMPT},
            {"role": "user", "content": problem.question},
        ]
        forms.append(row["completion"][0]["content"] == problem.parallel())
        assert forms[-1] or row["completion"][0]["content"] == problem.sequential()
    assert sum(forms) == 3

    write_mixture(tmp_path / "data", samples=4, parallel_share=0.5, held_out=2, seed=0)
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    assert sum("<Parallel>" in line for line in lines) == 2 == len(lines) - 2

    _, tokenizer = fresh()
    problem = problems[0]
    free = rollout_row(problem, "free", tokenizer)
    assert free["prompt"] == rows[0]["prompt"]
    assert free["reference_steps"] == len(tokenizer.encode(problem.sequential())) + 1
    assert "wants_block" not in free
    for form in ("parallel", "sequential"):
        asked = rollout_row(problem, form, tokenizer)
        assert asked["prompt"] == problem.messages(form)["prompt"]
        assert asked["wants_block"] == (form == "parallel")
    with pytest.raises(ValueError, match="`prompt`"):
        rollout_row(problem, "both", tokenizer)
    with pytest.raises(ValueError, match="`parallel_share`"):
        mixture(problems, 1.2)


def test_results_say_what_was_chosen_and_how_often_it_was_right(tmp_path: Path) -> None:
    model, tokenizer = fresh()
    problems = generate_problems(2, 0, CHOICE_PROBLEMS)
    bias = [[[model.config.multiverse_token_ids["<Parallel>"]], 99.0]]
    records = list(answers(model, tokenizer, problems, max_new_tokens=30, sequence_bias=bias, seed=0))
    assert [record["forked"] for record in records] == [True, True]
    assert [record["valid"] for record in records] == [False, False], "a limit has closed them"
    assert all(0 < record["sequential_steps"] < record["generated_tokens"] <= 30 for record in records)

    given = [{"forked": row < 4, "right": row in (0, 1, 2, 7)} for row in range(10)]
    summary = by_form(given)
    assert summary["fork_share"] == 0.4
    assert (summary["forked"]["right"], summary["forked"]["of"]) == (3, 4)
    assert (summary["sequential"]["right"], summary["sequential"]["of"]) == (1, 6)
    assert "sequential" not in by_form(given[:4])


def test_log_of_a_run_is_that_of_its_newest_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`run`"):
        run_log(tmp_path)
    entry = {"fork_share": 0.5, "sequential_steps": 9.0, "degree_of_parallelism": 2.0, "rewards/answer/mean": 1.0}
    for steps in (9, 10):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        history = [{**entry, "step": step, "loss": 0.1} for step in range(1, steps + 1)] + [{"train_loss": 0.1}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert run_log(tmp_path) == [{"step": step, **entry} for step in range(1, 11)]
