"""What trainer/README.md shows works: its snippets, the commands, options and files it names."""

import dataclasses
import functools
import importlib.util
import inspect
import re
from pathlib import Path

import datasets
import pytest
import trl
from front_door import front_door
from multiverse.trainer.choice import rollout_row, write_mixture
from multiverse.trainer.grpo import GRPOScriptArguments
from multiverse.trainer.rollouts import MultiverseRollouts
from multiverse.trainer.sft import MultiverseScriptArguments
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from trl import GRPOConfig, ModelConfig, SFTConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "trainer/README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PROBLEMS = generate_problems(2, seed=1, options=ProblemOptions(paths=(2, 2), terms=(2, 2), nested=0.0))


def snippet(word: str) -> str:
    """The only snippet that holds a word."""
    (found,) = (each for each in SNIPPETS if word in each)
    return found


def test_formatting_snippet(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": [*row["prompt"], *row["completion"]]} for row in (p.messages("parallel") for p in PROBLEMS)]
    names = {"dataset": datasets.Dataset.from_list(rows), "tokenizer": front_door()[1]}
    exec(snippet("format_dataset"), names)
    assert len(names["rows"]) == len(PROBLEMS)
    assert "step by step and in parallel" in names["rows"][0]["prompt"][0]["content"]
    assert capsys.readouterr().out.strip()


def test_reinforcement_snippet_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it stands, but for one small step on a CPU."""
    monkeypatch.chdir(tmp_path)
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "disable_tqdm": True}
    small = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 24}
    monkeypatch.setattr(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, **options, **small))
    model, tokenizer = front_door()
    rows = datasets.Dataset.from_list([rollout_row(problem, "free", tokenizer) for problem in PROBLEMS])
    names = {"model": model, "tokenizer": tokenizer, "problems": rows}
    exec(snippet("GRPOTrainer"), names)
    trainer = names["trainer"]
    assert isinstance(trainer.rollout_func, MultiverseRollouts)
    trainer.train()
    assert trainer.state.global_step == 1
    rewards = {"rewards/answer/mean", "rewards/format/mean", "rewards/acceleration/mean"}
    assert rewards <= set(trainer.state.log_history[0])


OPTIONS = sorted(set(re.findall(r"--(\w[\w-]*)", README)) - {"config_file"})


@pytest.mark.parametrize("option", OPTIONS)
def test_option_exists(option: str) -> None:
    kinds = (MultiverseScriptArguments, SFTConfig, GRPOScriptArguments, GRPOConfig, ModelConfig)
    known = {each.name for kind in kinds for each in dataclasses.fields(kind)}
    chosen = {name.replace("_", "-") for name in inspect.signature(write_mixture).parameters}
    assert option in known | chosen | {"config", "plan"}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.(?:py|yaml))`", README))))
def test_file_exists(name: str) -> None:
    assert any((ROOT / "trainer" / folder / name).is_file() for folder in ("", "configs"))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"trainer/configs/[\w.]+", README))))
def test_configuration_exists(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"python -m ([\w.]+)", README))))
def test_module_exists(name: str) -> None:
    assert (ROOT / f"{name.replace('.', '/')}.py").is_file() or importlib.util.find_spec(name)
