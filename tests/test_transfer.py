"""The transfer experiment's runs, on a tiny model: what an arm sees, how a run goes on, what is answered and kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from multiverse.trainer import transfer
from multiverse.trainer.forms import PARALLEL_PROMPT
from multiverse.trainer.held_out import answer_problems
from multiverse.trainer.sft import MultiverseScriptArguments, main
from multiverse.trainer.synthetic import ProblemOptions, generate_problems, train_and_test
from multiverse.trainer.training_data import DataArguments, load_data
from safetensors.torch import load_file
from tiny import tiny_config, tiny_tokenizer
from training import fresh
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

PROBLEMS, EPOCHS, UPDATES = 4, 8, 8


class Experiment:
    """A folder with a tiny start and the settings of its runs; the experiment's own, but for the problems' size."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.results = folder, folder / "runs", folder / "results"
        self.config = folder / "smollm2_short.yaml"
        tokenizer = tiny_tokenizer()
        plain = tiny_config("llama", vocabulary=len(tokenizer))
        plain.eos_token_id, plain.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(plain).save_pretrained(folder / "plain")
        tokenizer.save_pretrained(folder / "plain")
        own = {"model_name_or_path": str(folder / "plain"), "bf16": False, "max_length": 4096, "disable_tqdm": True}
        own |= {"synthetic_samples": PROBLEMS, "synthetic_terms": [2, 3]}
        start = yaml.safe_load(transfer.CONFIG.with_stem("smollm2_transfer_start").read_text())
        settings = folder / "start.yaml"
        settings.write_text(yaml.safe_dump({**start, **own, "output_dir": str(self.runs / "start")}))
        parser = TrlParser((MultiverseScriptArguments, SFTConfig, ModelConfig))
        main(*parser.parse_args_and_config(["--config", str(settings)]))
        common = yaml.safe_load(transfer.CONFIG.read_text())
        common |= {**own, "adapter_path": str(self.runs / "start"), "save_steps": 4}
        self.config.write_text(yaml.safe_dump(common))

    def train(self, arm: str, runs: Path | None = None, cut_after: int | None = None) -> list[list[int]]:
        """Runs the command, and gives the ids of every sample that is trained on; fails after `cut_after` samples."""
        seen: list[list[int]] = []
        step = SFTTrainer.training_step

        def watched(trainer: SFTTrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> Any:
            if len(seen) == cut_after:
                raise RuntimeError("the power is off")
            seen.extend(inputs["input_ids"].tolist())
            return step(trainer, model, inputs, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SFTTrainer, "training_step", watched)
            try:
                transfer.train(arm, 0, self.config, runs or self.runs, self.results)
            except RuntimeError:
                assert cut_after is not None
        return seen

    def training(self, runs: Path, arm: str) -> dict[str, Any]:
        return json.loads((runs / "short" / f"{arm}-0" / "training.json").read_text())

    def answer(self, arm: str, **options: Any) -> list[dict[str, Any]]:
        """Runs the command, and gives the records that are kept."""
        options = {"problems": 5, "batch_size": 2, "max_new_tokens": 40, **options}
        transfer.answer(arm, 0, config=self.config, runs=self.runs, results=self.results, **options)
        path = self.runs / "start.jsonl" if arm == "start" else self.results / "short" / f"{arm}-0.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return Experiment(tmp_path_factory.mktemp("transfer"))


@pytest.fixture(scope="module")
def seen(experiment: Experiment) -> dict[str, list[list[int]]]:
    """Ids of all samples of the three arms, in the order of training."""
    return {arm: experiment.train(arm) for arm in transfer.arms_of(experiment.config)}


def test_an_epoch_visits_every_problem_once_and_arms_differ_in_forms_alone(experiment, seen):
    tokenizer = AutoTokenizer.from_pretrained(experiment.runs / "short" / "multiverse-0")
    texts = {arm: [tokenizer.decode(ids) for ids in samples] for arm, samples in seen.items()}
    drawn = generate_problems(PROBLEMS, 0, ProblemOptions(terms=(2, 3)))

    def problem_of(text: str) -> int:
        (found,) = (number for number, problem in enumerate(drawn) if problem.question + "<|im_end|>" in text)
        return found

    orders = {arm: [problem_of(text) for text in samples] for arm, samples in texts.items()}
    assert orders["multiverse"] == orders["sequential"] == orders["curriculum"]
    order = orders["multiverse"]
    assert len(order) == EPOCHS * PROBLEMS
    epochs = [order[start : start + PROBLEMS] for start in range(0, len(order), PROBLEMS)]
    assert all(sorted(epoch) == list(range(PROBLEMS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1

    parallel = {
        arm: [
            sum(PARALLEL_PROMPT in text for text in samples[start : start + PROBLEMS])
            for start in range(0, len(order), PROBLEMS)
        ]
        for arm, samples in texts.items()
    }
    assert parallel["multiverse"] == [PROBLEMS] * EPOCHS
    assert parallel["sequential"] == [0] * EPOCHS
    assert parallel["curriculum"] == [round(PROBLEMS * epoch / 7) for epoch in range(EPOCHS)]
    for samples in texts.values():
        for number, text in zip(order, samples, strict=True):
            problem = drawn[number]
            assert (problem.parallel() if PARALLEL_PROMPT in text else problem.sequential()) in text


def test_tokens_updates_and_time_are_recorded(experiment, seen):
    for arm, samples in seen.items():
        training = json.loads((experiment.results / "short" / f"{arm}-0_training.json").read_text())
        assert training == experiment.training(experiment.runs, arm)
        assert training["updates"] == UPDATES
        assert training["tokens"] == sum(map(len, samples))
        assert [entry["step"] for entry in training["log"]] == list(range(1, UPDATES + 1))
        (session,) = training["sessions"]
        assert (session["from_update"], session["to_update"]) == (0, UPDATES)
        assert session["machine"]["torch"] == torch.__version__
    starts = {experiment.training(experiment.runs, arm)["start_sha256"] for arm in seen}
    assert len(starts) == 1


def test_a_finished_run_is_not_trained_again(experiment, seen):
    kept = experiment.results / "short" / "curriculum-0_training.json"
    before = kept.read_text()
    kept.unlink()
    assert experiment.train("curriculum") == []
    assert kept.read_text() == before


def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(experiment, seen, tmp_path):
    # Within the sixth update; a checkpoint is written after the fourth.
    experiment.train("curriculum", tmp_path, cut_after=22)
    assert not (tmp_path / "short" / "curriculum-0" / "training.json").exists()
    assert experiment.train("curriculum", tmp_path) == seen["curriculum"][16:]
    whole, cut = (experiment.training(runs, "curriculum") for runs in (experiment.runs, tmp_path))
    assert cut["tokens"] == whole["tokens"]
    assert [entry["loss"] for entry in cut["log"]] == pytest.approx([entry["loss"] for entry in whole["log"]])
    assert [(each["from_update"], each["to_update"]) for each in cut["sessions"]] == [(0, 4), (4, 8)]
    weights = "short/curriculum-0/adapter_model.safetensors"
    one, other = (load_file(runs / weights) for runs in (experiment.runs, tmp_path))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight)


def test_a_single_epoch_has_no_curriculum_and_folders_of_its_own(experiment, seen, tmp_path):
    settings = yaml.safe_load(experiment.config.read_text()) | {"num_train_epochs": 1}
    config = tmp_path / "smollm2_once.yaml"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="`arm` is 'curriculum'"):
        transfer.train("curriculum", 0, config, experiment.runs, experiment.results)
    for arm in transfer.arms_of(config):
        transfer.train(arm, 0, config, experiment.runs, experiment.results)
    once = {arm: experiment.results / "once" / f"{arm}-0_training.json" for arm in ("multiverse", "sequential")}
    assert sorted((experiment.results / "once").iterdir()) == sorted(once.values())
    for arm, path in once.items():
        training = json.loads(path.read_text())
        assert training["shares"] == [float(arm == "multiverse")]
        # The problems that a longer run sees in its first epoch, in the same order.
        assert training["tokens"] == sum(map(len, seen[arm][:PROBLEMS]))


def test_the_designs_differ_in_the_number_of_problems_and_epochs_alone():
    one, other = (
        yaml.safe_load(transfer.CONFIG.with_stem(name).read_text())
        for name in ("smollm2_transfer", "smollm2_transfer_fresh")
    )
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"synthetic_samples", "num_train_epochs"}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_train_epochs": None}, "num_train_epochs"),
        ({"num_train_epochs": 0.5}, "0.5"),
        ({"adapter_path": ...}, "adapter_path"),
    ],
)
def test_a_design_that_lacks_what_is_needed_is_refused(tmp_path, changed, named):
    settings = yaml.safe_load(transfer.CONFIG.read_text()) | changed
    config = tmp_path / "design.yaml"
    config.write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not ...}))
    for command in (transfer.train, transfer.answer):
        with pytest.raises(ValueError, match=rf"`config`.*{named}"):
            command("multiverse", 0, config=config, runs=tmp_path, results=tmp_path / "results")
    with pytest.raises(ValueError, match=rf"`config`.*{named}"):
        transfer.report(config=config, results=tmp_path / "results")
    with pytest.raises(ValueError, match="`config`"):
        transfer.arms_of(tmp_path / "nowhere.yaml")
    assert list(tmp_path.iterdir()) == [config]


