"""Where the questions of a task come from: rows of a dataset, or a family of problems that is drawn."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from datasets import Dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from multiverse.curator.sources import ROW_FILES, Row, open_rows
from multiverse.evaluation.task_rows import Question, RowReader, TaskData
from multiverse.trainer.expression_trees import FAMILIES
from multiverse.trainer.synthetic import train_and_test

#: Problems of a family that are drawn where no limit is given.
PROBLEMS = 200

#: What a dataset of the user's own is like, if nothing else is said.
_STANDARD = TaskData(question="question", answer="answer", split="test")


class TaskSource(Protocol):
    """What a task is made from.

    Attributes:
        samples (`int`): generations per question that are usual with sampling.
    """

    @property
    def samples(self) -> int: ...

    def read(self, name: str, data: TaskData | None, limit: int | None, seed: int) -> tuple[tuple[Question, ...], str]:
        """The questions, and what they are from."""


@dataclass(frozen=True)
class ProblemFamily:
    """Problems of `multiverse.trainer`: those that its experiments and the demo's table hold out.

    Attributes:
        family (`str`): one of `FAMILIES`.
    """

    family: str
    samples: int = 1

    def read(self, name: str, data: TaskData | None, limit: int | None, seed: int) -> tuple[tuple[Question, ...], str]:
        """The first `limit` problems, 200 by default, that `seed` draws."""
        if data is not None:
            raise ValueError(
                f"`data`: the problems of {name!r} are drawn, not read. Leave it out, or rename the task."
            )
        _, held_out = train_and_test(0, limit or PROBLEMS, seed, test_options=FAMILIES[self.family]())
        questions = (
            Question(f"{name}-{number:04d}", problem.question, str(problem.answer), "number")
            for number, problem in enumerate(held_out)
        )
        return tuple(questions), f"problems of the family {self.family}, drawn with seed {seed}"


@dataclass(frozen=True)
class DatasetRows:
    """Rows of a dataset.

    Attributes:
        data (`TaskData`): which ones, where the user says nothing else.
    """

    data: TaskData = field(default_factory=TaskData)
    samples: int = 1

    def read(self, name: str, data: TaskData | None, limit: int | None, seed: int) -> tuple[tuple[Question, ...], str]:
        """The first `limit` rows, all by default; `seed` orders options that are shuffled."""
        settled = (data or TaskData()).over(self.data).over(_STANDARD)
        try:
            return self._read(name, settled, limit, seed)
        except ValueError as error:
            # `open_rows` calls it by its own name, at once or when a row is reached.
            raise ValueError(str(error).replace("`source`", "`path`")) from error

    @staticmethod
    def _read(name: str, settled: TaskData, limit: int | None, seed: int) -> tuple[tuple[Question, ...], str]:
        rows, names, source = _open(settled)
        reader = RowReader(name, settled, seed)
        reader.check(names)
        if reader.shuffle:
            source += f", options ordered by seed {seed}"
        seen: dict[str, int] = {}
        questions = []
        for number, row in enumerate(islice(rows, limit)):
            question = reader.question(number, row)
            if question.id in seen:
                raise ValueError(
                    f"`id`: rows {seen[question.id]} and {number} of {reader.where} have the same id {question.id!r} "
                    f"in column {settled.id!r}. Name a column that tells rows apart, or none."
                )
            seen[question.id] = number
            questions.append(question)
        return tuple(questions), source


def _open(data: TaskData) -> tuple[Iterable[Row], list[str], str]:
    """Rows, names of their columns, and what they are from: a Hub id with its revision, or a file with its hash."""
    if data.path is None:
        raise ValueError("`path` is missing in `data`. Name a file, a folder or a dataset on the Hub.")
    path, split = Path(data.path), str(data.split)
    if path.exists() or path.suffix in ROW_FILES:
        rows, names = open_rows(path, split)
        # Without the folder, which is another on every machine.
        source = f"{path.name}, sha256 {_sha256(path)}"
        return rows, names, source if path.is_file() else f"{source}, split {split}"
    dataset, commit = _from_hub(str(data.path), data.config, split, data.revision)
    rows, names = open_rows(dataset, split)
    parts = [str(data.path), data.config, f"split {split}", f"revision {commit or data.revision or 'unknown'}"]
    return rows, names, ", ".join(part for part in parts if part)


def _from_hub(path: str, config: str | None, split: str, revision: str | None) -> tuple[Dataset, str | None]:
    """A split of a dataset, from the cache where it is there, and its commit."""
    try:
        builder = load_dataset_builder(path, config, revision=revision)
        builder.download_and_prepare()
        return builder.as_dataset(split=split), builder.hash
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        subset, why = f" ({config})" if config else "", str(error).rstrip(".")
        raise ValueError(
            f"`path`: {path}{subset}, split {split!r}, cannot be loaded from the Hub: {why}. If it is gated, ask for "
            f"access at https://huggingface.co/datasets/{path} and log in with `hf auth login`. Where there is no "
            f"connection, pass a file with the same columns ({', '.join(ROW_FILES)}) as `path`."
        ) from error


def _sha256(path: Path) -> str:
    """Of a file, or of all files of a folder with their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for each in sorted(each for each in path.rglob("*") if each.is_file()):
        digest.update(f"{each.relative_to(path).as_posix()} {_sha256(each)}\n".encode())
    return digest.hexdigest()
