"""Runs an evaluation: what is missing in its folder is generated, a batch at a time."""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from multiverse.evaluation.answering import Answerer
from multiverse.evaluation.loading import checkpoint_facts, load
from multiverse.evaluation.machine import machine
from multiverse.evaluation.plan import Batch, make_batches
from multiverse.evaluation.prompts import published_prompts
from multiverse.evaluation.run_folder import RunFolder
from multiverse.evaluation.settings import Condition, EvaluationSettings
from multiverse.evaluation.speed import make_speed_cases, measure_speed
from multiverse.evaluation.tasks import Task, TaskData, load_task
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Packages whose version a number may depend on.
PACKAGES = (
    "multiverse-transformers",
    "torch",
    "transformers",
    "peft",
    "math-verify",
    "datasets",
    "triton",
    "flash-attn",
)


class Rank(NamedTuple):
    """Which of how many processes this is; torchrun and `accelerate launch` say so in the environment."""

    number: int
    world: int

    @classmethod
    def of_environment(cls) -> "Rank":
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def run(settings: EvaluationSettings, folder: str | Path, show: bool = True, rank: Rank | None = None) -> RunFolder:
    """Generates what is missing of a run, in as many processes as it is started in.

    Processes need not talk to each other: a batch belongs to the rank that is its number modulo their count, and each
    writes a file of its own. A run may go on with another number of them.

    Args:
        settings (`EvaluationSettings`): what is asked for.
        folder (`str` or `Path`): of the run; one that was begun with the same settings goes on.
        show (`bool`): whether to show a progress bar.
        rank (`Rank`, *optional*): by default the environment's.

    Returns:
        `RunFolder`: with all generations, unless other processes are still at theirs.

    Raises:
        ValueError: before anything is generated, for what cannot work. An interrupted batch is kept for readers in
            `partial/`, and generated again by the next run.
    """
    rank = rank or Rank.of_environment()
    run_folder = RunFolder(folder)
    tasks = {name: _load_task(name, settings) for name in settings.tasks}
    samples = {name: _samples(task, settings) for name, task in tasks.items()}
    run_folder.open(settings)
    run_folder.pin("tasks", {name: _task_facts(task, samples[name]) for name, task in tasks.items()})
    batches = make_batches(settings.conditions(), tasks, samples, settings.batch_size)
    own = _own(batches, run_folder, rank)
    cases = make_speed_cases(settings, run_folder.speed()) if rank.number == 0 else []
    if not own and not cases:
        return run_folder
    model, tokenizer = load(settings)
    run_folder.pin("checkpoint", checkpoint_facts(model, settings))
    run_folder.pin(
        "prompts", {name: published_prompts(task, settings.instructions, tokenizer) for name, task in tasks.items()}
    )
    with run_folder.writer("sessions", rank.number) as writer:
        writer.write([{"rank": rank.number, "world": rank.world, "started": time.time(), **environment(model.device)}])
    answerer = Answerer(model, tokenizer, settings)
    with run_folder.writer("records", rank.number) as writer, _progress(show and rank.number == 0) as advance:
        for batch in advance(own, "answers"):
            try:
                writer.write(answerer.answer(batch, tasks[batch.condition.task]))
            except BaseException as error:
                _keep_partial(run_folder, rank, getattr(error, "partial_records", None))
                raise
    if cases:
        with run_folder.writer("speed") as writer, _progress(show) as advance:
            for case in advance(cases, "timed calls"):
                writer.write(measure_speed(answerer, tasks[case.task], case))
    return run_folder


def environment(device: Any) -> dict[str, Any]:
    """The machine and the versions, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = None
    if device.type == "cuda":
        import torch

        gpu = torch.cuda.get_device_name(device)
    return {"machine": {**machine(), "device": str(device), "gpu": gpu}, "versions": versions}


def _load_task(name: str, settings: EvaluationSettings) -> Task:
    values = (settings.data or {}).get(name)
    return load_task(name, None if values is None else TaskData(**values), settings.limit)


def _samples(task: Task, settings: EvaluationSettings) -> int:
    if not settings.do_sample:
        return 1
    return settings.samples or task.samples


def _task_facts(task: Task, samples: int) -> dict[str, Any]:
    return {
        "source": task.source,
        "sha256": task.sha256,
        "questions": len(task.questions),
        "samples": samples,
        "kind": task.questions[0].kind,
    }


def _own(batches: Sequence[Batch], folder: RunFolder, rank: Rank) -> list[Batch]:
    """The batches of this process that nobody has generated."""
    done = {(Condition.of(record), record["batch"]) for record in folder.records()}
    return [
        batch
        for number, batch in enumerate(batches)
        if number % rank.world == rank.number and (batch.condition, batch.number) not in done
    ]


def _keep_partial(folder: RunFolder, rank: Rank, records: list[dict[str, Any]] | None) -> None:
    if records:
        with folder.writer("partial", rank.number) as writer:
            writer.write(records)


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[Sequence[Any], str], Iterator[Any]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not show) as progress:
        yield lambda items, description: iter(progress.track(items, description=description))
