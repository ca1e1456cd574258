"""Turns the paper's training set, or any dataset of messages, into the rows that TRL's `SFTTrainer` takes.

Every sample has a form, and its system message asks for it: "parallel" samples think "step by step and in parallel",
"sequential" ones "step by step" (arXiv 2506.09991, section 6.1). What is malformed is found here, with its row, and
not by a loss that fails to fall. Whether a text has blocks and whether they are sound is asked of `BranchLayout`,
after the chat template and the tokenizer have made of it what the model will see.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from jinja2 import TemplateError
from multiverse.layout import BranchLayout
from multiverse.tags import TAGS, check_token_ids
from multiverse.trainer.format_report import FormatReport
from multiverse.trainer.forms import PROMPTS, Form
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
DatasetT = TypeVar("DatasetT", Dataset, DatasetDict, IterableDataset, IterableDatasetDict)

_ACTIONS = ("drop", "keep", "raise")
_MESSAGES = List({"role": Value("string"), "content": Value("string")})
_DEFECTS = List({"kind": Value("string"), "message": Value("string")})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrajectoryColumns:
    """Names of the columns of a dataset that holds a problem in both forms.

    The defaults are those of Multiverse-1K (`Multiverse4FM/Multiverse-1K`), as the scripts published with the paper
    read them. `sequential` is the trajectory of s1K-1.1 that the parallel one was made from, which is what the paper
    mixes in; `"deepseek_thinking_trajectory_sequential"` is the parallel one without its tags.

    Attributes:
        question (`str`): the user's message.
        parallel (`str`): reasoning with tags.
        sequential (`str`): reasoning in one line of thought.
        attempt (`str`): the final answer, which follows the reasoning.
    """

    question: str = "question"
    parallel: str = "deepseek_thinking_trajectory_parallel"
    sequential: str = "deepseek_thinking_trajectory"
    attempt: str = "deepseek_attempt"


def format_dataset(
    dataset: DatasetT,
    tokenizer: PreTrainedTokenizerBase,
    form: Form | None = None,
    *,
    columns: TrajectoryColumns | None = None,
    malformed: Literal["drop", "keep", "raise"] = "drop",
    num_proc: int | None = None,
) -> tuple[DatasetT, FormatReport]:
    """Makes conversational prompt-completion rows and reports the malformed ones.

    Rows come in one of three layouts, told apart by their columns:

    - `messages`: the last one is the answer; conversational `prompt` and `completion`: as they are. Other columns
      (`tools`, ...) stay;
    - the four columns of `columns`: the answer is the trajectory of `form` within `<Think>`, an empty line and the
      final attempt. Other columns are dropped.

    The system message gets the form's request as its last line; a request of either form that already stands there is
    replaced. `<Think>` may stand in both forms; any other tag in a sequential sample is a defect.

    Args:
        dataset (`Dataset`, `DatasetDict` or their streamed counterparts): the samples. A streamed dataset is read
            lazily: rows are judged, counted and (with `malformed="raise"`) refused when they are reached.
        tokenizer (`PreTrainedTokenizerBase`): with the twelve tags and a chat template; the one that will be trained
            with.
        form (`str`, *optional*): "parallel" or "sequential", for all rows. By default the column `form` decides, and
            where there is none, whether the answer has a block. The four columns hold both forms, so there it must be
            given.
        columns (`TrajectoryColumns`, *optional*): names of the four columns.
        malformed (`str`): "drop", "keep" or "raise". Kept rows have all columns, empty where nothing was given.
        num_proc (`int`, *optional*): worker processes.

    Returns:
        The dataset with the columns `prompt`, `completion`, `form` and `pair`, and the `FormatReport`. `pair` is the
        row's number in `dataset` (or its own column of that name): the two forms of a problem share it.

    Raises:
        ValueError: if an argument or the columns do not fit, the tokenizer lacks tags or a template, a split is empty,
            or `malformed="raise"` and a row is malformed.
    """
    if form is not None and form not in PROMPTS:
        raise ValueError(f"`form` must be 'parallel', 'sequential' or None, got {form!r}.")
    if malformed not in _ACTIONS:
        raise ValueError(f"`malformed` must be one of {_ACTIONS}, got {malformed!r}.")
    if not tokenizer.chat_template:
        raise ValueError("`tokenizer` has no chat template, so messages cannot be tokenised. Set one.")
    vocabulary = tokenizer.get_vocab()
    token_ids = check_token_ids({tag: vocabulary[tag] for tag in TAGS if tag in vocabulary})

    report = FormatReport(malformed)
    splits = dict(dataset) if isinstance(dataset, dict) else {None: dataset}
    sources = {
        split: _find_source(part, form, columns or TrajectoryColumns(), split) for split, part in splits.items()
    }
    parts = {
        split: _format_split(part, _RowFormatter(tokenizer, token_ids, form, sources[split]), report, split, num_proc)
        for split, part in splits.items()
    }
    streamed = any(isinstance(part, IterableDataset) for part in splits.values())
    if report.malformed:
        if malformed == "raise":
            raise ValueError(f"`dataset`: {report.summary()}")
        logger.warning("%s", report.summary())
    elif not streamed:
        logger.info("%s", report.summary())
    return (type(dataset)(parts) if isinstance(dataset, dict) else parts[None]), report


def _find_source(
    dataset: Dataset | IterableDataset, form: Form | None, columns: TrajectoryColumns, split: str | None
) -> str | TrajectoryColumns:
    """Which layout the rows come in: "messages", "prompt", or four columns."""
    where = "`dataset`" if split is None else f"`dataset[{split!r}]`"
    names = dataset.column_names or list(next(iter(dataset), {}))
    if not names or (isinstance(dataset, Dataset) and not len(dataset)):
        raise ValueError(f"{where} has no rows.")
    wanted = list(vars(columns).values())
    if "messages" in names or {"prompt", "completion"} <= set(names):
        kept = ["messages"] if "messages" in names else ["prompt", "completion"]
        for name in kept if dataset.features is not None else []:
            kind = dataset.features[name]
            inner = getattr(kind, "feature", None)
            if isinstance(kind, Value) or (isinstance(inner, dict) and not {"role", "content"} <= set(inner)):
                raise ValueError(
                    f"{where} has {kind} in its column {name!r}. Messages are wanted: a list of "
                    "{'role': ..., 'content': ...}."
                )
        return kept[0]
    if set(wanted) <= set(names):
        if form is None:
            raise ValueError(f"{where} holds both forms of every problem. Say which one as `form`.")
        return columns
    raise ValueError(
        f"{where} has the columns {names}. Wanted are 'messages', 'prompt' and 'completion', or {wanted}; other names "
        "for the latter four can be given as `columns`."
    )


def _format_split(
    dataset: Any, formatter: "_RowFormatter", report: FormatReport, split: str | None, num_proc: int | None
) -> Any:
    """One split in its new columns, malformed rows dropped if that is asked for."""
    names, features = dataset.column_names or list(next(iter(dataset))), dataset.features
    removed, messages = names, _MESSAGES
    if isinstance(formatter.source, str):
        removed = ["messages"] if formatter.source == "messages" else []
        messages = features[formatter.source] if features is not None else _MESSAGES
    if features is not None:
        # Spelled out: in a batch of rows without defects there would be nothing to tell the column's type from.
        stay = {name: kind for name, kind in features.items() if name not in removed}
        features = Features(
            stay
            | {"prompt": messages, "completion": messages, "form": Value("string"), "pair": Value("int64")}
            | {"malformed": _DEFECTS}
        )
    if isinstance(dataset, IterableDataset):
        recorded = _recording(formatter, report, split)
        formatted: Any = dataset.map(recorded, with_indices=True, remove_columns=removed, features=features)
        if report.action == "drop":
            formatted = formatted.filter(_is_sound, input_columns="malformed")
        # A list: a name given as plain text also takes the columns along whose names it contains, such as "form".
        return formatted.remove_columns(["malformed"])
    formatted = dataset.map(
        formatter,
        with_indices=True,
        remove_columns=removed,
        features=features,
        num_proc=num_proc,
        desc="Formatting samples" if split is None else f"Formatting samples of {split}",
    )
    for row, (form, defects) in enumerate(zip(formatted["form"], formatted["malformed"], strict=True)):
        report.add(split, row, form, defects)
    if report.action == "drop" and any(split == each.split for each in report.malformed):
        formatted = formatted.filter(
            _is_sound, input_columns="malformed", num_proc=num_proc, desc="Dropping malformed samples"
        )
    return formatted.remove_columns("malformed")


def _is_sound(defects: list[dict[str, str]]) -> bool:
    return not defects


def _recording(
    formatter: "_RowFormatter", report: FormatReport, split: str | None
) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """`formatter` for a stream: what it finds goes into the report, and stops the stream if that is asked for."""

    def format_and_record(row: dict[str, Any], index: int) -> dict[str, Any]:
        formatted = formatter(row, index)
        report.add(split, index, formatted["form"], formatted["malformed"])
        if formatted["malformed"] and report.action == "raise":
            raise ValueError(f"`dataset`: {report.summary()}")
        return formatted

    return format_and_record


@dataclass(frozen=True)
class _RowFormatter:
    """Formats and judges one row; a class, so that worker processes can be handed it."""

    tokenizer: PreTrainedTokenizerBase
    token_ids: dict[str, int]
    form: Form | None
    source: str | TrajectoryColumns

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        read = self._read_messages if isinstance(self.source, str) else self._read_trajectory
        prompt, completion, missing = read(row)
        defects = [_defect("missing field", message) for message in missing]
        answer = "\n".join(each["content"] or "" for each in completion if each["role"] == "assistant")
        blocks = self._layout(self.tokenizer.encode(answer, add_special_tokens=False)).blocks
        form = self.form or row.get("form")
        if form is None or form not in PROMPTS:
            if form is not None:
                defects.append(_defect("unknown form", f"{form!r} is neither 'parallel' nor 'sequential'."))
            form = "parallel" if blocks else "sequential"
        prompt = _ask_for(form, prompt)
        if not missing:
            defects += self._judge(prompt + completion)
            if form == "parallel" and not blocks:
                defects.append(_defect("no block", "the answer of a parallel sample has no <Parallel> block."))
            elif form == "sequential" and blocks:
                defects.append(_defect("unexpected block", "the answer of a sequential sample has <Parallel> blocks."))
        pair = row.get("pair")
        return {
            "prompt": prompt,
            "completion": completion,
            "form": form,
            "pair": index if pair is None else pair,
            "malformed": defects,
        }

    def _read_trajectory(self, row: dict[str, Any]) -> tuple[Messages, Messages, list[str]]:
        assert isinstance(self.source, TrajectoryColumns)
        assert self.form is not None
        names = (self.source.question, getattr(self.source, self.form), self.source.attempt)
        question, thought, attempt = (row[name].strip() if isinstance(row[name], str) else "" for name in names)
        missing = [
            f"`{name}` is empty." for name, text in zip(names, (question, thought, attempt), strict=True) if not text
        ]
        if not thought.startswith("<Think>"):
            thought = f"<Think>\n{thought}\n</Think>"
        prompt = [{"role": "user", "content": question}]
        return prompt, [{"role": "assistant", "content": f"{thought}\n\n{attempt}"}], missing

    def _read_messages(self, row: dict[str, Any]) -> tuple[Messages, Messages, list[str]]:
        if self.source == "messages":
            messages = list(row["messages"] or [])
            answered = bool(messages) and messages[-1]["role"] == "assistant"
            prompt, completion = (messages[:-1], messages[-1:]) if answered else (messages, [])
        else:
            prompt, completion = list(row["prompt"] or []), list(row["completion"] or [])
        missing = []
        if not any(each["role"] == "user" and _has_text(each) for each in prompt):
            missing.append("no message of the user stands before the answer.")
        if not completion or completion[-1]["role"] != "assistant" or not _has_text(completion[-1]):
            missing.append("the last message is no answer of the assistant, or has no text.")
        return prompt, completion or [{"role": "assistant", "content": ""}], missing

    def _layout(self, ids: list[int]) -> BranchLayout:
        return BranchLayout.from_token_ids(ids, self.token_ids)

    def _judge(self, messages: Messages) -> list[dict[str, str]]:
        """Defects of the tokenised conversation, tags that the question brings in included."""
        try:
            encoded: Any = self.tokenizer.apply_chat_template(messages, return_dict=True)
        except TemplateError as error:
            return [_defect("refused by the chat template", f"{error}.")]
        problems = self._layout(encoded["input_ids"]).problems
        return [_defect(problem.kind, f"token {problem.index}: {problem.message}") for problem in problems]


def _ask_for(form: str, prompt: Messages) -> Messages:
    """The prompt with the form's request as the last line of its system message."""
    if not prompt or prompt[0]["role"] != "system":
        return [{"role": "system", "content": PROMPTS[form]}, *prompt]
    lines = (prompt[0]["content"] or "").splitlines()
    if lines and lines[-1] in PROMPTS.values():
        lines.pop()
    return [{**prompt[0], "content": "\n".join([*lines, PROMPTS[form]])}, *prompt[1:]]


def _has_text(message: dict[str, Any]) -> bool:
    return isinstance(message["content"], str) and bool(message["content"].strip())


def _defect(kind: str, message: str) -> dict[str, str]:
    return {"kind": kind, "message": message}
