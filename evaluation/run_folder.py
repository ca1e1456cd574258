"""The folder of a run: what was asked for, what was read, and every generation, a line each."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from multiverse.evaluation.settings import Condition, EvaluationSettings

SCHEMA_VERSION = 1
#: JSON schema of a record, a copy of which goes into every folder.
RECORD_SCHEMA = Path(__file__).resolve().parent / "record.schema.json"

Record = dict[str, Any]


def check_summary(summary: Mapping[str, Any], argument: str) -> None:
    """Refuses what is no summary of a run, or that of another version.

    Args:
        summary (`Mapping`): as in `summary.json`.
        argument (`str`): what the caller got it as.

    Raises:
        ValueError: if its schema version is another, or it has no conditions.
    """
    version = summary.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"`{argument}` has the schema version {version!r}, but this program reads {SCHEMA_VERSION}. Make it anew "
            "with `multiverse evaluate report`."
        )
    if not summary.get("conditions"):
        raise ValueError(f"`{argument}` has no conditions. Make it of a run with at least one generation.")


class RunFolder:
    """Settings, generations and sessions of one evaluation.

    Several processes may work in it, each on a share of the batches and with a file of its own. A batch is written at
    once when all of it is generated; what a kill has cut off is not read, and generated again. So a batch is always
    made of the same rows, whatever was interrupted, and its texts are the same too.

    Args:
        path (`Path`): of the folder, which need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "settings.json").is_file()

    def open(self, settings: EvaluationSettings) -> None:
        """Begins a run, or goes on with it.

        Args:
            settings (`EvaluationSettings`): what is asked for.

        Raises:
            ValueError: if the folder holds something else, or a run with other settings.
        """
        if not self.exists:
            files = sorted(each.name for each in self.path.iterdir()) if self.path.is_dir() else []
            # Another process of the run may be writing the first files.
            others = [name for name in files if not name.startswith(("settings.json", RECORD_SCHEMA.name))]
            if others or self.path.is_file():
                raise ValueError(
                    f"`folder`: {self.path} holds {', '.join(others[:5]) or 'no folder'} and no run. Name another, or "
                    "remove it."
                )
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / RECORD_SCHEMA.name, RECORD_SCHEMA.read_text())
            content = {"schema_version": SCHEMA_VERSION, **settings.to_dict()}
            write_atomically(self.path / "settings.json", to_json(content))
            return
        different = self.settings().differences(settings)
        if different:
            listed = "; ".join(f"{name} was {was!r} and is {now!r}" for name, (was, now) in different.items())
            raise ValueError(
                f"`folder`: {self.path} holds a run with other settings: {listed}. Name another folder, or ask for "
                "the same."
            )

    def pin(self, name: str, content: Any) -> None:
        """Records a fact of the run, such as its tasks or its checkpoint, or makes sure that it is still the same.

        Raises:
            ValueError: if it is not.
        """
        path = self.path / f"{name}.json"
        if not path.is_file():
            write_atomically(path, to_json(content))
        elif self.fact(name) != json.loads(to_json(content)):
            raise ValueError(
                f"`folder`: {self.path} holds a run whose {path.name} says something else than is found now. Name "
                "another folder."
            )

    def settings(self) -> EvaluationSettings:
        """What was asked for.

        Raises:
            ValueError: if there is no run, or one of another version.
        """
        if not self.exists:
            raise ValueError(
                f"`folder`: {self.path} holds no evaluation. Make one with `multiverse evaluate run {self.path}`."
            )
        values = json.loads((self.path / "settings.json").read_text())
        if values.pop("schema_version", None) != SCHEMA_VERSION:
            raise ValueError(f"`folder`: {self.path} was written by another version of this program.")
        return EvaluationSettings.from_dict(values)

    def fact(self, name: str) -> Any:
        """What was pinned under that name; `tasks` has source, hash and number of questions and samples of each."""
        return json.loads((self.path / f"{name}.json").read_text())

    def records(self) -> list[Record]:
        """All generations of whole batches, by condition, question and sample in the order of the run."""
        conditions = {condition: number for number, condition in enumerate(self.settings().conditions())}
        batches: dict[tuple[Condition, int], list[Record]] = {}
        for record in self._lines("records"):
            batches.setdefault((Condition.of(record), record["batch"]), []).append(record)
        whole: dict[tuple[int, int, int], Record] = {}
        for (condition, _), rows in batches.items():
            own = {(row["question_number"], row["sample"]): row for row in rows}
            # Ranks of different calls may have made a batch twice: the same rows.
            if len(own) == rows[0]["times"]["batch_rows"]:
                whole |= {(conditions[condition], *place): row for place, row in own.items()}
        return [whole[place] for place in sorted(whole)]

    def speed(self) -> list[Record]:
        """All timed calls."""
        return list(self._lines("speed"))

    def sessions(self) -> list[Record]:
        """One for every start of a process."""
        return list(self._lines("sessions"))

    def missing(self) -> int:
        """Generations that are not there yet."""
        if not (self.path / "tasks.json").is_file():
            raise ValueError(f"`folder`: {self.path} holds a run that has not read its tasks yet. Go on with it.")
        tasks = self.fact("tasks")
        wanted = sum(
            tasks[condition.task]["questions"] * tasks[condition.task]["samples"]
            for condition in self.settings().conditions()
        )
        return wanted - len(self.records())

    @contextmanager
    def writer(self, kind: str, rank: int = 0) -> Iterator["RecordWriter"]:
        """The file of a process, for `kind` of lines, which nobody else may write to meanwhile.

        Raises:
            ValueError: if somebody does.
        """
        path = self.path / kind / f"rank-{rank:04d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"`folder`: another process writes to {path}. Wait for it, or name another.") from error
        try:
            yield RecordWriter(path)
        finally:
            lock.release()

    def _lines(self, kind: str) -> Iterator[Record]:
        for path in sorted((self.path / kind).glob("*.jsonl")):
            # What follows the last end of line was cut off.
            for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
                yield json.loads(line)


class RecordWriter:
    """Appends lines that are on the disk when `write` returns.

    Args:
        path (`Path`): of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends records in one piece."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        with self.path.open("ab") as file:
            # A line that a kill has cut off would swallow the next one.
            file.truncate(self.path.read_bytes().rfind(b"\n") + 1)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def to_json(content: Any) -> str:
    """As it stands in the files of a folder."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    # The process's own, as several may write the same.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
