"""The transfer experiment: a sequential model is fine-tuned shortly, in Multiverse form, in sequential form, or both.

As in the paper (arXiv 2506.09991, section 6) the start is a model that solves the problems already, one step after
the other. Three arms go on from it over the same problems in the same order, and differ in the share of Multiverse
forms in every epoch: all, none, or the paper's curriculum from none to all. Each command goes on where it stopped.

The start is kept in `results/transfer/start` (`make transfer-start` trains it anew).

A design is a file of settings in `configs`, by which the folders of its runs and results are named. That of
`smollm2_transfer_fresh.yaml` has one epoch, so it has no curriculum.

```bash
python -m multiverse.trainer.transfer train --arm multiverse --seed 0
python -m multiverse.trainer.transfer answer --arm multiverse --seed 0
python -m multiverse.trainer.transfer report
```
"""

import hashlib
import importlib.util
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
import yaml
from multiverse.evaluation.machine import machine
from multiverse.trainer.curriculum import epoch_shares
from multiverse.trainer.held_out import answer_problems, summarise
from multiverse.trainer.recovery import find_complete_checkpoint
from multiverse.trainer.sft import MultiverseScriptArguments, load_model_and_tokenizer, main
from multiverse.trainer.synthetic import train_and_test
from multiverse.trainer.transfer_pictures import draw_arms, draw_budget
from multiverse.trainer.transfer_report import START, read_answers, read_trainings, report_on
from peft import PeftModel
from trl import ModelConfig, SFTConfig, TrlParser

app = typer.Typer(help=__doc__, no_args_is_help=True)

CONFIG = Path(__file__).resolve().parent / "configs" / "smollm2_transfer.yaml"
RESULTS = Path(__file__).resolve().parent / "results"
RUNS = Path("runs")

Arm = Literal["multiverse", "sequential", "curriculum"]
SEEDS = (0, 1, 2)

#: Held-out problems, and the seed that draws them: the first 200 are those of the demo's evaluation.
PROBLEMS, PROBLEM_SEED = 400, 1
#: What is kept of an answer.
_KEPT = ("problem", "right", "valid", "finish_reason", "generated_tokens", "sequential_steps")
#: What is kept of the trainer's log.
_LOGGED = ("step", "loss", "loss_tags", "loss_content", "learning_rate")
_WEIGHTS = "adapter_model.safetensors"
#: What a design has to say.
_NEEDED = ("model_name_or_path", "adapter_path", "num_train_epochs")


@app.command()
def train(
    arm: Annotated[Arm, typer.Option(help="What the run sees.")],
    seed: Annotated[int, typer.Option(help="Draws problems and order.")],
    config: Annotated[Path, typer.Option(help="The design: settings that all runs share.")] = CONFIG,
    runs: Annotated[Path, typer.Option(help="Where the design has its folder of runs.")] = RUNS,
    results: Annotated[Path, typer.Option(help="Where it has its folder of records that are kept.")] = RESULTS,
) -> None:
    """Fine-tunes the start in one arm, unless that is done, and records tokens, time and losses."""
    folder = runs / design(config) / f"{arm}-{seed}"
    shares = arms_of(config).get(arm)
    if shares is None:
        raise ValueError(
            f"`arm` is {arm!r}, but {config} has a single epoch, over which nothing can move. Give it more epochs, or "
            f"choose one of {list(arms_of(config))}."
        )
    record = folder / "training.json"
    if not record.is_file():
        arguments = ["--config", str(config), "--seed", str(seed), "--output_dir", str(folder)]
        arguments += ["--curriculum_shares", *map(str, shares)]
        parser = TrlParser([MultiverseScriptArguments, SFTConfig, ModelConfig])  # type: ignore[list-item]
        script, training, model = parser.parse_args_and_config(arguments)
        start = Path(str(script.adapter_path)) / _WEIGHTS
        if not start.is_file():
            raise ValueError(
                f"`adapter_path`: {start} does not exist. Run from the project's folder, or train the start with "
                "`make transfer-start`."
            )
        with _timed(folder):
            trainer = main(script, training, model)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        summary = {
            "arm": arm,
            "seed": seed,
            "shares": shares,
            "updates": trainer.state.global_step,
            "tokens": tokens_trained(history),
            "sessions": [json.loads(line) for line in _sessions(folder).read_text().splitlines()],
            "start_sha256": hashlib.sha256(start.read_bytes()).hexdigest(),
            "log": [{name: entry[name] for name in _LOGGED if name in entry} for entry in history],
        }
        # Written when all else is: its presence says that the run is finished.
        record.write_text(json.dumps(summary, indent=1) + "\n")
    kept = results / design(config)
    kept.mkdir(parents=True, exist_ok=True)
    (kept / f"{folder.name}_training.json").write_text(record.read_text())
    print(f"{folder} is trained")


