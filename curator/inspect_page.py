"""One self-contained HTML page that shows records beside their source, finished and rejected ones.

On the left stands the original, its sentences in the colour of the path that they went to; on the right the text as a
tree with its timeline, what was measured, and what failed on the way. Every record folds, and so do pages of them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from multiverse.curator.output import (
    ANSWER,
    COLUMNS,
    DATA_FILE,
    DRAFTS_FILE,
    ID,
    PROVENANCE,
    REJECTS_FILE,
    read_lines,
)
from multiverse.curator.records import Draft
from multiverse.curator.source_colours import coloured_pieces, step_colours
from multiverse.curator.sources import Row, open_rows
from multiverse.hub_card.drawings import escaped, timeline_svg, tree_html
from multiverse.hub_card.page import TaggedText, page_head
from multiverse.hub_card.view import from_text
from multiverse.version import __version__

#: Records that one fold of the page holds.
PAGE = 25
# Letters of a question in the line of its record, and of a value that is not folded away.
_HEADING, _SHORT = 110, 300


@dataclass(frozen=True)
class InspectedRecord:
    """A record as the page shows it.

    Attributes:
        id (`str`): of its chain.
        question, trajectory, attempt (`str`): the source.
        answer (`str`, *optional*): the answer that is known to be right.
        parallel (`str`, *optional*): the text with tags, where it came that far.
        draft (`Draft`, *optional*): what the stages have made.
        provenance (`Mapping`): of a finished record.
        stage, reason (`str`, *optional*): of a rejected record, the stage that failed last and why.
        story (sequence of `Mapping`): what was tried.
    """

    id: str
    question: str
    trajectory: str
    attempt: str
    answer: str | None = None
    parallel: str | None = None
    draft: Draft | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    stage: str | None = None
    reason: str | None = None
    story: Sequence[Mapping[str, Any]] = ()

    @property
    def finished(self) -> bool:
        """Whether it is part of the dataset."""
        return self.stage is None

    @property
    def attempts(self) -> int:
        """Attempts of all stages; 0 where nothing is known of them."""
        counted = self.provenance.get("attempts")
        if isinstance(counted, Mapping):
            return sum(value for value in counted.values() if isinstance(value, int))
        return len(self.story)


def inspect(source: str | Path, output: str | Path = "records.html", limit: int = 50) -> tuple[int, int]:
    """Writes the page about an output folder.

    Args:
        source (`str` or `Path`): the folder; or its `.parquet` file, or a file of rejects, alone.
        output (`str` or `Path`): the page; one that is there is replaced.
        limit (`int`): most finished and most rejected records to show. A record takes three to four times the size of
            its texts.

    Returns:
        `tuple[int, int]`: how many finished and how many rejected records are shown.

    Raises:
        ValueError: if there is nothing to show, or an argument does not fit.
    """
    source, output = Path(source), Path(output)
    if limit < 1:
        raise ValueError(f"`limit` is {limit}. Give a positive number.")
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f"`output` ({output}) is the source itself. Name another file.")
    if not source.exists():
        raise ValueError(f"`source` ({source}) does not exist. Name the folder that the curator has written.")
    finished = list(islice(finished_records(source), limit))
    rejected = list(islice(rejected_records(source), limit))
    if not finished and not rejected:
        raise ValueError(
            f"`source` ({source}) has neither {DATA_FILE} nor {REJECTS_FILE} with records. Name the folder that the "
            "curator has written."
        )
    page = render_records([*finished, *rejected], source.resolve().name)
    output.write_text(page, encoding="utf-8", errors="replace")
    return len(finished), len(rejected)


def finished_records(source: Path) -> Iterator[InspectedRecord]:
    """The finished records of an output folder or of its `.parquet` file, in order."""
    data = source / DATA_FILE if source.is_dir() else source
    if data.suffix != ".parquet" or not data.is_file():
        return
    drafts = source / DRAFTS_FILE if source.is_dir() else source.parent.parent / DRAFTS_FILE
    waiting = _LinesById(drafts)
    for number, row in enumerate(open_rows(data)[0]):
        if number == 0 and COLUMNS.parallel not in row:
            raise ValueError(f"`source`: {data} has no column {COLUMNS.parallel!r}, only {sorted(row)}.")
        entry = waiting.get(str(row.get(ID)))
        yield _finished(row, number, Draft.from_dict(entry["draft"]) if entry else None)


def rejected_records(source: Path) -> Iterator[InspectedRecord]:
    """The rejected records of an output folder, or of a file of them, in order."""
    path = source / REJECTS_FILE if source.is_dir() else source
    if path.suffix != ".jsonl":
        return
    for entry in read_lines(path):
        if "stage" not in entry or "trajectory" not in entry:
            raise ValueError(f"`source`: {path} holds other rows than rejected records: {sorted(entry)}.")
        yield InspectedRecord(
            id=entry["id"],
            question=entry["question"],
            trajectory=entry["trajectory"],
            attempt=entry["attempt"],
            answer=entry.get("answer"),
            parallel=entry.get("parallel"),
            draft=Draft.from_dict(entry["draft"]) if entry.get("draft") else None,
            stage=entry["stage"],
            reason=entry.get("reason", ""),
            story=entry.get("story") or (),
        )


def render_records(records: Sequence[InspectedRecord], title: str = "records") -> str:
    """A page that needs nothing but itself: no scripts, no fonts, no pictures from elsewhere.

    Args:
        records (sequence of `InspectedRecord`): in the order shown.
        title (`str`): of the page.

    Returns:
        `str`: an HTML document.

    Raises:
        ValueError: if there is no record.
    """
    if not records:
        raise ValueError("`records` is empty. Pass at least one.")
    finished = sum(record.finished for record in records)
    parts = [
        page_head(title, _STYLE),
        f'<body class="cu-page"><header><h1>{escaped(title)}</h1><p>{finished:,} finished and '
        f"{len(records) - finished:,} rejected records are shown. {_INTRODUCTION}</p></header><main>",
    ]
    for start in range(0, len(records), PAGE):
        page = records[start : start + PAGE]
        opened = " open" if start == 0 else ""
        parts.append(
            f'<details class="mv cu-fold"{opened}><summary>records {start + 1} to {start + len(page)}</summary>'
        )
        parts += [_record(record, number) for number, record in enumerate(page, start=start + 1)]
        parts.append("</details>")
    return "".join([*parts, f"</main><footer><p>multiverse {__version__}</p></footer></body></html>\n"])


_INTRODUCTION = (
    "On the left is the original; where the draft is known, a sentence has the colour of the path that it went to, "
    "grey for what stands outside every path. On the right is the text that was made of it. Its timeline is what the "
    "structure allows, not a measurement; lengths are counted in words."
)


class _LinesById:
    """Entries of a file that are asked for in the file's order; of the others nothing is kept."""

    def __init__(self, path: Path) -> None:
        self._entries = iter(read_lines(path))
        self._next = next(self._entries, None)

    def get(self, own: str) -> dict[str, Any] | None:
        # Both files are sorted by id.
        while self._next is not None and self._next["id"] < own:
            self._next = next(self._entries, None)
        return self._next if self._next is not None and self._next["id"] == own else None


