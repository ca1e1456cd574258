"""Whether a generation answers its problem: mathematics by math-verify, multiple choice by its letter, and the numbers
of the synthetic families.

Only the answer part is read (`answer_part`), and never a prompt. An answer counts where the text states it; a
question, an echo of the prompt, or a sub-result in a path states none. What did not end by itself is not right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from multiverse.curator.final_answer import same_answer
from multiverse.evaluation.answer_part import answer_part, is_blank
from multiverse.evaluation.reading import (
    LONGEST_PART,
    is_echo,
    is_endless,
    read_choice,
    read_mathematics,
    read_number,
)

#: What an answer is: mathematics or words (AIME, MATH500), a letter (GPQA), a number after `Answer:` (synthetic).
AnswerKind = Literal["math", "choice", "number"]

#: Why an answer is judged as it is. Only the first is right.
REASONS = ("right", "wrong", "no answer", "empty", "cut off", "endless", "echo")


@dataclass(frozen=True)
class Verdict:
    """What is thought of one generation.

    Attributes:
        right (`bool`): whether the answer is the expected one.
        answer (`str`, *optional*): what was read off; `None` where nothing was.
        reason (`str`): one of `REASONS`: `"cut off"` for whatever did not end by itself, `"endless"` for a text that
            ends in one stretch over and over, `"empty"` for one of blanks and tags, `"echo"` where it asks and does
            not answer, `"no answer"` where it states none otherwise.
    """

    right: bool
    answer: str | None
    reason: str


def judge(
    text: str, expected: str, kind: AnswerKind, finish_reason: str | None = "eos", choices: Sequence[str] = ()
) -> Verdict:
    """Judges a generation.

    Args:
        text (`str`): the generated continuation in linear order, tags as written, never the prompt.
        expected (`str`): the known answer; a letter for `"choice"`, an integer for `"number"`.
        kind (`str`): `"math"`, `"choice"` or `"number"`.
        finish_reason (`str`, *optional*): of `RequestReport`. Anything but `"eos"` never counts as right.
        choices (`Sequence[str]`): for `"choice"`, the texts of the options in the order of their letters.

    Raises:
        ValueError: if there is no such kind, or `expected` is empty or not of its kind.
    """
    expected = _checked(expected, kind, choices)
    part = answer_part(text)[-LONGEST_PART:]
    answer = _read(part, kind, choices)
    if is_blank(text):
        return Verdict(False, None, "empty")
    if finish_reason != "eos":
        return Verdict(False, answer, "cut off")
    if is_endless(text):
        return Verdict(False, answer, "endless")
    if answer is None:
        return Verdict(False, None, "echo" if is_echo(part or text) else "no answer")
    right = same_answer(expected, answer) if kind == "math" else expected == answer
    return Verdict(right, answer, "right" if right else "wrong")


def _read(part: str, kind: AnswerKind, choices: Sequence[str]) -> str | None:
    if kind == "choice":
        return read_choice(part, choices)
    return read_number(part) if kind == "number" else read_mathematics(part)


def _checked(expected: str, kind: str, choices: Sequence[str]) -> str:
    if kind not in get_args(AnswerKind):
        raise ValueError(f"`kind` must be one of {get_args(AnswerKind)}, got {kind!r}.")
    expected = expected.strip()
    if not expected:
        raise ValueError("`expected` is empty: there is nothing to hold an answer against. Give the known answer.")
    if kind == "choice":
        letters = [chr(ord("A") + number) for number in range(len(choices) or 26)]
        letter = expected.strip("()").upper()
        if letter not in letters:
            raise ValueError(
                f"`expected` is {expected!r}, which is no letter from A to {letters[-1]}. Give the letter of one of "
                f"the {len(letters)} `choices`."
            )
        return letter
    if kind == "number":
        try:
            return str(int(expected))
        except ValueError as error:
            raise ValueError(
                f"`expected` is {expected[:40]!r}, which is no integer. Give one, or judge as 'math'."
            ) from error
    return expected
