"""The synthetic dataset: right answers, sound structure, nothing that models are tested with, ready for training."""

import json
import math
import operator
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset
from multiverse import TAGS, BranchLayout
from multiverse.cli import app
from multiverse.curator.output import COLUMNS, DATA_FILE, TWIN
from multiverse.curator.rendering import sequential_twin
from multiverse.curator.synthetic_data import (
    HELD_OUT_PROBLEMS,
    HELD_OUT_SEEDS,
    held_out_questions,
    synthetic_records,
    write_synthetic,
)
from multiverse.trainer import transfer
from multiverse.trainer.choice import CHOICE_PROBLEMS
from multiverse.trainer.expression_trees import TreeOptions
from multiverse.trainer.sft import MultiverseScriptArguments, main
from multiverse.trainer.synthetic import read_answer, train_and_test
from multiverse.trainer.training_data import load_data
from tiny import tiny_config, tiny_tokenizer
from training import fresh, losses
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, TrlParser
from typer.testing import CliRunner

ROWS = 1000
_TAG = re.compile("|".join(map(re.escape, TAGS)))
_IDS = {tag: number for number, tag in enumerate(TAGS)}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As the command writes it by default."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    done = CliRunner().invoke(app, ["curate", "synthetic", str(folder)])
    assert done.exit_code == 0, done.output
    assert f"{ROWS:,} problems" in done.output
    return folder


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory) -> list[dict]:
    return list(load_dataset(str(folder), split="train", cache_dir=str(tmp_path_factory.mktemp("cache"))))


def layout_of(text: str) -> BranchLayout:
    """Structure of a text whose tags are single tokens, as are the texts between them."""
    return BranchLayout.from_token_ids(
        [_IDS.get(piece, len(TAGS)) for piece in re.split(f"({_TAG.pattern})", text) if piece], _IDS
    )


def computed(question: str) -> int:
    """The answer, from the question alone: every line defines a name by numbers or by names, read from the left."""
    first, *lines = question.splitlines()
    defined = dict(line.split(" = ") for line in lines)

    def value(term: str) -> int:
        return int(term) if term.isdecimal() else worth(defined[term])

    def worth(formula: str) -> int:
        begin, *rest = re.findall(r"[+*-]?\w+", formula)
        total = value(begin)
        for part in rest:
            total = _APPLY[part[0]](total, value(part[1:]))
        return total

    return worth(first.removeprefix("Find ").removesuffix("."))


def test_every_answer_is_right_and_every_structure_sound(rows):
    assert len(rows) == ROWS
    for row in rows:
        expected = computed(row["question"])
        assert row["solution"] == str(expected)
        assert read_answer(row[COLUMNS.attempt]) == expected
        layout = layout_of(row[COLUMNS.parallel])
        assert layout.problems == []
        assert layout.blocks
        assert not _TAG.search(row[COLUMNS.sequential])
        # The last thing that both forms work out is the answer.
        for form in (COLUMNS.parallel, COLUMNS.sequential):
            last = re.findall(r"=(\d+)\n", row[form].removesuffix("\n</Conclusion>\n</Parallel>") + "\n")[-1]
            assert int(last) == expected


def test_the_twin_is_what_is_left_of_the_parallel_form(rows):
    for row in rows:
        assert row[TWIN] == sequential_twin(row[COLUMNS.parallel])


