"""The answer that a text states, and whether two texts give the same one.

Mathematics is compared by math-verify, everything else as normalised text.
"""

import logging
import re
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from multiverse.curator.math_text import (
    as_latex,
    brackets,
    exact,
    has_prose,
    listed,
    split_unit,
    too_large,
    without_percent,
)

#: Longer answers are prose or proofs, which cannot be compared.
LONGEST = 200

_STATED = re.compile(
    r"(?:\bfinal\s+answer[*: ]*\n\s*"
    r"|\banswer(?:\s+to\s+[^.:\n]{1,60})?\s*(?:\bis\b|=|:)(?:\s*:)?"
    r"|\b(?:wait\b|no[,:]|hmm\b|sorry\b|actually\b|correction\b|hold on\b|mistake\b)[^\n.]{0,80}?(?<!\w)"
    r"(?P<corrects>it(?:'s|’s|\s+is|\s+should\s+be|\s+must\s+be))(?:\s+actually)?\b"
    r"|<answer>|\n[ \t]*#### )"
    r"[\s*]*(?P<answer>\\\[[^$]{1,300}?\\\]|\$\$[^$]{1,300}?\$\$|\S[^\n]{0,400}?)\s*(?P<end>\.(?=\s|\Z)|\?|\n|</answer>|\Z)",
    re.IGNORECASE,
)
#: What every match of `_STATED` begins with, in lower case: a search for it alone takes a fifth of the time or less.
_BEGINS = re.compile(r"<answer>|answer|final|wait|no[,:]|hmm|sorry|actually|correction|hold on|mistake|\n[ \t]*####")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\[\\{}]|[{}]")
_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:\\[)\]])?[\s$]*(?:,|;|(?:,\s*)?\b(?:and|or))[\s$]*(?:\\[(\[])?[\s$]*(?:[A-Za-z]\s*=\s*)?"
)
_REASON = re.compile(r"(?:,\s*|\s+)(?:because|since|as|which|so|where|when|if|but|not|for)\s.*", re.DOTALL)
_FILLER = re.compile(
    r"(?:(?:indeed|therefore|thus|then|hence|simply|just|exactly|equal to|given by|now|actually|clearly)[\s,:]+)+",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|n't|neither|either|unknown|maybe|perhaps)\b", re.IGNORECASE)
_FORMULA = re.compile(r"\$\$?([^$\n]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[()\[\]!,;:]|\\(?:left|right)(?![A-Za-z])|[\s$*`\"'’]+")
_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
_BASED = re.compile(r"([\dA-F]+)_(?:\{(\d+)\}|(\d+))")
_SECONDS = 5
_DEEPEST = 10
#: What takes more words is no answer but the begin of an explanation.
_MOST_WORDS = 6


def stated_answer(text: str) -> str | None:
    r"""What a text says is its answer, the last time that it says so.

    That is the last `\boxed{...}` (several where only "and", "or" or a comma is between them, as one list); or what
    follows "answer is", "answer:", a heading "Final answer", `<answer>` or `####`, or corrects one ("wait, it's ...").
    After a box, only a formula counts as another answer. What ends in a question mark is not stated.
    """
    text = re.sub(r"[ \t]{2,}", " ", text)
    boxes, unclosed = _boxes(text)
    after = boxes[-1][1] if boxes else 0
    stated = [
        answer
        for match in _statements(text, after)
        if match["end"] != "?" and match.end("answer") <= unclosed and (answer := _trimmed(match["answer"]))
        if _is_formula(answer) or not (boxes or match["corrects"] or len(answer.split()) > _MOST_WORDS)
    ]
    if stated:
        return stated[-1]
    return _joined(text, boxes) if boxes else None


@lru_cache(maxsize=4096)
def same_answer(first: str, second: str) -> bool:
    """Whether two answers are the same, as text or as mathematics.

    Equal values in any form are (`6/8` and `0.75`), rounded ones are not. A unit may be missing in one, not differ in
    both. Tuples, sets and intervals differ by their brackets. What would take for ever to work out is compared as
    text.
    """
    one, other = normalised(first), normalised(second)
    if one == other:
        return True
    if max(len(first), len(second)) > LONGEST or _is_word(one) or _is_word(other):
        return False
    based = [_BASED.fullmatch(each.replace("$", "").strip()) for each in (first, second)]
    if any(based):
        return _same_based(based, (one, other))
    (expected, unit), (found, other_unit) = (split_unit(as_latex(_innermost(each))) for each in (first, second))
    if unit and other_unit and unit != other_unit:
        return False
    expected, found = without_percent(listed(expected), listed(found))
    if normalised(expected) == normalised(found):
        return True
    around = brackets(expected), brackets(found)
    if has_prose(expected) or has_prose(found) or (all(around) and around[0] != around[1]):
        return False
    if max(map(_depth, (expected, found))) > _DEEPEST:
        return False
    one_parsed, other_parsed = _parsed(f"${expected}$"), _parsed(f"${found}$")
    return bool(one_parsed and other_parsed) and _verified(one_parsed, other_parsed)


def gives_answer(text: str, answer: str) -> bool:
    """Whether a text comes to an answer: states it, or, where it states none, holds it in so many words or as its last
    formula."""
    stated = stated_answer(text)
    if stated is not None and same_answer(answer, stated):
        return True
    if re.search(rf"(?<!\w){re.escape(answer.strip().casefold())}(?!\w)", text.casefold()):
        return stated is None or not _parsed(stated)
    if stated is not None:
        return False
    expected, found = _parsed(answer), _parsed(text[-2000:], whole=False)
    return bool(expected and found) and _verified(expected, found)


def normalised(answer: str) -> str:
    """An answer without case, blanks, signs of LaTeX that only set it, brackets around it and a stop after it."""
    answer = _NOISE.sub("", _WRAPPER.sub(r"\1", answer)).casefold().rstrip(".")
    inner = re.fullmatch(r"[(\[{]([^()\[\]{},]*)[)\]}]", answer)
    return inner[1] if inner else answer


def _statements(text: str, start: int) -> Iterator[re.Match[str]]:
    """`_STATED.finditer(text, start)`, tried only where one can begin."""
    # The two that `re.IGNORECASE` takes for an s and an i, and `lower` does not.
    lower = text.lower().replace("ſ", "s").replace("ı", "i")
    if len(lower) != len(text):
        # A character has become two, and places are no longer the same.
        yield from _STATED.finditer(text, start)
        return
    for begin in _BEGINS.finditer(lower, start):
        if begin.start() >= start and (match := _STATED.match(text, begin.start())):
            yield match
            start = match.end()


def _boxes(text: str) -> tuple[list[tuple[int, int, str]], int]:
    """Every outermost closed box that holds something: start, end, content; and where a last one is left open."""
    opened: list[tuple[int, int, bool]] = []
    boxes: list[tuple[int, int, str]] = []
    box_at = -1
    for match in _BRACE.finditer(text):
        sign = match.group()
        if sign == "{":
            opened.append((box_at if box_at >= 0 else match.start(), match.end(), box_at >= 0))
        elif sign == "}" and opened:
            start, inside, is_box = opened.pop()
            if is_box:
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, match.end(), text[inside : match.start()].strip()))
        box_at = match.start() if sign.startswith(("\\b", "\\f")) else -1
    boxes = [box for box in boxes if box[2]]
    last = boxes[-1][1] if boxes else 0
    return boxes, min((start for start, _, is_box in opened if is_box and start >= last), default=len(text))


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """The last box, with those right before it that are listed with it."""
    first = len(boxes) - 1
    while first and _BETWEEN_BOXES.fullmatch(text, boxes[first - 1][1], boxes[first][0]):
        first -= 1
    return ", ".join(dict.fromkeys(content for _, _, content in boxes[first:]))


