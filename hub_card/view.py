"""Finds a text where it is (a file, a row of a dataset, the answer of a checkpoint) and writes the page about it."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from multiverse.generation.output import MultiverseGenerateOutput
from multiverse.hub_card.page import TaggedText, render_page
from multiverse.layout import BranchLayout
from multiverse.tags import TAGS
from multiverse.trainer.forms import PARALLEL_PROMPT
from transformers import AutoTokenizer, PreTrainedTokenizerBase

#: Endings of files that hold rows; any other file is one text.
ROW_FILES = (".json", ".jsonl", ".parquet")
#: Looked for in a row, in this order.
COLUMNS = ("text", "messages", "completion")

_TAG = re.compile(f"({'|'.join(map(re.escape, TAGS))})")
# Blanks go with the word after them, those at the end with the last word; alone they stand for a separator.
_WORD = re.compile(r"\s*\S+(?:\s+\Z)?|\s+")
# What begins any turn, and the model's, in ChatML and in Llama 3's form.
_CHAT_TURNS = (
    ("<|im_start|>", "<|im_start|>assistant\n"),
    ("<|start_header_id|>", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
)


def view(
    source: str | Path,
    output: str | Path = "page.html",
    *,
    tokenizer: str | Path | None = None,
    column: str | None = None,
    row: int | None = None,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
) -> TaggedText:
    """Writes one self-contained HTML page about a text.

    Args:
        source (`str` or `Path`): a file with a generated text, chat prompt included or not; a `.jsonl`, `.json` or
            `.parquet` file of rows; or the folder of a checkpoint, which is asked.
        output (`str` or `Path`): of the page; a file that is there is replaced.
        tokenizer (`str` or `Path`, *optional*): folder or Hub id. A tag counts as one token whether it knows it or
            not. Without one, words are counted.
        column (`str`, *optional*): of the rows: text, or messages whose last answer is shown with what came before it
            as the prompt. By default the first of `text`, `messages` and `completion` that is there. A column `report`
            (`RequestReport.to_dict()`) makes the timeline a measured one.
        row (`int`, *optional*): number of the row, from 0, which is the default.
        prompt (`str`, *optional*): what a checkpoint is asked.
        system (`str`, *optional*): system message of a checkpoint with a chat template, by default the one that asks
            for parallel thinking; empty for none.
        max_new_tokens (`int`, *optional*): longest answer of a checkpoint, 512 by default.

    Returns:
        `TaggedText`: what the page shows.

    Raises:
        ValueError: if an argument does not go with the source, or the source holds no such text.
    """
    source, output = Path(source), Path(output)
    asked = {"prompt": prompt, "system": system, "max_new_tokens": max_new_tokens}
    listed = {"column": column, "row": row}
    is_file = source.is_file()
    if not is_file and not (source / "config.json").is_file():
        raise ValueError(f"`source` ({source}) is neither a file nor the folder of a checkpoint. Name one of them.")
    if is_file and output.exists() and output.samefile(source):
        raise ValueError(f"`output` ({output}) is the source itself. Name another file.")
    if not is_file:
        _refuse(
            {**listed, "tokenizer": tokenizer}, f"{source} is a checkpoint, which has its own tokenizer and no rows"
        )
        if not prompt:
            raise ValueError(f"`prompt` is {prompt!r}, but the checkpoint {source} must be asked something. Pass one.")
        system = PARALLEL_PROMPT if system is None else system
        text = answered(source, prompt, system, 512 if max_new_tokens is None else max_new_tokens)
    else:
        _refuse(asked, f"{source} is a file, and only checkpoints are asked")
        loaded = _load_tokenizer(tokenizer) if tokenizer is not None else None
        if source.suffix in ROW_FILES:
            text = from_row(read_row(source, row or 0), column, loaded, f"{source.name}, row {row or 0}")
        else:
            _refuse(listed, f"{source} is one text; rows are read from {', '.join(ROW_FILES)} files")
            text = from_text(_read(source), loaded, source.name)
    output.write_text(render_page([text], text.name), encoding="utf-8", errors="replace")
    return text


def from_text(
    text: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "text",
    prompt: str | None = None,
    report: Mapping[str, Any] | None = None,
) -> TaggedText:
    """The structure of a text that is not given in ids.

    Args:
        text (`str`): with tags.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): counts the tokens; words are counted without one.
        name (`str`): heading of its section.
        prompt (`str`, *optional*): what stood before it; by default a chat prompt (ChatML, Llama 3) at its beginning.
        report (`Mapping`, *optional*): `RequestReport.to_dict()` of the generation that made it.

    Raises:
        ValueError: if the text is empty, or the report is of another one.
    """
    if prompt is None:
        prompt, text = split_prompt(text)
    if not text.strip():
        raise ValueError(f"{name} holds no text. Name another file, row or column.")
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    free = max(vocabulary.values(), default=-1) + 1
    token_ids = {tag: vocabulary.get(tag, free + number) for number, tag in enumerate(TAGS)}
    ids: list[int] = []
    offsets: list[int] = []
    at = 0
    # Split at the tags first: these need not be in the vocabulary.
    for piece in [*_TAG.split(prompt), None, *_TAG.split(text)]:
        if piece is None:
            start = len(ids)
        elif piece in token_ids:
            ids.append(token_ids[piece])
            offsets.append(at)
        elif piece:
            more, places = _tokens(piece, tokenizer, free + len(TAGS))
            ids += more
            offsets += [at + place for place in places]
        at += len(piece or "")
    offsets.append(at)
    layout, whole = BranchLayout.from_token_ids(ids, token_ids), prompt + text
    unit = "words" if tokenizer is None else "tokens"
    return TaggedText(name, layout, lambda a, b: whole[offsets[a] : offsets[b]], start, unit, report)


def from_output(
    output: MultiverseGenerateOutput,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Mapping[str, int],
    prompt_length: int,
    row: int = 0,
    name: str = "answer",
) -> TaggedText:
    """One row of what `generate(return_dict_in_generate=True)` returned, with its measured steps.

    Args:
        output (`MultiverseGenerateOutput`): the batch.
        tokenizer (`PreTrainedTokenizerBase`): turns ids into text.
        token_ids (`Mapping[str, int]`): id of every tag, `model.config.multiverse_token_ids`.
        prompt_length (`int`): columns of `input_ids`, padding included.
        row (`int`): of the batch.
        name (`str`): heading of its section.
    """
    assert output.sequences is not None and output.branch_ids is not None and output.reports is not None  # noqa: PT018
    real = output.branch_ids[row] >= 0
    ids = output.sequences[row][real].tolist()
    layout = BranchLayout.from_token_ids(ids, token_ids)
    start = int(real[:prompt_length].sum())

    def text_of(first: int, end: int) -> str:
        return str(tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False))

    return TaggedText(name, layout, text_of, start, report=output.reports[row].to_dict())


def from_row(
    row: Mapping[str, Any], column: str | None, tokenizer: PreTrainedTokenizerBase | None, name: str
) -> TaggedText:
    """The text of one row of a dataset, see `view`."""
    column = column or next((each for each in COLUMNS if each in row), None)
    if column is None or column not in row:
        wanted = f"{column!r}" if column else f"none of {COLUMNS}"
        raise ValueError(f"`column`: {name} has {wanted} among its columns {sorted(row)}. Name one that it has.")
    content, report, prompt = row[column], row.get("report"), None
    if column == "completion" and row.get("prompt"):
        prompt = row["prompt"]
    if isinstance(content, Sequence) and not isinstance(content, str):
        earlier = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else []
        prompt, content = _conversation([*earlier, *content], tokenizer, f"column {column!r} of {name}")
    if not isinstance(content, str) or not isinstance(prompt, str | None):
        raise ValueError(
            f"`column`: {column!r} of {name} holds {type(content).__name__}. Text is wanted, or messages: a list of "
            "{'role': ..., 'content': ...}."
        )
    return from_text(content, tokenizer, name, prompt, json.loads(report) if isinstance(report, str) else report)


def answered(folder: Path, prompt: str, system: str, max_new_tokens: int) -> TaggedText:
    """What a checkpoint answers, with its measured steps."""
    from multiverse import MultiverseForCausalLM

    model = MultiverseForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = _load_tokenizer(folder)
    if not model.config.multiverse_token_ids:
        raise ValueError(f"`source` ({folder}) has no Multiverse tags. Name a checkpoint that was trained with them.")
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    output: Any = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    return from_output(output, tokenizer, model.config.multiverse_token_ids, length, name=prompt)


def read_row(path: Path, number: int) -> dict[str, Any]:
    """One row of a `.json` (a list of rows, or a single one), `.jsonl` or `.parquet` file.

    Raises:
        ValueError: if there is no such row, or it cannot be read.
        ImportError: if a `.parquet` file is given and pyarrow is missing.
    """
    if number < 0:
        raise ValueError(f"`row` must not be negative, got {number}.")
    if path.suffix == ".parquet":
        rows, count = _parquet_row(path, number)
    else:
        lines = enumerate(_read(path).splitlines()) if path.suffix == ".jsonl" else [(0, _read(path))]
        texts = [(at, text) for at, text in lines if text.strip()]
        wanted = texts if path.suffix == ".json" else list(islice(texts, number, number + 1))
        rows, count = [], len(texts)
        for at, text in wanted:
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise ValueError(f"`source`: line {at + error.lineno} of {path} is no JSON: {error.msg}.") from error
        if path.suffix == ".json" and rows:
            listed = rows[0] if isinstance(rows[0], list) else rows
            rows, count = listed[number : number + 1], len(listed)
    if not rows:
        raise ValueError(f"`row` is {number}, but {path} has {count} rows, counted from 0.")
    if not isinstance(rows[0], dict):
        raise ValueError(f"`source`: row {number} of {path} is {type(rows[0]).__name__}, not an object with columns.")
    return rows[0]


def split_prompt(text: str) -> tuple[str, str]:
    """Takes a text with chat turns apart: what the model was given, and what it wrote.

    Shown is its last turn that holds a tag, or its last where none does, up to the turn after it: logs say more before
    and after the conversation, which the model has not seen. A text without turns has an empty prompt.
    """
    for opening, own in _CHAT_TURNS:
        turns = [text[: text.find(opening)], *(opening + turn for turn in text.split(opening)[1:])]
        answers = [number for number, turn in enumerate(turns) if turn.startswith(own)]
        if answers:
            shown = next((number for number in reversed(answers) if _TAG.search(turns[number])), answers[-1])
            return "".join([*turns[1:shown], own]), turns[shown].removeprefix(own)
    return "", text


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase | None, word: int) -> tuple[list[int], list[int]]:
    """Ids of a text without tags, and where in it each of them begins."""
    if tokenizer is None:
        places = [match.start() for match in _WORD.finditer(text)]
        return [word] * len(places), places
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = list(encoded["input_ids"])
    # Without offsets nothing is known of the places inside, and nothing asks for them: only tags divide a text.
    places = [first for first, _ in encoded["offset_mapping"]] if tokenizer.is_fast else [0] * len(ids)
    return ids, [0, *places[1:]] if ids else []


def _conversation(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, where: str) -> tuple[str, str]:
    """The prompt that a conversation makes, and its last answer."""
    if not all(isinstance(each, Mapping) and {"role", "content"} <= set(each) for each in messages):
        raise ValueError(f"`column`: {where} holds no messages. A list of {{'role': ..., 'content': ...}} is wanted.")
    last = max((at for at, each in enumerate(messages) if each["role"] == "assistant"), default=None)
    if last is None:
        raise ValueError(f"`column`: {where} has no message of the assistant. Name another row or column.")
    before, answer = [dict(each) for each in messages[:last]], messages[last]["content"]
    if not isinstance(answer, str):
        raise ValueError(f"`column`: {where} has an answer that is {type(answer).__name__}, not text.")
    if tokenizer is not None and tokenizer.chat_template and before:
        return str(tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)), answer
    return "".join(f"{each['role']}: {each['content']}\n\n" for each in before), answer


def _parquet_row(path: Path, number: int) -> tuple[list[Any], int]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Reading a .parquet file needs a package: `pip install pyarrow`.") from error
    table = parquet.read_table(path)
    return table.slice(number, 1).to_pylist(), table.num_rows


def _read(path: Path) -> str:
    try:
        # As it is: line ends are the model's.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`source` ({path}) is no text in UTF-8: {error.reason} at byte {error.start}.") from error


def _load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`tokenizer`: none could be loaded from {name}. Name a folder or a Hub id. {error}"
        ) from error


def _refuse(arguments: Mapping[str, Any], why: str) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"`{name}` is {value!r}, but {why}. Leave it out.")