def test_questions_differ_and_families_take_turns(rows):
    assert len({row["question"] for row in rows}) == ROWS
    assert len({row["id"] for row in rows}) == ROWS
    assert [row["family"] for row in rows] == ["sums", "trees"] * (ROWS // 2)
    assert {json.loads(row["provenance"])["seed"] for row in rows} == {0}
    depths = {row[COLUMNS.parallel].count("\n1.1.1: ") for row in rows}
    assert depths >= {0, 2}


def test_no_problem_is_in_it_that_models_are_tested_with(rows):
    questions = {row["question"] for row in rows}
    held_out = [
        *train_and_test(0, 256)[1],  # the demo, and the split that every training holds out
        *train_and_test(0, transfer.PROBLEMS, transfer.PROBLEM_SEED)[1],
        *train_and_test(0, 200, 1, test_options=TreeOptions())[1],
        *train_and_test(0, 120, 0, test_options=CHOICE_PROBLEMS)[1],
        *(problem for seed in transfer.SEEDS for problem in train_and_test(0, 256, seed)[1]),
    ]
    assert not questions & {problem.question for problem in held_out}
    assert {problem.question for problem in held_out} <= held_out_questions()


def test_every_seed_of_a_training_is_among_those_that_are_held_out():
    configs = Path(transfer.CONFIG).parent.glob("smollm2_*.yaml")
    seeds = {int(seed) for path in configs for seed in re.findall(r"^seed: (\d+)$", path.read_text(), re.MULTILINE)}
    assert seeds | {transfer.PROBLEM_SEED, *transfer.SEEDS} <= set(HELD_OUT_SEEDS)
    assert HELD_OUT_PROBLEMS >= transfer.PROBLEMS


def test_a_question_that_is_held_out_is_drawn_anew(monkeypatch):
    from multiverse.curator import synthetic_data

    # Small trees come up again and again: without the check some of these would.
    monkeypatch.setitem(synthetic_data.TRAINED, "trees", TreeOptions(depth=(1, 1), terms=(2, 2), products=0.0))
    usual = [record.chain.question for record in synthetic_records(40, 3, ["trees"])]
    monkeypatch.setattr(synthetic_data, "held_out_questions", lambda: frozenset(usual[:20]))
    others = [record.chain.question for record in synthetic_records(40, 3, ["trees"])]
    assert not set(usual[:20]) & set(others)
    assert others[:20] == usual[20:]


def test_it_depends_on_its_arguments_alone(folder, tmp_path):
    write_synthetic(tmp_path / "synthetic")
    for file in (DATA_FILE, "README.md", "statistics.svg"):
        assert (tmp_path / "synthetic" / file).read_bytes() == (folder / file).read_bytes(), file
    first, other = list(synthetic_records(20)), list(synthetic_records(20, seed=1))
    assert list(synthetic_records(10)) == first[:10]
    assert not {record.chain.question for record in first} & {record.chain.question for record in other}
    assert {record.chain.columns["family"] for record in synthetic_records(5, families=["sums"])} == {"sums"}


def test_arguments_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`rows` is 0"):
        synthetic_records(0)
    for families in ([], ["products"]):
        with pytest.raises(ValueError, match=r"`families` is \[.*\['sums', 'trees'\]"):
            synthetic_records(5, families=families)
    done = CliRunner().invoke(app, ["curate", "synthetic", str(tmp_path / "x"), "--family", "products"])
    assert done.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_both_forms_of_every_row_reach_the_trainer(folder):
    _, tokenizer = fresh()
    script = MultiverseScriptArguments(dataset_name=str(folder), format_data=True, malformed="raise", curriculum=True)
    data = load_data(script, 0, tokenizer)
    assert list(data) == ["train"]
    assert Counter(data["train"]["form"]) == {"sequential": ROWS, "parallel": ROWS}


def test_the_training_script_takes_two_steps_on_it_unchanged(tmp_path):
    """A curriculum of two epochs: sequential forms in the first step, parallel ones in the second."""
    write_synthetic(tmp_path / "data", rows=4)
    tokenizer = tiny_tokenizer()
    config = tiny_config("llama", vocabulary=len(tokenizer), initializer_range=0.05)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    arguments = [
        "--dataset_name", str(tmp_path / "data"), "--format_data", "--curriculum", "--malformed", "raise",
        "--model_name_or_path", str(tmp_path / "plain"), "--dtype", "float32", "--output_dir", str(tmp_path / "out"),
        "--num_train_epochs", "2", "--per_device_train_batch_size", "4", "--max_length", "4096", "--use_cpu", "true",
        "--bf16", "false", "--report_to", "none", "--save_strategy", "no", "--logging_steps", "1",
        "--gradient_checkpointing", "false", "--disable_tqdm", "true",
    ]  # fmt: skip
    parser = TrlParser((MultiverseScriptArguments, SFTConfig, ModelConfig))
    trainer = main(*parser.parse_args_and_config(arguments))
    assert trainer.state.global_step == 2
    first, second = losses(trainer)
    # A model that knows nothing yet spreads its bets over the vocabulary.
    assert first == pytest.approx(math.log(len(tokenizer)), abs=0.5)
    assert 0 < second < first
    branches = [entry["branches_per_sample"] for entry in trainer.state.log_history if "loss" in entry]
    rows = load_dataset(str(tmp_path / "data"), split="train", streaming=True)
    assert branches == [1, 1 + sum(row[COLUMNS.parallel].count("<Path>") for row in rows) / 4]