@app.command()
def answer(
    arm: Annotated[Literal[Arm, "start"], typer.Option(help="What the run saw; `start`: the model before.")],
    seed: Annotated[int, typer.Option(help="Of the run; the start has none.")] = 0,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = PROBLEMS,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=16)] = 1200,
    config: Annotated[Path, typer.Option(help="The design: settings that all runs share.")] = CONFIG,
    runs: Annotated[Path, typer.Option(help="Where the design has its folder of runs.")] = RUNS,
    results: Annotated[Path, typer.Option(help="Where it has its folder of records that are kept.")] = RESULTS,
) -> None:
    """Answers the held-out problems with one run, greedily and in the form that the run ended with."""
    name = arm if arm == START else f"{arm}-{seed}"
    folder = runs / design(config) / name
    settings = settings_of(config)
    start = Path(settings["adapter_path"])
    adapter = start if arm == START else folder
    finished = adapter / (_WEIGHTS if arm == START else "training.json")
    if not finished.is_file():
        raise ValueError(f"`runs`: {finished} does not exist. Train {name} first.")

    def load() -> Any:
        model, tokenizer = load_model_and_tokenizer(settings["model_name_or_path"], dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval(), tokenizer

    _, held_out = train_and_test(0, problems, PROBLEM_SEED)
    form = "sequential" if arm in (START, "sequential") else "parallel"
    records = answer_problems(held_out, form, folder / "answers.jsonl", load, batch_size, max_new_tokens, name)
    kept = [{field: record[field] for field in _KEPT} for record in records]
    # The start is the same for every design, so its answers lie beside its weights.
    path = start.with_suffix(".jsonl") if arm == START else results / design(config) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    print(json.dumps(summarise(records), indent=2))


@app.command()
def report(
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems that every run answered.")] = PROBLEMS,
    config: Annotated[Path, typer.Option(help="The design.")] = CONFIG,
    results: Annotated[Path, typer.Option(help="Where it has its folder of records that are kept.")] = RESULTS,
    pictures: Annotated[bool, typer.Option(help="Draw as well; needs the extra `plots`.")] = True,
) -> None:
    """Sums up all records of a design that are there, beside their folder, and says which runs are missing."""
    if pictures and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('`pictures` needs matplotlib. Run `pip install -e ".[plots]"`, or pass `--no-pictures`.')
    arms, folder = list(arms_of(config)), results / design(config)
    start = Path(settings_of(config)["adapter_path"]).with_suffix(".jsonl")
    summary = report_on(folder, arms, SEEDS, problems, start)
    folder.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    if pictures:
        answers, _ = read_answers(folder, problems, start)
        draw_budget(answers, arms, folder.with_name(f"{folder.name}_budget.svg"))
        draw_arms(summary, read_trainings(folder), arms, folder.with_name(f"{folder.name}_arms.svg"))
    for arm, pooled in summary["arms"].items():
        low, high = pooled["interval_95_over_problems"]
        print(
            f"{arm}: {pooled['right']}/{pooled['problems']} right, {pooled['accuracy']:.1%} ({low:.1%} to "
            f"{high:.1%}), valid {pooled['valid_structure']:.1%}, {pooled['sequential_steps']} steps, "
            f"seeds {pooled['seeds']}"
        )
    print(json.dumps(summary["comparisons"], indent=1))
    print("missing:", ", ".join(summary["missing"]) or "nothing")


def design(config: Path) -> str:
    """Name of the folders that belong to a file of settings."""
    return config.stem.removeprefix("smollm2_")


def settings_of(config: Path) -> dict[str, Any]:
    """The settings of a design.

    Raises:
        ValueError: if one that the experiment itself needs is missing, or the epochs are no whole number.
    """
    settings = yaml.safe_load(config.read_text()) if config.is_file() else {}
    if missing := [name for name in _NEEDED if name not in settings]:
        raise ValueError(f"`config`: {config} says nothing of {missing}. Start from {CONFIG}.")
    epochs = settings["num_train_epochs"]
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"`config`: `num_train_epochs` must be a positive whole number, got {epochs!r}.")
    return settings


def arms_of(config: Path) -> dict[str, tuple[float, ...]]:
    """Share of Multiverse forms in every epoch, by arm; over a single epoch there is no curriculum."""
    epochs = settings_of(config)["num_train_epochs"]
    arms = {"multiverse": (1.0,) * epochs, "sequential": (0.0,) * epochs}
    return arms | ({"curriculum": epoch_shares("linear", epochs)} if epochs > 1 else {})


def tokens_trained(history: list[dict[str, Any]]) -> int:
    """Tokens of a run that logs every update; TRL's count of them starts anew where the run was resumed."""
    counts = [int(entry["num_tokens"]) for entry in history]
    return sum(
        count - before if count > before else count for before, count in zip([0, *counts], counts, strict=False)
    )


@contextmanager
def _timed(folder: Path) -> Iterator[None]:
    """Notes which updates were made inside, and in what time, however it ends."""
    first, wall, processor = _step(folder), time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        session = {
            "from_update": first,
            "to_update": _step(folder),
            "seconds": round(time.perf_counter() - wall, 1),
            "processor_seconds": round(time.process_time() - processor, 1),
            "machine": machine(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        with _sessions(folder).open("a") as file:
            file.write(json.dumps(session) + "\n")


def _sessions(folder: Path) -> Path:
    return folder / "sessions.jsonl"


def _step(folder: Path) -> int:
    """Updates up to the newest checkpoint."""
    checkpoint = find_complete_checkpoint(folder)
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


if __name__ == "__main__":
    app()
