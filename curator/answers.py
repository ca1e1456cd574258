"""Reads the JSON object in a model's answer: leniently what stands around it and how it is written, strictly what it
says."""

import json
import re
from collections.abc import Mapping
from typing import Any

from multiverse.curator.records import StageFailure
from multiverse.tags import TAGS

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(r'["{}\[\]]')
_BEGINS_OBJECT = re.compile(r'\{\s*(?:"|\})')
_TRAILING_COMMA = re.compile(r",(?=\s*[}\]])")
# LaTeX between quotes that was not escaped. JSON reads `\frac` as a form feed and "rac"; neither form feeds nor
# backspaces are ever meant. The names after n, r and t are those that cannot be a line break or a tab before a word.
_LATEX = re.compile(
    r"""\\(?:
    \\                                                                          # escaped already
    | (?P<loose>
        [^"\\/bfnrtu]
        | [bf](?=[A-Za-z])
        | u(?![0-9A-Fa-f]{4})
        | (?:nabla|neg|neq|nmid|not|notin|rangle|rceil|rfloor|rho|right|rightarrow|rm|tan|tanh|tau|tbinom|text|textbf
          |textit|textrm|tfrac|theta|times|to|top|triangle)(?![A-Za-z])
      )
    )""",
    re.VERBOSE,
)
_KINDS = {str: "text", bool: "true or false", int: "a whole number", list: "a list", dict: "an object"}
_TAG = re.compile("|".join(map(re.escape, TAGS)))


def read_object(stage: str, text: str) -> dict[str, Any]:
    """The first JSON object in an answer.

    Markdown fences and chatter around it are ignored, thoughts up to `</think>` as well. Line breaks in strings,
    commas before a closing bracket and LaTeX that was not escaped are mended.

    Args:
        stage (`str`): what is to be done again where there is none.
        text (`str`): the answer. With a `finish_reason` of `"length"` (`asking.Answer`) it may be thoughts that were
            cut off, whose drafts of an object are not the answer.

    Raises:
        StageFailure: if the answer is empty, was cut off, or holds no object.
    """
    answer, cut = text.strip(), getattr(text, "finish_reason", None) == "length"
    if not answer.startswith(("{", "`")):
        # Templates often open the thoughts in the prompt, so that `</think>` may stand alone.
        thoughts, closed, rest = answer.partition("</think>")
        answer = rest if closed else thoughts
        if answer.startswith("<think>") or (cut and not (closed and rest.strip())):
            raise StageFailure(stage, "The answer was cut off while thinking. Think less, and give the JSON object.")
    if not answer.strip():
        raise StageFailure(stage, "The answer was empty. Give one JSON object.")
    fault, at = "It holds no JSON object.", answer.find("{")
    while at >= 0:
        if not _BEGINS_OBJECT.match(answer, at):
            at = answer.find("{", at + 1)
            continue
        end = _object_end(answer, at)
        if end is None:
            raise StageFailure(
                stage,
                "The JSON object was cut off before its end. Give it whole, and keep its texts as short as allowed.",
            )
        try:
            return _parse(answer[at:end])
        except ValueError as error:
            fault = f"Its JSON object cannot be read: {error}."
        # Not inside it: a part of an object that cannot be read is not the answer.
        at = answer.find("{", end)
    raise StageFailure(stage, f"{fault} Give one JSON object and nothing else.")


def member(stage: str, values: Mapping[str, Any], name: str, kind: type, where: str = "the answer") -> Any:
    """`values[name]`, which must be of type `kind`.

    Raises:
        StageFailure: if it is missing or of another type.
    """
    if name not in values:
        raise StageFailure(stage, f"`{name}` is missing in {where}.")
    return of_kind(stage, values[name], kind, f"`{name}` in {where}")


def of_kind(stage: str, value: Any, kind: type, where: str) -> Any:
    """`value`, which must be of type `kind`; true and false are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise StageFailure(stage, f"{where} must be {_KINDS[kind]}, got {json.dumps(value)[:80]}.")
    return value


def passage(stage: str, value: Any, where: str, *, empty: bool = False) -> str:
    """A text without tags, stripped.

    Raises:
        StageFailure: if it is no text, empty (unless that is allowed), or holds one of the twelve tags.
    """
    text = str(of_kind(stage, value, str, where)).strip()
    if not text and not empty:
        raise StageFailure(stage, f"{where} is empty.")
    if found := _TAG.search(text):
        raise StageFailure(stage, f"{where} holds the tag {found.group()}. Write no tags; they are added later.")
    return text


def line(stage: str, value: Any, where: str) -> str:
    """A `passage` in one line."""
    return " ".join(passage(stage, value, where).split())


def label(stage: str, value: Any, where: str) -> str:
    """The label of a step: text, or a whole number, which models like to write for it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return str(of_kind(stage, value, str, where)).strip()


def _object_end(text: str, start: int) -> int | None:
    """Where the object that begins at `start` ends, `None` if it does not."""
    depth, found = 0, _BRACKET.search(text, start)
    while found is not None:
        end = found.end()
        if found[0] == '"':
            string = _STRING.match(text, found.start())
            if string is None:
                return None
            end = string.end()
        else:
            depth += 1 if found[0] in "{[" else -1
            if depth == 0:
                return end
        found = _BRACKET.search(text, end)
    return None


def _parse(text: str) -> dict[str, Any]:
    # LaTeX first: where it was not escaped, much of it is valid JSON of another meaning.
    parts, at = [], 0
    for string in _STRING.finditer(text):
        content = string.group()
        parts += [
            _TRAILING_COMMA.sub("", text[at : string.start()]),
            _LATEX.sub(_escaped, content) if "\\" in content else content,
        ]
        at = string.end()
    # A comma and its bracket are parted by blanks alone, never by a string.
    return dict(json.loads("".join([*parts, _TRAILING_COMMA.sub("", text[at:])]), strict=False))


def _escaped(match: re.Match[str]) -> str:
    return "\\" + match.group() if match["loose"] else match.group()