def _innermost(answer: str) -> str:
    """What stands in the last box of an answer that has boxes itself."""
    while (inner := _boxes(answer)[0]) and inner[-1][2] != answer:
        answer = inner[-1][2]
    return answer


def _trimmed(stated: str) -> str | None:
    """An answer without what introduces it and the reason after it, `None` for one that is denied."""
    answer = _FILLER.sub("", _REASON.sub("", stated.strip(" *_\t\n")), count=1)
    if _DENIED.search(answer):
        return None
    formulas = list(_FORMULA.finditer(answer))
    if len(formulas) == 1 and _WORDS.search(answer[: formulas[0].start()]):
        # "the fraction $\frac{5}{12}$"; what comes after a formula may be its unit.
        answer = answer[formulas[0].start() :]
    answer = answer.strip(" ,;:*")
    if answer.startswith(("\\[", "$$")):
        answer = answer[2:].removesuffix("\\]").removesuffix("$$").strip(" .\n")
    return answer if re.search(r"\w", answer) else None


def _is_formula(answer: str) -> bool:
    return re.search(r"\d", answer) is not None and not has_prose(split_unit(as_latex(answer))[0])


def _depth(answer: str) -> int:
    depth = deepest = 0
    for sign in answer:
        depth += (sign in "([{") - (sign in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _same_based(based: list[re.Match[str] | None], plain: tuple[str, str]) -> bool:
    """Numbers written in a base, which may be left out in one of them."""
    digits = {match[1].casefold() if match else text for match, text in zip(based, plain, strict=True)}
    return len(digits) == 1 and len({match[2] or match[3] for match in based if match}) == 1


def _is_word(answer: str) -> bool:
    return len(answer) > 1 and answer.isalpha()


def _limit() -> int | None:
    # math-verify keeps time by an alarm, which the main thread alone can set.
    return _SECONDS if threading.current_thread() is threading.main_thread() else None


def _parsed(text: str, whole: bool = True) -> list[Any]:
    from math_verify import parse

    if whole and "$" not in text and "\\boxed" not in text and not _WORDS.search(text):
        # A formula by itself; among words it is found without dollars.
        text = f"${text}$"
    _quiet()
    return list(parse(text, fallback_mode="no_fallback", parsing_timeout=_limit()))


def _verified(expected: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    if too_large([expected, found]):
        return False
    _quiet()
    return bool(
        verify(
            [exact(each) for each in expected],
            [exact(each) for each in found],
            allow_set_relation_comp=True,
            timeout_seconds=_limit(),
        )
    )


def _quiet() -> None:
    # It warns of missing time limits, which threads cannot have.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