def _finished(row: Row, number: int, draft: Draft | None) -> InspectedRecord:
    provenance = row.get(PROVENANCE)
    return InspectedRecord(
        id=str(row.get(ID, number)),
        question=row.get(COLUMNS.question) or "",
        trajectory=row.get(COLUMNS.sequential) or "",
        attempt=row.get(COLUMNS.attempt) or "",
        answer=row.get(ANSWER),
        parallel=row.get(COLUMNS.parallel),
        draft=draft,
        provenance=json.loads(provenance) if isinstance(provenance, str) else {},
    )


def _record(record: InspectedRecord, number: int) -> str:
    text = from_text(record.parallel, None, record.id, "") if (record.parallel or "").strip() else None
    state = "finished" if record.finished else "rejected"
    figures = {} if text is None else text.figures()
    brief = [f"{record.attempts:,} attempts"] if record.attempts else []
    if text is not None:
        brief += [f"{figures['paths']} paths", f"speed-up {figures['degree of parallelism']}"]
    if not record.finished:
        brief.append(f"failed at {record.stage}")
    question = " ".join(record.question.split())
    question = question if len(question) <= _HEADING else question[: _HEADING - 1] + "…"
    return (
        f'<details class="cu-record" id="record-{number}"><summary><span class="cu-{state}">{state}</span> '
        f'{escaped(record.id)} <span class="mv-note">{escaped(", ".join(brief))}</span> '
        f'<span class="cu-question">{escaped(question)}</span></summary><div class="cu-sides">'
        f"<section><h3>Source</h3>{_source(record)}</section><section><h3>Structure</h3>"
        f"{_structure(text, figures)}{_facts(record)}</section></div></details>"
    )


def _source(record: InspectedRecord) -> str:
    parts = [f"<h4>question</h4>{_box(record.question)}"]
    if record.answer:
        parts.append(f"<h4>known answer</h4>{_box(record.answer)}")
    colours = step_colours(record.draft) if record.draft is not None else {}
    titles = {}
    if record.draft is not None and record.draft.steps:
        titles = {leaf.label: leaf.title for step in record.draft.steps for leaf in step.leaves()}
        parts.append(_outline(record.draft, colours))
    parts.append("<h4>chain of thought</h4>")
    pieces = []
    for piece in coloured_pieces(record.trajectory, record.draft):
        content = escaped(record.trajectory[piece.start : piece.end])
        if piece.label is None:
            pieces.append(content)
        else:
            name = escaped(f"{piece.label}: {titles.get(piece.label, '')}")
            pieces.append(f'<span class="cu-step" style="--mv-branch:{colours[piece.label]}" title="{name}">')
            pieces.append(f"{content}</span>")
    parts.append(f'<div class="mv-text cu-long" tabindex="0">{"".join(pieces)}</div>')
    parts.append(f"<h4>final answer</h4>{_box(record.attempt)}")
    return "".join(parts)


