"""Whether two texts give the same final answer: math-verify for mathematics, normalised text for everything else."""

import logging
import re
import threading
from functools import lru_cache
from typing import Any

#: Longer answers are prose or proofs, which cannot be compared.
LONGEST = 200

_STATED = re.compile(
    r"\banswer(?:\s+to\s+[^.:\n]{1,60})?\s*(?:is|=|:)(?:\s*:)?[\s*]*(?P<answer>\S[^\n]*?)\s*(?=\.(?:\s|\Z)|\n|\Z)",
    re.IGNORECASE,
)
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")
_NOISE = re.compile(r"\\[()\[\]!,;:]|\\(?:left|right)(?![A-Za-z])|[\s$*`\"'’]+")
_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
_SECONDS = 5


def stated_answer(text: str) -> str | None:
    r"""What a text says is its answer: the last `\boxed{...}`, or what follows the last "answer is" or "answer:"."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    stated = [match["answer"].strip(" *") for match in _STATED.finditer(text)]
    return stated[-1] if stated else None


@lru_cache(maxsize=4096)
def same_answer(first: str, second: str) -> bool:
    """Whether two answers are the same, as text or as mathematics."""
    one, other = normalised(first), normalised(second)
    if one == other:
        return True
    if max(len(first), len(second)) > LONGEST or _is_word(one) or _is_word(other):
        return False
    expected, found = _parsed(first), _parsed(second)
    return bool(expected and found) and _verified(expected, found)


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


def _last_boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    opening = text.index("{", start)
    depth = 0
    for at in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[opening + 1 : at].strip()
    return None


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

    _quiet()
    return bool(verify(expected, found, timeout_seconds=_limit()))


def _quiet() -> None:
    # It warns of missing time limits, which threads cannot have.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
