"""The generations that a report shows: chosen evenly, folded, and no larger than a page may be."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from multiverse.evaluation.report_tables import label
from multiverse.hub_card.drawings import escaped, timeline_svg, tree_html
from multiverse.hub_card.view import from_text
from multiverse.tags import TAGS

#: Most generations of each kind.
MOST_WRONG, MOST_RIGHT, MOST_MALFORMED = 200, 50, 50
# Letters of a text that is shown whole at first, and down to which texts are cut before any is left out.
_LONGEST, _SHORTEST = 200_000, 500
# Letters that a tag counts as: the page draws a frame around every block and path.
_PER_TAG = 200
# Letters of an answer, and of everything else but the text and its question.
_ANSWER, _QUESTION = 300, 4000
_TAG = re.compile("|".join(map(re.escape, TAGS)))

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """The list as HTML, and what is in it.

    Attributes:
        html (`str`): folds, one for every condition.
        generations (`int`): how many are there.
        cut (`int`): of them, those whose text is shortened.
        malformed (`list[tuple[str, str]]`): id of the element and name of every one whose structure has problems.
    """

    html: str
    generations: int
    cut: int
    malformed: list[tuple[str, str]]


def choose(
    records: Sequence[Record],
    wrong: int = MOST_WRONG,
    right: int = MOST_RIGHT,
    malformed: int = MOST_MALFORMED,
) -> list[Record]:
    """Wrong, right and malformed generations, taken from all conditions in turn.

    Args:
        records (sequence of `Mapping`): in the order of the run.
        wrong, right (`int`): most of each.
        malformed (`int`): most of those with structure problems, beside what is taken already.

    Returns:
        `list[Mapping]`: in the order of the run.
    """
    numbered = list(enumerate(records))
    taken = set(_in_turn([each for each in numbered if not each[1]["right"]], wrong))
    taken |= set(_in_turn([each for each in numbered if each[1]["right"]], right))
    taken |= set(_in_turn([each for each in numbered if each[1]["problems"] and each[0] not in taken], malformed))
    return [record for place, record in numbered if place in taken]


def render_generations(
    records: Sequence[Record], room: int, questions: Mapping[str, Mapping[str, str]] | None = None
) -> Shown:
    """Generations as folds. Where they need more than `room`, the longest texts lose their middle.

    Args:
        records (sequence of `Mapping`): those to show, in the order of the run.
        room (`int`): most bytes.
        questions (`Mapping`, *optional*): texts of the questions, by task and id.
    """
    texts = questions or {}
    weights = [max(len(record["text"]), _tags(record["text"]) * _PER_TAG) for record in records]
    limit, entries = _LONGEST, [""] * len(records)
    while True:
        for number, record in enumerate(records):
            if not entries[number] or weights[number] > limit:
                question = texts.get(record["task"], {}).get(record["question"])
                entries[number] = _entry(record, number, limit, question)
        if sum(len(entry.encode()) for entry in entries) <= room or limit <= _SHORTEST:
            break
        limit = max(limit // 2, _SHORTEST)
    left = room
    kept: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        left -= len(entries[number].encode())
        if left >= 0:
            kept.setdefault(label(record), []).append(number)
    numbers = [number for own in kept.values() for number in own]
    return Shown(
        html="".join(_fold(name, own, records, entries) for name, own in kept.items()),
        generations=len(numbers),
        cut=sum(len(records[number]["text"]) > limit for number in numbers),
        malformed=[(f"generation-{n + 1}", _name(records[n])) for n in numbers if records[n]["problems"]],
    )


def _in_turn(numbered: Iterable[tuple[int, Record]], most: int) -> list[int]:
    """The places of the first few, from one condition after the other."""
    by_condition: dict[str, list[int]] = {}
    for place, record in numbered:
        by_condition.setdefault(label(record), []).append(place)
    dealt = [place for round_ in zip_longest(*by_condition.values()) for place in round_ if place is not None]
    return dealt[:most]


def _fold(name: str, numbers: Sequence[int], records: Sequence[Record], entries: Sequence[str]) -> str:
    wrong = sum(not records[number]["right"] for number in numbers)
    malformed = sum(bool(records[number]["problems"]) for number in numbers)
    note = f"{wrong} wrong, {len(numbers) - wrong} right, {malformed} malformed"
    # What went wrong is what one looks for.
    ordered = sorted(numbers, key=lambda number: bool(records[number]["right"]))
    return (
        f'<details class="mv ev-fold"><summary>{escaped(name)} <span class="mv-note">{note}</span></summary>'
        f"{''.join(entries[number] for number in ordered)}</details>"
    )


def _entry(record: Record, number: int, limit: int, question: str | None) -> str:
    verdict = "right" if record["right"] else "wrong"
    badges = f'<span class="ev-{verdict}">{verdict}</span>'
    if record["problems"]:
        badges += ' <span class="ev-malformed">malformed</span>'
    brief = f"{record['generated_tokens']:,} tokens in {record['sequential_steps']:,} steps"
    return (
        f'<details class="ev-generation" id="generation-{number + 1}"><summary>{badges} {escaped(_name(record))} '
        f'<span class="mv-note">{escaped(brief)}</span></summary><dl class="ev-values">{_values(record)}</dl>'
        f"{_question(question)}<h4>generation</h4>{_text(record['text'], limit)}</details>"
    )


def _values(record: Record) -> str:
    problems: Counter[str] = Counter(record["problems"])
    named = {
        "expected": record["expected"],
        "read off": record["answer"],
        "verdict": record["reason"],
        "ended by": record["finish_reason"],
        "# parallel": f"{record['degree_of_parallelism']:.2f}" if record["degree_of_parallelism"] else None,
        "blocks, paths, depth": f"{record['blocks']}, {record['paths']}, {record['depth']}",
        "structure problems": ", ".join(f"{kind} ({count})" for kind, count in sorted(problems.items())) or "none",
        "seed": record["seed"],
    }
    cells = (
        (name, "nothing" if value in (None, "") else _shortened(str(value), _ANSWER)) for name, value in named.items()
    )
    return "".join(f'<div><dt>{name}</dt><dd class="mv-text">{escaped(value)}</dd></div>' for name, value in cells)


def _question(text: str | None) -> str:
    if text is None:
        return ""
    return f'<h4>question</h4><div class="mv-text">{escaped(_shortened(text, _QUESTION))}</div>'


def _text(text: str, limit: int) -> str:
    """A generation as a tree with its timeline; as mere letters where it or its tags are too many."""
    if not text.strip():
        return "<p>Nothing was written.</p>"
    if max(len(text), _tags(text) * _PER_TAG) > limit:
        return f'<div class="mv-text mv-long" tabindex="0">{escaped(_shortened(text, limit))}</div>'
    tagged = from_text(text, None, "generation", "")
    timeline = ""
    if tagged.layout.blocks:
        drawn = timeline_svg(tagged.spans, tagged.steps, 640, "steps (words of the critical path)")
        timeline = f'<div class="mv-scroll" tabindex="0">{drawn}</div>'
    return timeline + tree_html(tagged.layout, tagged.text_of, unit=tagged.unit)


def _tags(text: str) -> int:
    return len(_TAG.findall(text))


def _name(record: Record) -> str:
    return _shortened(f"{record['question']}, sample {record['sample']}", _ANSWER)


def _shortened(text: str, most: int) -> str:
    """A text without its middle, if it is longer."""
    if len(text) <= most:
        return text
    end = most // 2
    return f"{text[: most - end]}\n[… {len(text) - most:,} characters are left out …]\n{text[-end:]}"