def test_without_a_start_nothing_is_trained(experiment, tmp_path):
    settings = yaml.safe_load(experiment.config.read_text()) | {"adapter_path": str(tmp_path / "nowhere")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="`adapter_path`"):
        transfer.train("multiverse", 0, config, tmp_path, tmp_path / "results")


def test_what_is_kept_of_the_answers(experiment, seen):
    kept = experiment.answer("multiverse")
    stored = experiment.runs / "short" / "multiverse-0" / "answers.jsonl"
    full = [json.loads(line) for line in stored.read_text().splitlines()]
    full.sort(key=lambda record: record["problem"])
    _, problems = train_and_test(0, 5, transfer.PROBLEM_SEED)
    assert [record["question"] for record in full] == [problem.question for problem in problems]
    fields = {"problem", "right", "valid", "finish_reason", "generated_tokens", "sequential_steps"}
    assert kept == [{name: record[name] for name in fields} for record in full]


def test_answers_that_are_stored_are_not_made_again(experiment, seen, monkeypatch):
    kept = experiment.answer("sequential")
    stored = experiment.runs / "short" / "sequential-0" / "answers.jsonl"
    lines = stored.read_text().splitlines(keepends=True)
    # Two answers are there, the third was being written.
    stored.write_text("".join(lines[:2]) + lines[2][:40])
    assert experiment.answer("sequential") == kept
    again = stored.read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2]
    assert len(again) == 5
    monkeypatch.setattr(transfer, "load_model_and_tokenizer", None)
    assert experiment.answer("sequential") == kept


