"""Writes finished records as a dataset in Multiverse-1K's columns, with its card, and rejected ones with their story.

A folder of the curator is a dataset repository as it stands, for `load_dataset(folder)` and for the Hub:

- `data/train-00000-of-00001.parquet`: the finished records;
- `README.md`, `statistics.json`, `statistics.svg`: the dataset card and what it is made of;
- `rejects.jsonl`: the rejected records, and `drafts.jsonl`: how the finished ones came about, both for
  `multiverse curate inspect` and no part of the data.

The same records make the same bytes, in whatever order they come.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Features, Value
from multiverse.curator.dataset_card import DatasetFacts, ProvenanceSummary, make_dataset_card
from multiverse.curator.records import Chain, Draft
from multiverse.curator.statistics import CorpusStatistics, kinds_of, measure
from multiverse.curator.statistics_picture import draw, save
from multiverse.hub_card.view import from_text
from multiverse.trainer.formatting import TrajectoryColumns
from transformers import PreTrainedTokenizerBase

DATA_FILE = "data/train-00000-of-00001.parquet"
REJECTS_FILE = "rejects.jsonl"
DRAFTS_FILE = "drafts.jsonl"
CARD_FILE = "README.md"
STATISTICS_FILE, PICTURE_FILE = "statistics.json", "statistics.svg"

#: Names of question, trajectories and attempt, those that training reads.
COLUMNS = TrajectoryColumns()
ID, TWIN, ANSWER, PROVENANCE = "id", f"{COLUMNS.sequential}_sequential", "solution", "provenance"
_OWN = (ID, COLUMNS.question, COLUMNS.parallel, COLUMNS.sequential, TWIN, COLUMNS.attempt, ANSWER, PROVENANCE)


@dataclass(frozen=True)
class FinishedRecord:
    """A chain in Multiverse form.

    Attributes:
        chain (`Chain`): what it was made from.
        parallel (`str`): the chain of thought with tags.
        twin (`str`): the same without its structure.
        provenance (`Mapping`): how it came about, in JSON's types. Statistics and card read `models` and `prompts`
            (by stage), `attempts` (number by stage), `measures` (number by name) and `kinds` (of its blocks).
        draft (`Draft`, *optional*): what the stages have made; shown by `inspect`, no part of the dataset.
    """

    chain: Chain
    parallel: str
    twin: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    draft: Draft | None = None

    def row(self) -> dict[str, Any]:
        """The record in the columns of the dataset. A column of the source that bears the name of one of them is
        called `source_...`."""
        chain = self.chain
        own = {
            ID: _clean(chain.id),
            COLUMNS.question: _clean(chain.question),
            COLUMNS.parallel: _clean(self.parallel),
            COLUMNS.sequential: _clean(chain.trajectory),
            TWIN: _clean(self.twin),
            COLUMNS.attempt: _clean(chain.attempt),
            ANSWER: None if chain.answer is None else _clean(chain.answer),
        }
        others = {f"source_{name}" if name in _OWN else name: value for name, value in chain.columns.items()}
        return {**own, **others, PROVENANCE: json.dumps(self.provenance, sort_keys=True)}


@dataclass(frozen=True)
class RejectedRecord:
    """A chain that was given up.

    Attributes:
        chain (`Chain`): what it was.
        stage (`str`): the stage that failed last.
        reason (`str`): why.
        story (sequence of `Mapping`): what was tried, one entry per attempt in JSON's types, such as `stage`,
            `attempt`, `reason` and what the model had answered.
        draft (`Draft`, *optional*): how far it came.
        parallel (`str`, *optional*): the text that failed a check, if there was one.
    """

    chain: Chain
    stage: str
    reason: str
    story: Sequence[Mapping[str, Any]] = ()
    draft: Draft | None = None
    parallel: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "id": self.chain.id,
            "stage": self.stage,
            "reason": self.reason,
            "question": self.chain.question,
            "trajectory": self.chain.trajectory,
            "attempt": self.chain.attempt,
            "answer": self.chain.answer,
            "columns": dict(self.chain.columns),
            "story": [dict(each) for each in self.story],
            "draft": None if self.draft is None else self.draft.to_dict(),
            "parallel": self.parallel,
        }


def write_output(
    folder: str | Path,
    finished: Iterable[FinishedRecord],
    rejected: Iterable[RejectedRecord] = (),
    facts: DatasetFacts | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CorpusStatistics:
    """Writes dataset, card, statistics and rejects; replaces those that are there, each of them whole or not at all.

    Args:
        folder (`str` or `Path`): where to.
        finished (iterable of `FinishedRecord`): rows of the dataset; they are sorted by id.
        rejected (iterable of `RejectedRecord`): what did not become one, likewise.
        facts (`DatasetFacts`, *optional*): for the card; by default the folder's name is the dataset's.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): counts tokens for the statistics; words are counted without
            one.

    Returns:
        `CorpusStatistics`: of the rows.

    Raises:
        ValueError: if two records have the same id, or a record has no text; nothing is written then.
    """
    folder = Path(folder)
    records, rejects = _by_id(finished, "finished"), _by_id(rejected, "rejected")
    both = {record.chain.id for record in records} & {record.chain.id for record in rejects}
    if both:
        raise ValueError(f"`rejected` holds {sorted(both)[0]!r}, which is among `finished`. Give it once.")
    facts = facts or DatasetFacts(name=folder.resolve().name)
    provenance, texts = ProvenanceSummary(), []
    for record in records:
        provenance.add(record.provenance)
        texts.append(measure(from_text(record.parallel, tokenizer, record.chain.id, ""), kinds_of(record.provenance)))
    statistics = CorpusStatistics(facts.name, tuple(texts))
    dataset = make_dataset(records)

    (folder / DATA_FILE).parent.mkdir(parents=True, exist_ok=True)
    _replace(folder / DATA_FILE, lambda path: dataset.to_parquet(path))
    _write_lines(folder / REJECTS_FILE, [record.to_dict() for record in rejects])
    drafts = [{"id": each.chain.id, "draft": each.draft.to_dict()} for each in records if each.draft is not None]
    _write_lines(folder / DRAFTS_FILE, drafts)
    _write_lines(folder / STATISTICS_FILE, [{**statistics.to_dict(), "measures": provenance.measured()}], indent=1)
    if texts:
        _replace(folder / PICTURE_FILE, lambda path: save(draw(statistics), path))
    else:
        (folder / PICTURE_FILE).unlink(missing_ok=True)
    card = make_dataset_card(
        facts,
        statistics,
        provenance,
        data_file=DATA_FILE,
        picture=PICTURE_FILE,
        others=[name for name in dataset.column_names if name not in _OWN],
        rejected=Counter(record.stage for record in rejects),
    )
    _replace(folder / CARD_FILE, lambda path: path.write_text(str(card), encoding="utf-8"))
    return statistics


def make_dataset(records: Sequence[FinishedRecord]) -> Dataset:
    """The records as a dataset, in the order given.

    A column of the source whose values have no common type is kept as JSON text.
    """
    rows = [record.row() for record in records]
    names = list(dict.fromkeys([*_OWN[:-1], *sorted({name for row in rows for name in row if name not in _OWN})]))
    features = Features({name: Value("string") for name in (*names, PROVENANCE)})
    columns = {name: [row.get(name) for row in rows] for name in features}
    for name in features:
        if name not in _OWN:
            columns[name], features[name] = _typed(columns[name])
    return Dataset.from_dict(columns, features=features)


def read_lines(path: str | Path) -> Iterable[dict[str, Any]]:
    """Entries of `rejects.jsonl` or `drafts.jsonl`, one after the other; none where there is no file."""
    path = Path(path)
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)


def _typed(values: list[Any]) -> tuple[list[Any], Any]:
    """The values of a column as Arrow can hold them, and their type."""
    try:
        kind = pyarrow.array(values).type
        if pyarrow.types.is_null(kind):
            return values, Value("string")
        if not _has_no_fields(kind):
            return values, Features.from_arrow_schema(pyarrow.schema({"column": kind}))["column"]
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        pass  # of several types, or not to be written in UTF-8
    return [None if value is None else json.dumps(value, sort_keys=True) for value in values], Value("string")


def _has_no_fields(kind: pyarrow.DataType) -> bool:
    """Whether a struct without fields is in it, which no Parquet file can hold."""
    if pyarrow.types.is_struct(kind):
        return not kind.num_fields or any(_has_no_fields(each.type) for each in kind)
    return pyarrow.types.is_list(kind) and _has_no_fields(kind.value_type)


def _by_id(records: Iterable[Any], name: str) -> list[Any]:
    ordered = sorted(records, key=lambda record: record.chain.id)
    for one, other in pairwise(ordered):
        if one.chain.id == other.chain.id:
            raise ValueError(f"`{name}` holds two records with the id {one.chain.id!r}. Every chain has one result.")
    return ordered


def _clean(text: str) -> str:
    """Without lone surrogates, which models write as JSON escapes and no file in UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _write_lines(path: Path, entries: Sequence[Mapping[str, Any]], indent: int | None = None) -> None:
    """One entry a line; no file for no entries."""
    if not entries:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps(entry, ensure_ascii=False, indent=indent) + "\n" for entry in entries]
    _replace(path, lambda part: part.write_text(_clean("".join(lines)), encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    # With its ending, which says what kind of picture is drawn.
    part = path.with_name(f".part-{path.name}")
    write(part)
    os.replace(part, path)
