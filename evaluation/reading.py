"""The answer that an answer part gives: a formula or a word, a letter, a number; and texts that give none."""

import re
from collections.abc import Sequence

from multiverse.curator.final_answer import normalised, same_answer, stated_answer
from multiverse.curator.math_text import has_prose, split_unit
from multiverse.trainer.synthetic import read_answer

#: An answer stands at the end. What is further from it is not looked at.
LONGEST_PART = 50_000

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|boxed|fbox|bf)\s*\{([^{}]*)\}")
_BOLD = re.compile(r"\*\*([^*\n]{1,100}?)\*\*")
_FORMULA = re.compile(r"\$\$?([^$\n]{1,200})\$\$?|\\\(([^\n]{1,200}?)\\\)|\\\[\s*([^\n]{1,200}?)\s*\\\]")
_SENTENCE = re.compile(r"(?:(?<=[.!?])\s+(?=\S)|\n+)")
_FAREWELL = re.compile(
    r"\W*(?:let me know|(?:i )?hope (?:this|that|it)|feel free|if you (?:have|need|would|want))\b", re.IGNORECASE
)
_ASKS = re.compile(
    r"\s*(?:(?:problem|question|task|exercise)\s*\d*\s*[:.]|(?:please\s+)?(?:find|compute|solve|calculate|determine|evaluate"
    r"|simplify|express|prove|give|put|write|let|suppose|assume|reason|what|how|which|who|when|where|why)\b)",
    re.IGNORECASE,
)
_COMES_TO = r"(?:=|≈|\b(?:is|are|equals?|gives?|gets?|makes?|takes?|obtain|leaves?)\b|:)"
_THUS = r"(?:\s+(?:therefore|thus|then|hence|exactly|just|only|simply|indeed))*"
_CONCLUDED = re.compile(rf"{_COMES_TO}{_THUS}\s*(?P<answer>-?[$€£]?[\d.(\[{{\\-][^=]{{0,80}})\Z", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,])-?[$€£]?\d[\d,]*(?:\.\d+)?(?![\w])%?")
_BARE = re.compile(r"[-+\d.,/^*()\[\]{}\\$ %°√π]{0,60}[\d)}%°π][-+\d.,/^*()\[\]{}\\$ %°√π]{0,60}")

_LETTER = r"[(\[{\s]*([A-Z](?![A-Za-z'’])|(?<=[(\[])[a-z](?=[)\]]))"
_SAID = (
    r"(?i:answer|option|choice)(?:\s+(?i:to)\s+[^.:\n]{1,60})?\s*(?:(?i:is|would be|should be|must be)\b|:|=)[\s:]*"
)
_NAMED = r"(?:(?i:option|choice|letter|answer)\s+)"
_BEST = r"(?i:is\s+(?:the\s+)?(?:correct|right|best|true))\b"
_PICKED = re.compile(
    rf"\b{_SAID}{_NAMED}?{_LETTER}"
    rf"|\b(?i:choose|pick|select|go with|going with|corresponds to|matches)\s+{_NAMED}?{_LETTER}"
    rf"|\b{_NAMED}{_LETTER}[)\]}}]*\s+{_BEST}"
    r"|\b(?i:therefore|thus|hence|so)[,:]?\s+[(\[]([A-Z])[)\]]"
    rf"|(?<![A-Za-z])[(\[]?([A-Z])[)\]]?\s+(?:(?i:it is)\b|{_BEST})"
)
_ALSO = re.compile(r"[)\]}.:\s]*(?:,|/|&|\b(?:or|and)\b)\s*(?:(?:option|choice)\s+)?[(\[{]?[A-Z](?![A-Za-z'’])")
_ALONE = re.compile(r"[(\[{\s]*(?P<letter>[A-Za-z])(?:[)\]}.:]+\s*(?P<text>[^\n]{0,200}))?\s*")
_TEMPLATE = re.compile(r"(?:form|format|like|e\.g\.|example)[^\n]{0,20}\Z", re.IGNORECASE)
_STATES = re.compile(
    r"\b(?:answer|option|choice)(?:\s+to\s+[^.:\n]{1,60})?\s*(?:(?:is|would be|should be|must be)\b|:|=)[\s:]*"
    r"(?P<answer>\S[^\n]{0,300}?)\s*(?=\.(?:\s|\Z)|\n|\Z)",
    re.IGNORECASE,
)
_ECHO = re.compile(
    r"\?\s*(?:answer\s*:\s*)?\Z|\A\s*(?:question|problem|user)\b|\banswer\s*:\s*\Z|<\|im_start\|>\s*user|"
    r"\bin the form\b|\byour (?:final )?answer\b",
    re.IGNORECASE,
)


