"""How rows of a dataset become questions: which columns are read, and what is taken from them."""

import hashlib
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from multiverse.curator.final_answer import stated_answer
from multiverse.curator.sources import Row
from multiverse.evaluation.judge import AnswerKind

AnswerFormat = Literal["plain", "integer", "boxed", "hashes"]

#: By which options are named.
LETTERS = string.ascii_uppercase

_INTEGER = re.compile(r"(-?)0*(\d+)(?:\.0+)?")
_UNIT = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°")


@dataclass(frozen=True)
class Question:
    """What a model is asked, and what is right.

    Attributes:
        id (`str`): what tells it from the task's other questions.
        text (`str`): the question, without its options and without any instruction.
        expected (`str`): the right answer; of a choice the option's letter.
        kind (`str`): how an answer is judged, see `multiverse.evaluation.judge`.
        choices (`tuple[str, ...]`): texts of the options A, B, ..., in the order in which they are shown.
    """

    id: str
    text: str
    expected: str
    kind: AnswerKind
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskData:
    r"""Which rows of a dataset are a task's questions.

    What is left out is as the built-in task has it. Defaults are those of a dataset of your own.

    Attributes:
        path (`str` or `Path`, *optional*): a `.csv`, `.json`, `.jsonl` or `.parquet` file, a folder that
            `load_dataset` or `load_from_disk` can read, or a Hub id. What exists here comes before the Hub.
        question (`str`, *optional*): column of the question, by default `"question"`.
        answer (`str`, *optional*): column of the right answer, by default `"answer"`. Where there are options, it
            names one: a letter, the option's text, or as a number its place from 0.
        choices (`str` or `tuple[str, ...]`, *optional*): column that holds a list of options, or several columns with
            an option each, of which `answer` may be one. An empty cell is no option.
        kind (`str`, *optional*): how answers are judged, by default `"choice"` where there are options, else `"math"`.
            `"number"` is for questions that ask for a whole number after `Answer:` themselves.
        answer_format (`str`, *optional*): what is taken from the answer's column:

            - `"plain"`, the default: the text as it stands;
            - `"integer"`: a whole number, without leading zeros, dollars and degree sign (`073` is 73). What is taken
              for the kind `"number"` is made one in any case;
            - `"boxed"`: what the last `\boxed{...}` holds, for worked solutions as in MATH;
            - `"hashes"`: what follows the last `####`, without commas, as in GSM8K.
        shuffle (`bool`, *optional*): whether options are put in an order of their own, see `choice_order`.
        id (`str`, *optional*): column that tells rows apart, by default the task's name with the row's number.
        split (`str`, *optional*): of a source that has several, by default `"test"`.
        config (`str`, *optional*): subset of a dataset on the Hub.
        revision (`str`, *optional*): commit, branch or tag of a dataset on the Hub.
    """

    path: str | Path | None = None
    question: str | None = None
    answer: str | None = None
    choices: str | tuple[str, ...] | None = None
    kind: AnswerKind | None = None
    answer_format: AnswerFormat | None = None
    shuffle: bool | None = None
    id: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.choices, list):  # as it comes from JSON
            object.__setattr__(self, "choices", tuple(self.choices))
        for name, allowed in (("kind", get_args(AnswerKind)), ("answer_format", get_args(AnswerFormat))):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if isinstance(self.choices, tuple) and not 2 <= len(set(self.choices)) == len(self.choices) <= len(LETTERS):
            raise ValueError(f"`choices` must name 2 to {len(LETTERS)} columns, each once, got {self.choices}.")

    def over(self, defaults: "TaskData") -> "TaskData":
        """With what is left out here taken from `defaults`; subset and revision belong to the dataset they are of."""
        if self.path not in (None, defaults.path):
            defaults = replace(defaults, config=None, revision=None)
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(defaults, **{name: value for name, value in own.items() if value is not None})


def choice_order(question: str, choices: Sequence[str], seed: int) -> list[int]:
    """The order in which shuffled options are shown.

    Options are sorted by the SHA-256 of seed, question and option, joined by line breaks, in UTF-8. So the order of
    one question depends on nothing but itself and the seed, neither on other rows nor on the order in the file, and
    every order is equally likely: the right letter is balanced over many questions.

    Args:
        question (`str`): text of the question.
        choices (sequence of `str`): the options as they stand.
        seed (`int`): is published with the run.

    Returns:
        `list[int]`: places in `choices` of the options A, B, ...
    """

    def key(place: int) -> tuple[bytes, int]:
        text = "\n".join((str(seed), question, choices[place]))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), place

    return sorted(range(len(choices)), key=key)


