"""Reads chains of thought from wherever `datasets` finds rows, one after the other."""

import csv
import datetime
import decimal
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain as joined
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from multiverse.curator.records import Chain

Row: TypeAlias = Mapping[str, Any]
Source: TypeAlias = str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict

#: Endings of files that hold rows.
ROW_FILES = (".csv", ".json", ".jsonl", ".parquet")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ColumnMap:
    """Names of the columns of a dataset of chains of thought.

    The defaults are those of s1K-1.1 (`simplescaling/s1K-1.1`). All other columns are kept as they are.

    Attributes:
        question (`str`): the user's message.
        trajectory (`str`): the chain of thought.
        attempt (`str`): the final answer in full, as it followed the chain.
        answer (`str`, *optional*): the answer that is known to be right; `None` where there is none.
        id (`str`, *optional*): what tells a row from others; by default the row's number and a hash of its text.
    """

    question: str = "question"
    trajectory: str = "deepseek_thinking_trajectory"
    attempt: str = "deepseek_attempt"
    answer: str | None = "solution"
    id: str | None = None

    @property
    def needed(self) -> dict[str, str]:
        """The columns without whose text there is nothing to do, by attribute."""
        return {"question": self.question, "trajectory": self.trajectory, "attempt": self.attempt}

    def check(self, names: Iterable[str], where: str = "`source`") -> None:
        """Refuses rows that lack a column.

        Args:
            names (iterable of `str`): of the columns that are there.
            where (`str`): what the rows are from, for the message.

        Raises:
            ValueError: if a column that is named here is not among them.
        """
        names = list(names)
        missing = {field: name for field, name in asdict(self).items() if name is not None and name not in names}
        if missing:
            wanted = ", ".join(f"{field}={name!r}" for field, name in missing.items())
            less = " (`answer` and `id` may be None)" if missing.keys() & {"answer", "id"} else ""
            raise ValueError(
                f"`columns`: {where} has no column for {wanted}. It has {names}. Name the right ones{less}."
            )


class EmptyRow(NamedTuple):
    """A row that was left out.

    Attributes:
        row (`int`): its number, from 0.
        columns (`tuple[str, ...]`): those in which no text stands.
    """

    row: int
    columns: tuple[str, ...]


class ChainReader(Iterator[Chain]):
    """The chains of a source in order; what `read_chains` gives.

    Attributes:
        skipped (`list[EmptyRow]`): the rows that were left out so far.
    """

    def __init__(
        self, rows: Iterable[Row], columns: ColumnMap, limit: int | None, empty: Literal["skip", "raise"], where: str
    ) -> None:
        self.skipped: list[EmptyRow] = []
        self._columns, self._empty, self._where = columns, empty, where
        self._unwritable: set[str] = set()
        self._chains = self._read(rows, limit)

    def __next__(self) -> Chain:
        return next(self._chains)

    def _read(self, rows: Iterable[Row], limit: int | None) -> Iterator[Chain]:
        seen: dict[str, int] = {}
        for number, row in enumerate(rows):
            chain = self._chain(number, row)
            if chain is None:
                continue
            if chain.id in seen:
                raise ValueError(
                    f"`columns`: rows {seen[chain.id]} and {number} of {self._where} have the same id {chain.id!r} in "
                    f"column {self._columns.id!r}. Name a column that tells rows apart, or none."
                )
            seen[chain.id] = number
            yield chain
            # Here, so that no row is read for nothing.
            if len(seen) == limit:
                break
        if self.skipped:
            listed = ", ".join(f"row {each.row} ({', '.join(each.columns)})" for each in self.skipped[:10])
            more = f" and {len(self.skipped) - 10} more" if len(self.skipped) > 10 else ""
            logger.warning("%s: %d empty rows skipped: %s%s", self._where, len(self.skipped), listed, more)

    def _chain(self, number: int, row: Row) -> Chain | None:
        texts = {field: row.get(name) for field, name in self._columns.needed.items()}
        for field, text in texts.items():
            if not isinstance(text, str | None):
                name = self._columns.needed[field]
                raise ValueError(
                    f"`columns`: {field}={name!r} holds {type(text).__name__} in row {number} of {self._where}. Name "
                    "a column of texts."
                )
        empty = tuple(self._columns.needed[field] for field, text in texts.items() if not (text or "").strip())
        if empty:
            if self._empty == "raise":
                raise ValueError(
                    f"`empty` is 'raise', and row {number} of {self._where} has no text in {', '.join(empty)}. Mend "
                    "it, or pass `empty='skip'`."
                )
            self.skipped.append(EmptyRow(number, empty))
            return None
        question, trajectory, attempt = (str(text) for text in texts.values())
        answer = _plain_text(row.get(self._columns.answer) if self._columns.answer else None)
        if self._columns.id is None:
            content = json.dumps([question, trajectory, attempt], ensure_ascii=False)
            # Lone surrogates are text to JSON, but not to UTF-8.
            digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
            own = f"{number:06d}-{digest[:12]}"
        else:
            own = _plain_text(row.get(self._columns.id)) or ""
            if not own:
                raise ValueError(
                    f"`columns`: row {number} of {self._where} has no id in column {self._columns.id!r}. Name another "
                    "column, or none."
                )
        return Chain(own, question, trajectory, attempt, answer, self._others(row))

    def _others(self, row: Row) -> dict[str, Any]:
        """The other columns in values that go to JSON and back."""
        others = {}
        for name, value in row.items():
            if name in asdict(self._columns).values():
                continue
            try:
                others[name] = _plain(value)
            except TypeError:
                if name not in self._unwritable:
                    self._unwritable.add(name)
                    kind = type(value).__name__
                    logger.warning("%s: column %r holds %s and is left out", self._where, name, kind)
        return others


