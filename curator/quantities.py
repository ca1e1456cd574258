"""Numbers, formulas and symbols of a text, and how far two texts are apart."""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

from rapidfuzz.distance import Levenshtein

_NUMBER = re.compile(r"(?<![\d.,])\d+(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?")
# Numbers that count parts: at the beginning of a line, with or without a word before them.
_NUMBERING = re.compile(
    r"^[ \t*#>-]*\(?(?:(?:step|case|part|path|approach|method|option|attempt|equation)[ \t]+)?\d{1,2}"
    r"(?:[.)](?!\d)|:(?!\d))",
    re.IGNORECASE | re.MULTILINE,
)
# Here and below, every alternative begins with a character of its own, so that `re` skips all others.
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$(?<![\\$]\$)([^$\n]+?)\$", re.DOTALL)
_SIDE = r"[\w.^*/+\-()\[\]{}\\|!']+"
_RELATION = re.compile(r"[=<>≤≥≠≈]")
_EQUATION = re.compile(rf"(?<!\w){_SIDE}(?:\s*(?:[=<>≤≥≠≈]|<=|>=|!=)\s*{_SIDE})+")
# Spelling that changes nothing about a formula, besides blanks. Two asterisks are Markdown's bold where they lean on
# what comes after them and stand apart from what comes before, or the other way round; `2**3` and `2 ** 3` are powers.
_SPELLING = re.compile(
    r"\$|\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;!:]|~"
    r"|\*\*(?:(?<![\w)\]}]\*\*)(?=\S)|(?<=\S\*\*)(?![\w(\\{\[+\-]))"
)
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi "
    "omega Gamma Delta Theta Lambda Sigma Phi Psi Omega"
)
_SYMBOL = re.compile(
    rf"""
    (?<![\w\\'’])[A-Za-z]{{1,3}}_\{{?\w{{1,4}}\}}?      # x_1, a_{{n}}
    | (?<![\w\\'’])[A-Za-z]\d{{1,3}}(?!\w)              # A1
    | (?<![\w\\'’])[B-HJ-Zb-z](?![\w'’])                # one letter that is no word by itself
    | \\(?:{"|".join(_GREEK.split())})(?![A-Za-z])
    """,
    re.VERBOSE,
)
_WORD = re.compile(r"\w+|[^\w\s]")
# Stretches that a number or a symbol never leaves, what stands right before and after it included. Most of them need
# not be looked into.
_NUMBER_RUN = re.compile(r"[\d.,]+")
_SYMBOL_RUN = re.compile(r"[\w\\'’{}]+")


def content_distance(original: str, other: str) -> float:
    """Normalised Levenshtein distance: insertions, deletions and substitutions of characters, divided by the length of
    the longer text, with every run of blanks read as a single one. 0 for equal texts, 1 for texts with nothing in
    common."""
    if original == other:
        return 0.0
    first, second = (" ".join(text.split()) for text in (original, other))
    return float(Levenshtein.normalized_distance(first, second))


def word_edits(original: str, other: str) -> tuple[int, int]:
    """Words and punctuation marks to insert, delete or substitute, case ignored, and those of the longer text."""
    first, second = ([_words(line) for line in text.lower().split("\n")] for text in (original, other))
    longest = max(sum(map(len, lines)) for lines in (first, second))
    # What both begin or end with costs no edit.
    for _ in range(2):
        same = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        same = min(len(first), len(second)) if same is None else same
        first, second = first[same:][::-1], second[same:][::-1]
    return Levenshtein.distance([*chain(*first)], [*chain(*second)]), longest


def without_numbering(text: str) -> str:
    """The text without the numbers that count its parts."""
    return _NUMBERING.sub("", text)


@lru_cache(maxsize=4096)
def numbers(text: str) -> frozenset[str]:
    """Numbers in figures, thousands without commas, decimals without zeros at their end."""
    found: set[str] = set()
    for run in _NUMBER_RUN.findall(text):
        if run.isdecimal():
            found.add(_plain(run))
        elif len(run) > 1:
            found.update(map(_plain, _NUMBER.findall(run)))
    return frozenset(found)


@lru_cache(maxsize=4096)
def symbols(text: str) -> frozenset[str]:
    """Names of quantities: subscripted, of a letter and a number, single letters (but "a" and "I"), Greek ones."""
    # None is in a word of letters alone, or in a number.
    runs = [run for run in set(_SYMBOL_RUN.findall(text)) if len(run) == 1 or not (run.isalpha() or run.isdecimal())]
    found = (each for run in runs for each in _SYMBOL.findall(run))
    return frozenset(each.replace("{", "").replace("}", "") for each in found)


def lines_beyond(text: str, known: str) -> str:
    """The lines of a text that another one does not have. Neither numbers nor symbols go over the end of a line, so
    those that only `text` has are all in these, which are few where one text is a version of the other."""
    found = set(known.split("\n"))
    return "\n".join(line for line in text.split("\n") if line not in found)


def formulas(text: str) -> dict[str, str]:
    """Formulas between dollars or LaTeX's brackets, and equations in plain text: as they are, by their spelling-free
    form (`squeezed`)."""
    return {squeezed(each).strip(".,;"): each.strip() for each in _formulas(text)}


def squeezed(text: str) -> str:
    """A text without blanks, dollars, brackets of LaTeX and other spelling that means nothing in a formula."""
    return "".join(_SPELLING.sub("", text).split())


def _formulas(text: str) -> Iterator[str]:
    found: list[str] = []

    def take(match: re.Match[str]) -> str:
        found.append(str(match[match.lastindex or 0]))
        return " "

    plain = _DELIMITED.sub(take, text)
    yield from found
    for line in plain.splitlines():
        if _RELATION.search(line):
            yield from (match.group() for match in _EQUATION.finditer(line))


# A path has most lines in common with its original, which is read right before it.
@lru_cache(maxsize=4096)
def _words(line: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(line))


def _plain(number: str) -> str:
    whole, point, decimals = number.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (point + decimals if decimals else "")