class RowReader:
    """Makes questions of rows."""

    def __init__(self, name: str, data: TaskData, seed: int) -> None:
        self.name, self.seed, self.where, self.id = name, seed, str(data.path), data.id
        self.text, self.answer, self.choices = str(data.question), str(data.answer), data.choices
        self.kind: AnswerKind = data.kind or ("choice" if data.choices else "math")
        self.format: AnswerFormat = data.answer_format or "plain"
        self.shuffle = bool(data.shuffle)
        if (self.kind == "choice") != bool(self.choices):
            have = "options" if self.choices else "no options"
            raise ValueError(
                f"`kind` is {self.kind!r}, but there are {have}. Name the columns of the options as `choices` for "
                "'choice', and for nothing else."
            )

    def check(self, names: Iterable[str]) -> None:
        """Refuses rows that lack a column."""
        names = list(names)
        listed = self.choices if isinstance(self.choices, tuple) else [self.choices] if self.choices else []
        wanted = [("question", self.text), ("answer", self.answer), *(("choices", each) for each in listed)]
        wanted += [("id", self.id)] if self.id is not None else []
        missing = ", ".join(f"{field}={name!r}" for field, name in wanted if name not in names)
        if missing:
            raise ValueError(f"`data`: {self.where} has no column for {missing}. It has {names}. Name the right ones.")

    def question(self, number: int, row: Row) -> Question:
        """What a row asks."""
        text = self._cell(number, row, self.text)
        own = f"{self.name}-{number:04d}" if self.id is None else self._cell(number, row, self.id)
        if self.choices is None:
            return Question(own, text, self._expected(number, row), self.kind)
        options = self._options(number, row, self.choices)
        right = self._right(number, row, options)
        places = list(options)
        if self.shuffle:
            places = [places[each] for each in choice_order(text, list(options.values()), self.seed)]
        return Question(own, text, LETTERS[places.index(right)], self.kind, tuple(options[place] for place in places))

    def _cell(self, number: int, row: Row, column: str) -> str:
        """The text in a column."""
        value = row.get(column)
        text = _plain(value)
        if text is None:
            raise ValueError(
                f"`data`: column {column!r} holds {type(value).__name__} in row {number} of {self.where}. Name a "
                "column of texts or numbers."
            )
        if not text:
            # Left out, it would change what the other figures are a share of.
            raise ValueError(
                f"`data`: row {number} of {self.where} has nothing in column {column!r}. Fill it in, or take the row "
                "out of the file."
            )
        return text

    def _expected(self, number: int, row: Row) -> str:
        text = self._cell(number, row, self.answer)
        expected = _FORMATS[self.format](text)
        if self.kind == "number":
            expected = _integer(expected)
        if not expected:
            raise ValueError(
                f"`answer_format` is {self.format!r} (`kind` {self.kind!r}), but row {number} of {self.where} has "
                f"{text[:80]!r} in column {self.answer!r}. Choose what fits of {', '.join(map(repr, _FORMATS))}."
            )
        return expected

    def _options(self, number: int, row: Row, columns: str | tuple[str, ...]) -> dict[int, str]:
        """Texts of the options by their places; where there is none, there is no option."""
        listed = [row.get(column) for column in columns] if isinstance(columns, tuple) else row.get(columns)
        texts = [_plain(each) for each in listed] if isinstance(listed, list | tuple) else [None]
        if None in texts:
            raise ValueError(
                f"`choices`: {columns!r} holds {type(listed).__name__} in row {number} of {self.where}. Name a column "
                "of lists of texts, or several columns with an option each."
            )
        options = {place: text for place, text in enumerate(texts) if text}
        if len(options) < 2 or len(texts) > len(LETTERS):
            raise ValueError(
                f"`choices`: row {number} of {self.where} has {len(options)} options. Letters name between 2 and "
                f"{len(LETTERS)}."
            )
        return options

    def _right(self, number: int, row: Row, options: Mapping[int, str]) -> int:
        """The place of the right option."""
        value, text = row.get(self.answer), self._cell(number, row, self.answer)
        if isinstance(self.choices, tuple) and self.answer in self.choices:
            return self.choices.index(self.answer)
        if isinstance(value, int) and not isinstance(value, bool):
            found = {value} & set(options)
        else:
            found = {place for place, option in options.items() if text in (option, LETTERS[place])}
        if len(found) != 1:
            raise ValueError(
                f"`answer`: row {number} of {self.where} has {text[:80]!r} in column {self.answer!r}, which names "
                f"{len(found)} of its {len(options)} options. Give a letter, a number from 0, or an option's text."
            )
        return found.pop()


def _plain(value: Any) -> str | None:
    """A value as text, empty where nothing stands; `None` where it is neither text nor number."""
    # What pandas leaves where there is nothing is no number.
    if value is None or value != value:
        return ""
    return str(value).strip() if isinstance(value, str | int | float) else None


def _integer(text: str) -> str:
    found = _INTEGER.fullmatch(_UNIT.sub("", text).strip(" $"))
    return found[1] + found[2] if found else ""


def _boxed(text: str) -> str:
    stated = stated_answer(text) or ""
    # Where no box is closed, it is what follows "the answer is".
    return stated if re.search(rf"\\(?:boxed|fbox)\{{\s*{re.escape(stated)}\s*\}}", text) else ""


def _after_hashes(text: str) -> str:
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""


#: What each format takes from a text; nothing where there is none.
_FORMATS: dict[AnswerFormat, Callable[[str], str]] = {
    "plain": str.strip,
    "integer": _integer,
    "boxed": _boxed,
    "hashes": _after_hashes,
}