def read_mathematics(part: str) -> str | None:
    """The last answer stated (`stated_answer`), or else what the last sentence comes to.

    The last sentence comes to a formula or number that stands alone, in bold, at its end after "=", "is" and the like,
    or to its only number if that has been worked out before ("= 72"). A question or a task comes to nothing, so an
    echo of the prompt does not answer.
    """
    stated = stated_answer(part)
    if stated is not None:
        return stated
    sentences = [sentence for sentence in _SENTENCE.split(part) if sentence.strip(" *_#-=")]
    while sentences and _FAREWELL.match(sentences[-1]):
        sentences.pop()
    last = sentences[-1].strip() if sentences else ""
    if not last or last.endswith("?") or "\\boxed" in last or _ASKS.match(last):
        return None
    if bold := _BOLD.findall(last):
        return bold[-1].strip(" .:") if re.search(r"\d", bold[-1]) else None
    plain = last.strip(" .*_")
    if _BARE.fullmatch(plain):
        return plain.strip("$ ")
    if formulas := [next(filter(None, found)) for found in _FORMULA.findall(last)]:
        tail = formulas[-1].rpartition("=")[2].strip()
        before, _, after = last.rpartition(formulas[-1])
        comes_to = "=" in formulas[-1] or re.search(rf"{_COMES_TO}{_THUS}[$\\(\[\s]*\Z", before, re.IGNORECASE)
        # A unit may follow.
        return tail if comes_to and re.fullmatch(r"[$\\)\]\s]*(?:[a-z]+\s*){0,3}[.!*\s]*", after) else None
    found = _CONCLUDED.search(plain)
    if found and not has_prose(split_unit(found["answer"])[0]):
        return found["answer"].strip()
    # "Ann has 72 clips left", after "48 + 24 = 72".
    numbers = _NUMBER.findall(plain)
    worked_out = len(numbers) == 1 and re.search(rf"=\s*[$€£]?{re.escape(numbers[0].lstrip('$€£'))}(?![\w.])", part)
    return numbers[0] if worked_out else None


def read_choice(part: str, choices: Sequence[str]) -> str | None:
    """The letter that is picked last: stated as the answer, boxed, alone in the last line, or by the text of its
    option. Two letters at once (`"A or B"`) are given back as they are read, and are no letter."""
    plain = part
    for _ in range(4):
        plain = _WRAPPER.sub(r" \1 ", plain)
    plain = re.sub(r"[*$`_\"]|\\[()\[\],;! ]", " ", plain)
    plain = re.sub(r"[ \t]{2,}", " ", plain)
    found: list[tuple[int, str]] = []
    for match in _PICKED.finditer(plain):
        letter = next(filter(None, match.groups())).upper()
        if _TEMPLATE.search(plain, max(0, match.start() - 30), match.start()):
            continue
        also = _ALSO.match(plain, match.end())
        found.append((match.start(), letter + also.group() if also else letter))
    for match in _STATES.finditer(plain):
        if (letter := _option(match["answer"], choices)) is not None:
            found.append((match.start(), letter))
    if found:
        return max(found, key=lambda pick: pick[0])[1]
    boxed = stated_answer(part)
    if boxed is not None and (letter := _alone(boxed) or _option(boxed, choices)):
        return letter
    lines = [line for line in plain.splitlines() if line.strip(" #")]
    # A list of the options ends with one; it picks none.
    listed = len(lines) > 1 and sum(bool(_ALONE.fullmatch(line)) for line in lines) > 1
    return None if not lines or listed else _alone(lines[-1])


def read_number(part: str) -> str | None:
    """The number after the last `Answer:`, as `read_answer` reads it."""
    number = read_answer(part)
    return None if number is None else str(number)


def is_echo(part: str) -> bool:
    """Whether a part without an answer asks for one, as a prompt does."""
    lines = part.strip().splitlines()
    while lines and _ALONE.fullmatch(lines[-1]):
        lines.pop()
    return _ECHO.search("\n".join(lines)) is not None


def is_endless(text: str) -> bool:
    """Whether a text ends in one stretch of at most 300 characters, over and over: 20 times, and 400 characters."""
    text = text.rstrip()[-7000:]
    for period in range(1, 301):
        length = max(20 * period, 400)
        if len(text) >= length and text[-length:-period] == text[-length + period :]:
            return True
    return False


def _alone(text: str) -> str | None:
    """The letter that a short text consists of, with the option's text after it at most."""
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    match = _ALONE.fullmatch(text.strip(" $.*"))
    if match is None:
        return None
    return match["letter"].upper() if match["letter"].isupper() or match["text"] is None else None


def _option(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the only option that a text gives."""
    plain = normalised(text)
    same = [chr(ord("A") + at) for at, choice in enumerate(choices) if normalised(choice) == plain]
    if not same and re.search(r"\d", text):
        same = [chr(ord("A") + at) for at, choice in enumerate(choices) if same_answer(choice, text)]
    return same[0] if len(same) == 1 else None
