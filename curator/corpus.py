"""Reads any tagged corpus (texts, folders of them, rows, repositories) for its statistics."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from multiverse.curator.sources import ROW_FILES, Row, Source, open_rows
from multiverse.curator.statistics import CorpusStatistics, TextStatistics, kinds_of, measure
from multiverse.hub_card.view import COLUMNS, from_row, from_text
from multiverse.trainer.formatting import TrajectoryColumns
from transformers import PreTrainedTokenizerBase

#: Where texts are looked for in a row, in this order.
TEXT_COLUMNS = (TrajectoryColumns().parallel, *COLUMNS)


def measure_corpus(
    source: Source,
    *,
    column: str | None = None,
    split: str = "train",
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    name: str | None = None,
) -> CorpusStatistics:
    """The figures of a corpus.

    Args:
        source (`str`, `Path` or a dataset): a file with one text; a file of rows; a folder, whose `.txt` files and
            files of rows are read, or a dataset's folder; a Hub id; or a loaded dataset.
        column (`str`, *optional*): of rows, with a text or messages. By default the first of
            `deepseek_thinking_trajectory_parallel`, `text`, `messages` and `completion` that is there.
        split (`str`): of a source that has several.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): counts tokens; words are counted without one.
        limit (`int`, *optional*): most texts to read.
        name (`str`, *optional*): of the corpus, by default the source's.

    Raises:
        ValueError: if the source cannot be read, lacks the column or holds no text.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}. Give a positive number, or None for all texts.")
    texts: list[TextStatistics] = []
    skipped: list[str] = []
    for where, read in _texts(source, column, split, tokenizer):
        if limit is not None and len(texts) >= limit:
            break
        try:
            texts.append(read())
        except ValueError as error:
            # One empty row among many is a fact about the corpus, not a reason to say nothing of the others.
            skipped.append(f"{where}: {error}")
    if name is None:
        path = Path(source) if isinstance(source, str | Path) else None
        # A Hub id tells more as it is.
        name = "dataset" if path is None else path.resolve().name if path.exists() else str(source)
    if not texts:
        raise ValueError(f"`source`: {name} holds no text. {skipped[0] if skipped else 'It is empty.'}")
    return CorpusStatistics(name, tuple(texts), tuple(skipped))


def _texts(
    source: Source, column: str | None, split: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[tuple[str, Callable[[], TextStatistics]]]:
    """Every text's name, and what reads it."""
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and path.is_file() and path.suffix not in ROW_FILES:
        yield path.name, partial(_measure_file, path, tokenizer, path.name)
        return
    files = _files(path) if path is not None and path.is_dir() else []
    for file in files:
        assert path is not None
        where = str(file.relative_to(path))
        if file.suffix in ROW_FILES:
            yield from _rows(file, column, split, tokenizer, where)
        else:
            yield where, partial(_measure_file, file, tokenizer, where)
    if not files:
        yield from _rows(source, column, split, tokenizer, str(source) if path is not None else "dataset")


def _files(folder: Path) -> list[Path]:
    """Texts and files of rows below a folder; none for a folder that is one dataset."""
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return []
    card = folder / "README.md"
    # A card that names data files says that the other files are none.
    if card.is_file() and "configs" in (metadata_load(card) or {}):
        return []
    found = (file for file in folder.rglob("*") if file.suffix in (".txt", *ROW_FILES) and file.is_file())
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[Any]:
    """Key that sorts `entry_2` before `entry_10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _rows(
    source: Source, column: str | None, split: str, tokenizer: PreTrainedTokenizerBase | None, where: str
) -> Iterator[tuple[str, Callable[[], TextStatistics]]]:
    rows, names = open_rows(source, split)
    column = column or next((each for each in TEXT_COLUMNS if each in names), None)
    if column is None or column not in names:
        wanted = f"{column!r}" if column else f"none of {TEXT_COLUMNS}"
        raise ValueError(f"`column`: {where} has {wanted} among its columns {names}. Name one that it has.")
    for number, row in enumerate(rows):
        name = f"{where}, row {number}"
        yield name, partial(_measure_row, row, column, tokenizer, name)


def _measure_row(row: Row, column: str, tokenizer: PreTrainedTokenizerBase | None, name: str) -> TextStatistics:
    # A report would turn what is possible into what was measured.
    plain = {each: value for each, value in row.items() if each != "report"}
    return measure(from_row(plain, column, tokenizer, name), kinds_of(row.get("provenance")))


def _measure_file(path: Path, tokenizer: PreTrainedTokenizerBase | None, name: str) -> TextStatistics:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no text in UTF-8: {error.reason} at byte {error.start}.") from error
    return measure(from_text(text, tokenizer, name))
