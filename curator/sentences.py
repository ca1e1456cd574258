"""Splits a chain of thought into sentences that give the text back, character by character, when put together.

A line ends a sentence, and so does a full stop, a question or an exclamation mark that closes one. Formulas and code
stay whole. Where it is in doubt (an abbreviation, an initial, a factorial) a sentence is not divided: one that is too
long can still be assigned to a step, half of one cannot be understood.
"""

import re
from functools import lru_cache

# A formula or a piece of code that is never closed is ordinary text; so nothing may look further ahead than this.
# Every alternative begins with a character of its own, and looks back from behind it: `re` then skips all others.
_LONGEST = 4000
_WHOLE = re.compile(
    rf"""
    ```.{{0,{_LONGEST}}}?```                                        # fenced code
    | \$\$.{{1,{_LONGEST}}}?\$\$                                    # displayed formulas
    | \\\[.{{0,{_LONGEST}}}?\\\]
    | \\begin\{{(?P<name>\w+\*?)\}}.{{0,{_LONGEST}}}?\\end\{{(?P=name)\}}
    | \\\([^\n]{{0,{_LONGEST}}}?\\\)                                # formulas in a line
    | `[^`\n]+`
    # As Pandoc tells a formula from two prices: no blank inside the dollars, no digit after them.
    | \$(?<![\\$]\$)(?=[^\s$])[^$\n]{{0,{_LONGEST}}}?(?<=[^\s\\])\$(?!\d)
    """,
    re.VERBOSE | re.DOTALL,
)
_END = re.compile(
    r"""
    [\n.!?。！？]
    (?: (?<=\n)\s*                                    # lines, with the empty ones after them
    | (?<=[.!?])(?P<stops>[.!?]*)["'”’)\]*_]*[ \t]+(?=(?P<next>\S{1,2}))
    | (?<=[。！？])[。！？]*[”’」』）]*[ \t]*(?!\n)        # needs no blank
    )
    """,
    re.VERBOSE,
)
_BEFORE_LAST_WORD = re.compile(r".*[\s(\[]", re.DOTALL)
# What stands before a stop that ends no sentence. Compared without the stop, in lower case.
_ABBREVIATIONS = (
    "al approx ca cf ch co corp def dept dr e.g eg eq eqn eqs est etc ex fig figs gen i.e ie inc jr lem mr mrs ms no "
    "nos op p pp prof prop ref resp sec sr st thm vol vs w.l.o.g wlog w.r.t wrt"
)
_ABBREVIATED = frozenset(_ABBREVIATIONS.split())
_INITIAL = re.compile(r"[A-Z]\.")
_LIST_MARK = re.compile(r"\s*(?:\d{1,3}|[A-Za-z]|[ivxIVX]+)\Z")
_BULLET = re.compile(r"\s*(?:[-*+•–#>]+|\(?(?:\d{1,3}|[A-Za-z])[.)])\s*\Z")


# Every stage asks for the sentences of its chain anew.
@lru_cache(maxsize=256)
def split_sentences(text: str) -> tuple[str, ...]:
    r"""Divides a text into sentences; `"".join(sentences) == text`.

    Blanks and empty lines belong to the sentence before them, those at the beginning to the first one. A bullet or a
    number of a list belongs to its item.

    Args:
        text (`str`): any text.

    Returns:
        `tuple[str, ...]`: none for an empty text, and none is blank unless the whole text is.

    Example:

    ```python
    >>> split_sentences("Let x = 1.5. Then $x^2 = 2.25$.\n\nDone.")
    ('Let x = 1.5. ', 'Then $x^2 = 2.25$.\n\n', 'Done.')
    ```
    """
    whole = [match.span() for match in _WHOLE.finditer(text)]
    sentences, start, at = [], 0, 0
    for match in _END.finditer(text):
        # A formula at the place where a sentence may end is passed over together with what follows it.
        while at < len(whole) and whole[at][1] <= match.start():
            at += 1
        if at < len(whole) and whole[at][0] <= match.start():
            continue
        sentence = text[start : match.end()]
        stop = match[0][0] + (match["stops"] or "")
        if match["next"] and not _ends_sentence(text[start : match.start()], stop, match["next"]):
            continue
        if sentence.strip() and not _BULLET.match(sentence):
            sentences.append(sentence)
            start = match.end()
    rest = text[start:]
    if rest and sentences and (not rest.strip() or _BULLET.match(rest)):
        sentences[-1] += rest
    elif rest:
        sentences.append(rest)
    return tuple(sentences)


@lru_cache(maxsize=256)
def numbered(sentences: tuple[str, ...]) -> str:
    """The sentences as a model is shown them: `[1] ...`, one after the other, numbers from 1."""
    return "\n".join(f"[{number}] {sentence.strip()}" for number, sentence in enumerate(sentences, start=1))


def _ends_sentence(before: str, stop: str, following: str) -> bool:
    """Whether a stop with a blank after it ends the sentence `before`; `following` is what comes next, up to two
    characters."""
    if following[0].islower() or following[0] in "=+<>/^*·×÷≤≥≠,;:)]}":
        # "approx. three", "5! = 120"; an asterisk may begin emphasis, but may be a sign as well.
        return False
    if stop != ".":
        return True
    if _LIST_MARK.match(before):
        return False
    blank = _BEFORE_LAST_WORD.match(before)
    word = before[blank.end() :] if blank else before
    if word.lower() in _ABBREVIATED:
        return False
    # An initial ("J. Smith"); a variable ends a sentence as often ("so we get C. Then"), where a word stands before it
    # that a name would not follow.
    initial = len(word) == 1 and word.isupper()
    return not (initial and (_INITIAL.match(following) or _is_name(before[: -len(word)])))


def _is_name(before: str) -> bool:
    """Whether what stands before an initial is the beginning of a sentence, a title or another part of a name."""
    words = before.split()
    return not words or words[-1][0].isupper() or words[-1].endswith(".")
