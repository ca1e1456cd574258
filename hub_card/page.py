"""One self-contained HTML page that shows texts: figures, timeline, the text as a tree, attention mask."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from multiverse.hub_card.branch_shapes import Span, path_numbers, position_spans, report_spans
from multiverse.hub_card.drawings import STYLE, TextOf, escaped, mask_svg, timeline_svg, tree_html
from multiverse.layout import BranchLayout
from multiverse.structure import Block
from multiverse.version import __version__

_PAGE_STYLE = """
:root { color-scheme: light dark; }
.mv-page { margin: 0 auto; max-width: 76rem; padding: 1rem; font-family: system-ui, sans-serif; color: #1c1e21;
  background: #fff; }
@media (prefers-color-scheme: dark) { .mv-page { color: #e4e6ea; background: #16181d; } }
.mv-page h1 { font-size: 1.5rem; margin: 0.3rem 0; }
.mv-page h2 { font-size: 1.25rem; margin: 2rem 0 0.3rem; overflow-wrap: anywhere; }
.mv-page h3 { font-size: 1.05rem; margin: 1.6rem 0 0.3rem; }
.mv-page p { max-width: 46rem; line-height: 1.45; margin: 0.3rem 0 0.6rem; }
.mv-page a { color: inherit; }
.mv-figures { display: flex; flex-wrap: wrap; gap: 0.5rem; margin: 0.6rem 0; }
.mv-figures div { border: 1px solid color-mix(in srgb, currentColor 25%, transparent); border-radius: 6px;
  padding: 0.35rem 0.7rem; }
.mv-figures dt { font-size: 0.8rem; opacity: 0.75; }
.mv-figures dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.mv-problems li { margin: 0.15rem 0; }
"""

# Characters of a path's first line that name it.
_LABEL = 80


@dataclass(eq=False)
class TaggedText:
    """A text as it is shown: its structure, its words, and how it came about.

    Attributes:
        name (`str`): heading.
        layout (`BranchLayout`): structure of the whole text, the prompt included.
        text_of (`Callable[[int, int], str]`): text of the tokens from one index to another, see `drawings.TextOf`.
        start (`int`): index of the first token that was generated; 0 where there is no prompt.
        unit (`str`): what the tokens are, `"tokens"` or `"words"`.
        report (`Mapping`, *optional*): `RequestReport.to_dict()` of the generation that made the text.
    """

    name: str
    layout: BranchLayout
    text_of: TextOf
    start: int = 0
    unit: str = "tokens"
    report: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= len(self.layout):
            raise ValueError(f"`start` must lie in [0, {len(self.layout)}], got {self.start}.")
        if self.report is not None:
            found = {span.branch for span in self.spans}
            if not found <= set(range(len(self.layout.machine.parents))):
                raise ValueError(
                    f"`report` tells of branch {max(found)}, but the text has {len(self.layout.machine.parents)} "
                    "branches. Pass the report of this very text, with its prompt if that holds blocks."
                )

    @cached_property
    def labels(self) -> dict[int, str]:
        """Name of every path: the first line of its text, with its place in the tree where that has no number."""
        events = [index for index, _ in self.layout.machine.events]
        following = dict(zip(events, [*events[1:], len(self.layout)], strict=True))
        labels, starts = {}, {path.branch: path.start for block in all_blocks(self.layout) for path in block.paths}
        for branch, number in path_numbers(self.layout).items():
            start = starts[branch]
            words = self.text_of(start + 1, following[start]).strip()
            line = words.splitlines()[0].strip()[:_LABEL] if words else ""
            labels[branch] = line if line[:1].isdecimal() else f"{number} {line}".strip()
        return labels

    @cached_property
    def spans(self) -> list[Span]:
        """Rows of the timeline."""
        if self.report is not None:
            return report_spans(self.report, self.labels)
        return position_spans(self.layout, self.start, self.labels)

    @property
    def made(self) -> int:
        """Tokens without the prompt's."""
        return len(self.layout) - self.start if self.report is None else int(self.report["generated_tokens"])

    @property
    def steps(self) -> int:
        """Length of the critical path: measured, or as short as the structure allows."""
        if self.report is not None:
            return int(self.report["sequential_steps"])
        return max((last for span in self.spans for _, last in span.segments), default=0)

    def figures(self) -> dict[str, str]:
        """What the head of its section says."""
        measured, blocks = self.report is not None, all_blocks(self.layout)
        figures = {
            "tokens" if measured else self.unit: f"{self.made:,}",
            "sequential steps" if measured else "critical path": f"{self.steps:,}",
            "degree of parallelism": f"{self.made / max(self.steps, 1):.2f}",
            "blocks": f"{len(blocks):,}",
            "paths": f"{sum(len(block.paths) for block in blocks):,}",
            "depth": f"{max((number.count('.') + 1 for number in path_numbers(self.layout).values()), default=0)}",
            "problems": f"{len(self.layout.problems):,}",
        }
        if self.report is not None and self.report.get("finish_reason"):
            figures["ended by"] = str(self.report["finish_reason"])
        return figures


def all_blocks(layout: BranchLayout) -> list[Block]:
    """Every block of a text, nested ones included."""
    found, waiting = [], list(layout.blocks)
    while waiting:
        block = waiting.pop()
        found.append(block)
        waiting += (inner for path in block.paths for inner in path.blocks)
    return found


def page_head(title: str, style: str) -> str:
    """The head of a self-contained page: the drawings' style sheet, and the page's own after it."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escaped(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{style}</style></head>"
    )


def render_page(texts: Sequence[TaggedText], title: str = "Multiverse") -> str:
    """A page that needs nothing but itself: no scripts, no fonts, no pictures from elsewhere.

    Args:
        texts (sequence of `TaggedText`): one section each.
        title (`str`): of the page.

    Returns:
        `str`: an HTML document.

    Raises:
        ValueError: if there is no text.
    """
    if not texts:
        raise ValueError("`texts` is empty. Pass at least one text.")
    parts = [page_head(title, _PAGE_STYLE), f'<body class="mv-page"><header><h1>{escaped(title)}</h1>{_INTRODUCTION}']
    if len(texts) > 1:
        links = (f'<li><a href="#text-{n}">{escaped(text.name)}</a></li>' for n, text in enumerate(texts, start=1))
        parts.append(f"<nav><ol>{''.join(links)}</ol></nav>")
    parts.append("</header><main>")
    parts += [_section(text, number, alone=len(texts) == 1) for number, text in enumerate(texts, start=1)]
    return "".join([*parts, f"</main><footer><p>multiverse {__version__}</p></footer></body></html>\n"])


_INTRODUCTION = (
    "<p>A model may split its work: in a <em>block</em> it first writes a <em>goal</em> with one outline per subtask, "
    "then works on a <em>path</em> for each of them at the same time, and goes on with a <em>conclusion</em> that has "
    "read them all. Paths are told apart by colour; what is written outside every path, the <em>root</em>, is "
    "grey.</p>"
)


def _section(text: TaggedText, number: int, alone: bool) -> str:
    def heading(words: str) -> str:
        return f"<h2>{words}</h2>" if alone else f"<h3>{words}</h3>"

    measured = text.report is not None
    figures = (f"<div><dt>{escaped(name)}</dt><dd>{escaped(each)}</dd></div>" for name, each in text.figures().items())
    notes = {span.branch: _steps(span) for span in text.spans}
    unit = "sequential steps" if measured else f"steps ({text.unit} of the critical path)"
    parts = [f'<section class="mv" id="text-{number}">']
    if not alone:
        parts.append(f"<h2>{escaped(text.name)}</h2>")
    parts.append(f'<dl class="mv-figures">{"".join(figures)}</dl>{_WORDS if text.unit == "words" else ""}')
    parts.append(_problems(text))
    parts.append(heading(f"When each branch {'was' if measured else 'can be'} written"))
    parts.append(f"<p>{_MEASURED if measured else _POSSIBLE}</p>")
    parts.append(f'<div class="mv-scroll" tabindex="0">{timeline_svg(text.spans, text.steps, 840, unit)}</div>')
    parts.append(heading("What was written"))
    parts.append(
        tree_html(text.layout, text.text_of, start=text.start, unit=text.unit, notes=lambda b: notes.get(b, ""))
    )
    parts.append(f"{heading('Who sees whom')}<p>{_MASK}{_STARTED if text.start else ''}</p>")
    parts.append(
        f'<div class="mv-scroll" tabindex="0">{mask_svg(text.layout, 560, text.unit, start=text.start)}</div>'
    )
    return "".join([*parts, "</section>"])


_WORDS = (
    "<p>No tokenizer was given, so lengths are counted in <strong>words, not tokens</strong>: a tag, a word, and the "
    "line break between two tags count as one each.</p>"
)
_MEASURED = (
    "Measured: in one sequential step every running branch gets a token. Bars above one another were written at the "
    "same time; a branch waits (dotted) while its paths are written."
)
_POSSIBLE = (
    "Possible, <strong>not measured</strong>: the text tells what depends on what, so each branch is drawn where it "
    "can be written at the earliest. Bars above one another can be written at the same time; a branch waits (dotted) "
    "while its paths are written."
)
_MASK = (
    "Every row is one place in the text, from top to bottom, and its colours are the branches that the model can look "
    "back at from there. Gaps are paths that it cannot see: those beside its own."
)
_STARTED = " The dashed corner is where the prompt ends."


def _steps(span: Span) -> str:
    first, last = min(span.segments)[0], max(span.segments)[1]
    return f"steps {first:,} to {last:,}" if first < last else f"step {first:,}"


def _problems(text: TaggedText) -> str:
    found = Counter(problem.kind for problem in text.layout.problems)
    if not found:
        return ""
    items = "".join(
        f"<li>{escaped(kind)}{f' ({count} times)' if count > 1 else ''}</li>" for kind, count in found.items()
    )
    return (
        "<p>The text is not well-formed; it is read by the same rules all the same. What is wrong is marked in red "
        f'where it stands:</p><ul class="mv-problems">{items}</ul>'
    )