def read_chains(
    source: Source,
    columns: ColumnMap | None = None,
    limit: int | None = None,
    split: str = "train",
    *,
    empty: Literal["skip", "raise"] = "skip",
) -> ChainReader:
    """Reads the chains of a dataset. Files and repositories are streamed, so nothing large is held or copied.

    Args:
        source (`str`, `Path` or a dataset): a Hub id; a `.parquet`, `.jsonl`, `.json` or `.csv` file; a folder that
            `load_dataset` or `load_from_disk` can read; or a `Dataset`, `DatasetDict` or their streamed counterparts.
        columns (`ColumnMap`, *optional*): names of the columns, by default those of s1K-1.1.
        limit (`int`, *optional*): most chains to give.
        split (`str`): of a source that has several.
        empty (`str`): what happens to a row without question, chain or attempt: `"skip"` (it is reported) or
            `"raise"`.

    Returns:
        `ChainReader`: an iterator of `Chain`; it knows which rows it has skipped.

    Raises:
        ValueError: at once, if the source cannot be opened or lacks a column; on the way, if a row does not fit.

    Example:

    ```python
    >>> from multiverse.curator.sources import ColumnMap, read_chains
    >>> chains = read_chains("chains.jsonl", ColumnMap(trajectory="thought", attempt="reply", answer=None))
    ```
    """
    columns = columns or ColumnMap()
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}. Give a positive number, or None for all rows.")
    if empty not in ("skip", "raise"):
        raise ValueError(f"`empty` must be 'skip' or 'raise', got {empty!r}.")
    where = str(source) if isinstance(source, str | Path) else "`source`"
    rows, names = open_rows(source, split)
    columns.check(names, where)
    return ChainReader(rows, columns, limit, empty, where)


def open_rows(source: Source, split: str = "train") -> tuple[Iterable[Row], list[str]]:
    """Opens anything that holds rows.

    Args:
        source: as for `read_chains`.
        split (`str`): of a source that has several.

    Returns:
        `tuple`: the rows, and the names of their columns.

    Raises:
        ValueError: if the source does not exist, cannot be read or is empty, or has no such split.
    """
    if isinstance(source, str | Path):
        rows, where = _open_path(source, split), str(source)
    else:
        rows, where = source, "`source`"
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        if split not in rows:
            raise ValueError(f"`split` is {split!r}, but {where} has {sorted(map(str, rows))}. Name one of them.")
        rows = rows[split]
    names = rows.column_names if isinstance(rows, Dataset | IterableDataset) else None
    if isinstance(rows, Dataset) and len(rows):
        return rows, list(names or [])
    # Nothing is known of a stream before its first row has come.
    iterator = iter(rows)
    try:
        first = next(iterator, None)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(where, error) from error
    if first is None:
        raise ValueError(f"`source`: {where} has no rows.")
    return joined([first], iterator), list(names or first)


def _open_path(source: str | Path, split: str) -> Any:
    path = Path(source)
    options: dict[str, Any] = {"data_files": {split: str(path)}, "split": split, "streaming": True}
    try:
        if path.is_dir():
            if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
                return load_from_disk(path)
            return load_dataset(str(path), split=split, streaming=True)
        if path.suffix in ROW_FILES or path.is_file():
            if not path.is_file():
                raise ValueError(f"`source`: the file {path} does not exist.")
            if path.suffix == ".parquet":
                return load_dataset("parquet", **options)
            if path.suffix == ".csv":
                # As text: an answer "007" or "NA" is to stay what it is.
                features = Features({name: Value("string") for name in _csv_header(path)})
                return load_dataset("csv", **options, features=features, keep_default_na=False)
            if path.suffix in (".json", ".jsonl"):
                return _json_rows(path)
            raise ValueError(f"`source`: {path} has none of the endings {', '.join(ROW_FILES)}.")
        splits = get_dataset_split_names(str(source))
        if split not in splits:
            raise ValueError(f"`split` is {split!r}, but {source} has {splits}. Name one of them.")
        return load_dataset(str(source), split=split, streaming=True)
    except ValueError as error:
        raise _unreadable(str(source), error) from error
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"`source`: {source} is no file, no folder and no dataset that could be loaded from the Hub: {error}"
        ) from error


def _unreadable(where: str, error: Exception) -> ValueError:
    """An error that names the source, as some do already."""
    return ValueError(str(error) if str(error).startswith("`") else f"`source`: {where} cannot be read: {error}")


def _json_rows(path: Path) -> Iterator[Row]:
    """Rows of a `.jsonl` file or of a `.json` list. Not by way of Arrow, where every value of a column has one type:
    an answer may be a number in one row and text in the next."""
    place = 0
    try:
        with path.open(encoding="utf-8") as file:
            whole = json.load(file) if path.suffix == ".json" else None
            listed: Iterable[Any] = file if whole is None else whole if isinstance(whole, list) else [whole]
            for each in listed:
                place += 1
                if whole is None and not each.strip():
                    continue
                row = json.loads(each) if whole is None else each
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__} is no object with columns.")
                yield row
    except ValueError as error:
        raise ValueError(f"`source`: {path} does not hold rows in JSON (entry {max(place, 1)}): {error}") from error


def _csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _plain_text(value: Any) -> str | None:
    """A short text, which files may hold as a number."""
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return text or None


def _plain(value: Any) -> Any:
    """The value in JSON's types.

    Raises:
        TypeError: if it has none of them.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    raise TypeError(type(value).__name__)