def _outline(draft: Draft, colours: Mapping[str, str]) -> str:
    """Steps in their colours, and which of them belong together."""
    items = []
    for step in draft.steps:
        for each in (step, *step.children):
            colour = colours.get(each.label, "currentColor")
            inner = " cu-inner" if each is not step else ""
            items.append(
                f'<li class="mv-outline{inner}" style="--mv-branch:{colour}">{escaped(each.label)}: '
                f"{escaped(each.title)}</li>"
            )
    groups = [
        f"<li><strong>{escaped(', '.join(group.labels))}</strong> {escaped(group.kind)}: {escaped(group.reason)}</li>"
        for group in draft.groups
    ]
    grouped = f"<h4>parallel groups</h4><ul>{''.join(groups)}</ul>" if groups else ""
    return f'<h4>steps</h4><ul class="cu-steps">{"".join(items)}</ul>{grouped}'


def _structure(text: TaggedText | None, figures: Mapping[str, str]) -> str:
    if text is None:
        return "<p>No text was made of it.</p>"
    rows = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in figures.items())
    problems = "".join(f"<li>{escaped(str(problem))}</li>" for problem in text.layout.problems)
    timeline = timeline_svg(text.spans, text.steps, 640, f"steps ({text.unit} of the critical path)")
    return (
        f'<dl class="cu-figures">{rows}</dl>{f"<ul>{problems}</ul>" if problems else ""}'
        f'<div class="mv-scroll" tabindex="0">{timeline}</div>'
        f"{tree_html(text.layout, text.text_of, unit=text.unit)}"
    )


def _facts(record: InspectedRecord) -> str:
    """Distances, attempts, and what failed."""
    parts = []
    if record.reason is not None:
        parts.append(f"<h3>Why it was rejected</h3>{_box(f'{record.stage}: {record.reason}')}")
    if record.draft is not None and record.draft.measures:
        parts.append(f"<h3>Measures</h3>{_values(record.draft.measures)}")
    if record.provenance:
        parts.append(f"<h3>Provenance</h3>{_values(record.provenance)}")
    if record.story:
        entries = "".join(f"<li>{_values(entry)}</li>" for entry in record.story)
        parts.append(f"<h3>What was tried</h3><ol>{entries}</ol>")
    return "".join(parts)


def _values(values: Mapping[str, Any]) -> str:
    """Names and values in two columns; what is long is folded away."""
    return f'<dl class="cu-values">{"".join(_pairs(values))}</dl>'


def _pairs(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _pairs(value, f"{prefix}{name} ")
            continue
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        content = _box(shown)
        if len(shown) > _SHORT:
            content = f"<details><summary>{len(shown):,} characters</summary>{content}</details>"
        yield f"<dt>{escaped(f'{prefix}{name}')}</dt><dd>{content}</dd>"


def _box(content: str) -> str:
    return f'<div class="mv-text">{escaped(content)}</div>'


_STYLE = """
:root { color-scheme: light dark; }
.cu-page { margin: 0 auto; max-width: 100rem; padding: 1rem; font-family: system-ui, sans-serif; color: #1c1e21;
  background: #fff; }
@media (prefers-color-scheme: dark) { .cu-page { color: #e4e6ea; background: #16181d; } }
.cu-page h1 { font-size: 1.5rem; margin: 0.3rem 0; }
.cu-page h3 { font-size: 1.05rem; margin: 1rem 0 0.3rem; }
.cu-page h4 { margin: 0.7rem 0 0.1rem; font-size: 0.8em; opacity: 0.75; text-transform: uppercase; }
.cu-page header p { max-width: 50rem; line-height: 1.45; }
.cu-record { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: 0.2rem 0; }
.cu-question { font-weight: normal; opacity: 0.8; overflow-wrap: anywhere; }
.cu-finished, .cu-rejected { border-radius: 3px; padding: 0 0.4em; font-size: 0.85em; color: #fff; }
.cu-finished { background: #1b7a3d; }
.cu-rejected { background: #c1121f; }
.cu-sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1.5rem;
  align-items: start; }
.cu-sides > section { min-width: 0; }
.cu-long { max-height: 60rem; overflow-y: auto; }
.cu-step { background: color-mix(in srgb, var(--mv-branch) 16%, transparent);
  border-bottom: 2px solid var(--mv-branch); }
.cu-steps { list-style: none; padding: 0; margin: 0.2rem 0; }
.cu-steps .cu-inner { margin-left: 1.5rem; }
.cu-figures { display: flex; flex-wrap: wrap; gap: 0.5rem; margin: 0.4rem 0; }
.cu-figures div { border: 1px solid color-mix(in srgb, currentColor 25%, transparent); border-radius: 6px;
  padding: 0.2rem 0.6rem; }
.cu-figures dt { font-size: 0.75rem; opacity: 0.75; }
.cu-figures dd { margin: 0; font-variant-numeric: tabular-nums; }
.cu-values { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 0.8rem; margin: 0.3rem 0; }
.cu-values dt { opacity: 0.75; }
.cu-values dd { margin: 0; min-width: 0; }
"""
