"""What the training script is fed: both forms, both families, the user's columns; and what it refuses at once."""

import json
from pathlib import Path

import pytest
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.expression_trees import TreeOptions
from multiverse.trainer.sft import MultiverseScriptArguments, main
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from multiverse.trainer.training_data import DataArguments, load_data
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, TrlParser


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer()
    add_multiverse_tokens(MultiverseForCausalLM(tiny_config("llama", len(tokenizer))), tokenizer)
    return tokenizer


def columns_file(folder: Path, spoiled: int | None = None) -> str:
    """Four columns of six problems, as JSON lines; row `spoiled` leaves a block open."""
    rows = []
    for number, problem in enumerate(generate_problems(6, 3, ProblemOptions(terms=(2, 3)))):
        parallel = problem.parallel()
        if number == spoiled:
            parallel = parallel.replace("</Parallel>", "")
        row = {
            "ask": problem.question,
            "tree": parallel,
            "line": problem.sequential(),
            "end": f"It is {problem.answer}.",
        }
        rows.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def test_generated_trees_keep_to_their_options() -> None:
    arguments = DataArguments(
        synthetic_samples=20,
        synthetic_family="trees",
        synthetic_depth=[1, 2],
        synthetic_terms=[2, 3],
        synthetic_test_samples=5,
    )
    splits = load_data(arguments, seed=4)
    options = TreeOptions(depth=(1, 2), branching=(2, 2), terms=(2, 3), largest=20, repeats=False)
    held_out = {row["prompt"][-1]["content"] for row in splits["test"]}
    drawn = [row["prompt"][-1]["content"] for row in splits["train"]]
    expected = [problem.question for problem in generate_problems(40, 4, options)]
    assert len(drawn) == 20
    assert len(held_out) == 5
    assert not held_out & set(drawn)
    # The same stream of problems, less what is held out.
    assert drawn == [question for question in expected if question not in held_out][:20]


def test_generated_curriculum_has_both_forms_of_every_problem() -> None:
    arguments = DataArguments(synthetic_samples=4, synthetic_terms=[2, 3], synthetic_test_samples=2, curriculum=True)
    rows = load_data(arguments, seed=0)["train"]
    assert rows["form"] == ["sequential"] * 4 + ["parallel"] * 4
    for first, second in zip(rows.select(range(4)), rows.select(range(4, 8)), strict=True):
        assert first["pair"] == second["pair"]
        assert first["prompt"][-1] == second["prompt"][-1]
        assert "<Parallel>" in second["completion"][0]["content"]
        assert "<Parallel>" not in first["completion"][0]["content"]


@pytest.mark.parametrize("curriculum", [False, True])
def test_columns_of_the_users_own(curriculum: bool, tokenizer, tmp_path: Path) -> None:
    arguments = DataArguments(
        dataset_name=columns_file(tmp_path, spoiled=2),
        format_data=True,
        trajectory_columns=["ask", "tree", "line", "end"],
        dataset_form=None if curriculum else "parallel",
        curriculum=curriculum,
    )
    rows = load_data(arguments, 0, tokenizer)["train"]
    parallel = rows.filter(lambda row: row["form"] == "parallel")
    assert parallel["pair"] == [0, 1, 3, 4, 5], "the malformed sample is dropped"
    assert rows["form"].count("sequential") == (6 if curriculum else 0)
    arguments.malformed = "raise"
    with pytest.raises(ValueError, match="row 2"):
        load_data(arguments, 0, tokenizer)


def test_the_script_trains_by_the_curriculum(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = tiny_config("llama", vocabulary=len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "data").mkdir()
    arguments = [
        "--model_name_or_path", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "out"), "--dtype", "float32",
        "--dataset_name", columns_file(tmp_path / "data", spoiled=2), "--format_data", "true",
        "--trajectory_columns", "ask", "tree", "line", "end", "--curriculum", "true",
        "--curriculum_shares", "0.0", "1.0", "--num_train_epochs", "2", "--per_device_train_batch_size", "5",
        "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--save_strategy", "no",
        "--gradient_checkpointing", "false", "--max_length", "4096", "--logging_steps", "1", "--disable_tqdm", "true",
    ]  # fmt: skip
    parser = TrlParser((MultiverseScriptArguments, SFTConfig, ModelConfig))
    trainer = main(*parser.parse_args_and_config(arguments))
    # Five sound pairs, one visit each an epoch.
    assert trainer.state.global_step == 2
    assert trainer._get_train_sampler().shares == (0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "`dataset_name`"),
        ({"dataset_name": "x", "synthetic_samples": 3}, "`dataset_name`"),
        ({"dataset_name": "x", "curriculum": True}, "`curriculum`"),
        ({"dataset_name": "x", "format_data": True, "trajectory_columns": ["a"]}, "`trajectory_columns`"),
    ],
)
def test_refused_before_a_model_is_loaded(options: dict, name: str, tmp_path: Path) -> None:
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=name):
        main(MultiverseScriptArguments(**options), config, ModelConfig(model_name_or_path="not there"))