@pytest.mark.parametrize(
    ("arm", "form"),
    [("multiverse", "parallel"), ("curriculum", "parallel"), ("sequential", "sequential"), ("start", "sequential")],
)
def test_every_arm_is_asked_in_the_form_that_it_ended_with(experiment, seen, monkeypatch, arm, form):
    asked = []

    def noted(problems: Any, of: str, *args: Any) -> list[dict[str, Any]]:
        asked.append(of)
        return answer_problems(problems, of, *args)

    monkeypatch.setattr(transfer, "answer_problems", noted)
    experiment.answer(arm)
    assert asked == [form]


def test_an_unfinished_run_is_not_asked(experiment, tmp_path):
    with pytest.raises(ValueError, match="`runs`"):
        transfer.answer("multiverse", 7, config=experiment.config, runs=experiment.runs, results=tmp_path)


def test_answers_do_not_depend_on_the_batch(tmp_path):
    _, problems = train_and_test(0, 6, 1)
    assert len({len(problem.question) for problem in problems}) > 1

    def load() -> Any:
        model, tokenizer = fresh(scale=0.3)
        return model.double().eval(), tokenizer

    answers = []
    for size in (1, 6):
        path = tmp_path / f"{size}.jsonl"
        answers.append(answer_problems(problems, "parallel", path, load, size, max_new_tokens=60))
    one, other = ([{**record, "batch_seconds": None} for record in each] for each in answers)
    assert one == other
    assert len({record["text"] for record in one}) > 1


def test_arms_of_a_seed_share_problems_that_are_not_asked_later():
    def questions(name: str, seed: int) -> list[str]:
        config = yaml.safe_load(transfer.CONFIG.with_stem(name).read_text())
        drawn = {
            field: value for field, value in config.items() if field.startswith("synthetic") or field == "curriculum"
        }
        return [row["prompt"][-1]["content"] for row in load_data(DataArguments(**drawn), seed)["train"]]

    asked = {problem.question for problem in train_and_test(0, transfer.PROBLEMS, transfer.PROBLEM_SEED)[1]}
    assert len(asked) == 400
    start = questions("smollm2_transfer_start", 10)
    assert len(set(start)) == 1600
    assert not asked & set(start)
    for name, count in (("smollm2_transfer", 80), ("smollm2_transfer_fresh", 400)):
        trained = {seed: questions(name, seed) for seed in transfer.SEEDS}
        for rows in trained.values():
            # Both forms of every problem, whatever the arm's shares.
            assert rows[:count] == rows[count:]
            assert len(set(rows)) == count
            assert not (asked | set(start)) & set(rows)
        assert len(set().union(*trained.values())) == 3 * count
