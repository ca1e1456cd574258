"""Numbers, formulas and symbols of a text, and how far two texts are apart."""

import re
from collections.abc import Iterator
from functools import lru_cache

from rapidfuzz.distance import Levenshtein

_NUMBER = re.compile(r"(?<![\d.,])\d+(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?")
# Numbers that count parts: at the beginning of a line, with or without a word before them.
_NUMBERING = re.compile(
    r"^[ \t*#>-]*\(?(?:(?:step|case|part|path|approach|method|option|attempt|equation)[ \t]+)?\d{1,2}"
    r"(?:[.)](?!\d)|:(?!\d))",
    re.IGNORECASE | re.MULTILINE,
)
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$([^$\n]+?)\$", re.DOTALL)
_SIDE = r"[\w.^*/+\-()\[\]{}\\|!']+"
_RELATION = re.compile(r"[=<>≤≥≠≈]")
_EQUATION = re.compile(rf"(?<!\w){_SIDE}(?:\s*(?:[=<>≤≥≠≈]|<=|>=|!=)\s*{_SIDE})+")
# Spelling that changes nothing about a formula.
_SPELLING = re.compile(r"\s+|\$|\\[()\[\]]|\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;!:]|\*\*(?=\D)|~")
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
_BLANKS = re.compile(r"\s+")


def content_distance(original: str, other: str) -> float:
    """Normalised Levenshtein distance: insertions, deletions and substitutions of characters, divided by the length of
    the longer text, with every run of blanks read as a single one. 0 for equal texts, 1 for texts with nothing in
    common."""
    first, second = (_BLANKS.sub(" ", text).strip() for text in (original, other))
    return float(Levenshtein.normalized_distance(first, second))


def word_edits(original: str, other: str) -> tuple[int, int]:
    """Words and punctuation marks to insert, delete or substitute, case ignored, and those of the longer text."""
    first, second = (_WORD.findall(text.lower()) for text in (original, other))
    return Levenshtein.distance(first, second), max(len(first), len(second))


def without_numbering(text: str) -> str:
    """The text without the numbers that count its parts."""
    return _NUMBERING.sub("", text)


@lru_cache(maxsize=4096)
def numbers(text: str) -> frozenset[str]:
    """Numbers in figures, thousands without commas, decimals without zeros at their end."""
    return frozenset(_plain(match.group()) for match in _NUMBER.finditer(text))


@lru_cache(maxsize=4096)
def symbols(text: str) -> frozenset[str]:
    """Names of quantities: subscripted, of a letter and a number, single letters (but "a" and "I"), Greek ones."""
    return frozenset(match.group().replace("{", "").replace("}", "") for match in _SYMBOL.finditer(text))


def formulas(text: str) -> dict[str, str]:
    """Formulas between dollars or LaTeX's brackets, and equations in plain text: as they are, by their spelling-free
    form (`squeezed`)."""
    return {squeezed(each).strip(".,;"): each.strip() for each in _formulas(text)}


def squeezed(text: str) -> str:
    """A text without blanks, dollars, brackets of LaTeX and other spelling that means nothing in a formula."""
    return _SPELLING.sub("", text)


def _formulas(text: str) -> Iterator[str]:
    for match in _DELIMITED.finditer(text):
        yield next(filter(None, match.groups()))
    for line in _DELIMITED.sub(" ", text).splitlines():
        if _RELATION.search(line):
            yield from (match.group() for match in _EQUATION.finditer(line))


def _plain(number: str) -> str:
    whole, point, decimals = number.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (point + decimals if decimals else "")
