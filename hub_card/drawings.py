"""Pictures of Multiverse texts as strings of SVG and HTML: who was written when, who sees whom, and what was said.

Pure functions. Every string stands by itself in a page, whatever its background: lines and letters take the colour of
the text around them. `STYLE` is the one style sheet; it touches nothing but classes that begin with `mv-`.
"""

import html
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

from multiverse.hub_card.branch_shapes import KeyRun, Span, mask_runs, path_numbers
from multiverse.layout import BranchLayout
from multiverse.structure import Block, Path

#: What paths are drawn in, one after the other. Told apart by readers who see less red, green or blue, too, and at
#: least 3:1 against white and against the dark page (WCAG 1.4.11).
COLOURS = ("#0475b6", "#ea570c", "#b072f6", "#c1350e", "#099eb6", "#99545f", "#8327fe", "#c76f74")
ROOT_COLOUR = "#767b85"

#: The text of the tokens from one index to another, `lambda start, end: tokenizer.decode(ids[start:end])`. It is
#: asked for whole stretches between tags only, so a character of several tokens comes out whole.
TextOf = Callable[[int, int], str]

# A browser stops at 512 elements inside one another.
_DEEPEST = 24
# Characters of a stretch of text that gets a box of limited height.
_LONG = 1500
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def branch_colour(branch_number: int) -> str:
    """Grey for the root (0), and for paths one of `COLOURS` in turn."""
    return ROOT_COLOUR if branch_number == 0 else COLOURS[(branch_number - 1) % len(COLOURS)]


def timeline_svg(
    spans: Sequence[Span], steps: int, width: int = 720, unit: str = "sequential steps", name: str = "Timeline"
) -> str:
    """Branches from top to bottom, steps from left to right; a dotted line where a branch waits for its paths.

    Args:
        spans (sequence of `Span`): rows in order, as `position_spans` and `report_spans` give them.
        steps (`int`): length of the axis.
        width (`int`): of the picture; letters stay readable down to about 500.
        unit (`str`): what the axis counts.
        name (`str`): of the picture, for screen readers.

    Returns:
        `str`: an `<svg>` element.
    """
    row, top = 20, 22
    letters = max((len(_short(span.label)) * 6.4 + _indent(span) for span in spans), default=0)
    left = min(round(letters) + 14, round(width * 0.4))
    bottom = top + row * len(spans)
    height = bottom + 38
    scale = (width - left - 14) / max(steps, 1)

    def x(step: float) -> str:
        return f"{left + step * scale:.1f}".removesuffix(".0")

    what = f"{name}: {len(spans)} branches over {steps:,} {unit}"
    parts = [
        _svg(width, height, what, "mv-timeline"),
        '<g stroke="currentColor" stroke-opacity="0.18">',
        *(f'<path d="M{x(tick)} {top - 4}V{bottom + 4}"/>' for tick in _ticks(steps)),
        '</g><g fill="currentColor" text-anchor="middle" fill-opacity="0.75">',
        *(f'<text x="{x(tick)}" y="{bottom + 18}">{tick:,}</text>' for tick in _ticks(steps)),
        *(f'<text x="{x(tick)}" y="{top - 8}">{tick:,}</text>' for tick in _ticks(steps) if len(spans) > 20),
        f'<text x="{x(steps / 2)}" y="{bottom + 34}">{escaped(unit)}</text></g>',
    ]
    for number, span in enumerate(spans):
        y = top + row * number
        colour, segments = branch_colour(span.branch), sorted(span.segments)
        written = ", ".join(f"{first:,} to {last:,}" if first < last else f"{first:,}" for first, last in segments)
        title = f"{span.label}: {unit} {written}" + (f"; {span.note}" if span.note else "")
        parts.append(f'<g fill="{colour}"><title>{escaped(title)}</title>')
        parts.append(
            f'<text x="{_indent(span)}" y="{y + 14}" fill="currentColor">{escaped(_short(span.label))}</text>'
        )
        if len(segments) > 1:
            line = f'd="M{x(segments[0][1])} {y + 10}H{x(segments[-1][0])}"'
            parts.append(f'<path {line} stroke="{colour}" stroke-dasharray="1 4" stroke-linecap="round"/>')
        for first, last in segments:
            begin = max(first - 1, 0)
            length = f"{max((last - begin) * scale, 1.5):.1f}".removesuffix(".0")
            parts.append(f'<rect x="{x(begin)}" y="{y + 4}" width="{length}" height="12" rx="2"/>')
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def mask_svg(
    layout: BranchLayout, size: int = 480, unit: str = "tokens", name: str = "Attention mask", start: int = 0
) -> str:
    """The attention mask of a whole text: what a row's token sees of a branch is drawn in that branch's colour.

    The areas are measured in tokens (the inner `<svg>`), so they are exact whatever the size of the picture: a
    rectangle for the later tokens that see a run of a branch, and a triangle for the run itself.

    Args:
        layout (`BranchLayout`): of the text.
        size (`int`): width and height of the mask.
        unit (`str`): what the axes count.
        name (`str`): of the picture, for screen readers.
        start (`int`): index of the first generated token, marked by a line; 0 for none.

    Returns:
        `str`: an `<svg>` element.
    """
    length, numbers = len(layout), path_numbers(layout)
    left, top = 58, 40
    scale = size / max(length, 1)
    ticks = [(tick, round(tick * scale, 1)) for tick in _ticks(length)]
    what = f"{name}: {length:,} {unit}, {len(layout.machine.parents)} branches"
    parts = [
        _svg(left + size + 14, top + size + 10, what, "mv-mask"),
        '<g fill="currentColor" fill-opacity="0.75">',
        *(f'<text x="{left + at}" y="{top - 6}" text-anchor="middle">{tick:,}</text>' for tick, at in ticks),
        *(f'<text x="{left - 6}" y="{top + at + 4}" text-anchor="end">{tick:,}</text>' for tick, at in ticks),
        f'<text x="{left + size / 2}" y="14" text-anchor="middle">what is seen ({escaped(unit)})</text>',
        f'<text transform="translate(12 {top + size / 2})rotate(-90)" text-anchor="middle">who looks</text></g>',
        f'<svg x="{left}" y="{top}" width="{size}" height="{size}" viewBox="0 0 {max(length, 1)} {max(length, 1)}" '
        'preserveAspectRatio="none" shape-rendering="crispEdges">',
        *(_mask_area(run, layout.machine.parents, numbers, unit) for run in mask_runs(layout)),
        "</svg>",
    ]
    if 0 < start < length:
        at = start * scale
        parts.append(
            f'<path class="mv-start" d="M{left} {top + at:.1f}H{left + at:.1f}V{top}" fill="none" '
            'stroke="currentColor" stroke-dasharray="3 3"/>'
        )
    frame = f'<rect x="{left}" y="{top}" width="{size}" height="{size}" fill="none" stroke="currentColor" '
    return "".join([*parts, frame, 'stroke-opacity="0.4"/></svg>'])


def tree_html(
    layout: BranchLayout,
    text_of: TextOf,
    *,
    start: int = 0,
    unit: str = "tokens",
    notes: Callable[[int], str] | None = None,
    folded: bool = False,
) -> str:
    """The text as a tree that folds: blocks with their goal, their paths side by side, and their conclusion.

    Args:
        layout (`BranchLayout`): of the text.
        text_of (`Callable[[int, int], str]`): see `TextOf`.
        start (`int`): index of the first generated token; what stands before it is folded away as the prompt, unless
            a block begins there.
        unit (`str`): what lengths are counted in.
        notes (`Callable[[int], str]`, *optional*): more about the branch of a number, shown beside its name.
        folded (`bool`): whether paths are folded at first.

    Returns:
        `str`: a `<div>` element; all text of the model is escaped, and malformed places are marked where they are.
    """
    return _TreeWriter(layout, text_of, unit, notes, folded).write(start)


class _TreeWriter:
    """Goes through the tree of blocks in linear order, so every token is written exactly once."""

    def __init__(
        self,
        layout: BranchLayout,
        text_of: TextOf,
        unit: str,
        notes: Callable[[int], str] | None,
        folded: bool,
    ) -> None:
        self.layout, self.text_of, self.unit, self.notes = layout, text_of, unit, notes
        self.open = "" if folded else " open"
        self.events = [(index, tag) for index, tag in layout.machine.events if tag]
        self.documents = [index for index, tag in layout.machine.events if not tag]
        self.numbers = path_numbers(layout)
        self.blocks = 0
        self.problems: dict[int, list[str]] = {}
        for problem in layout.problems:
            self.problems.setdefault(problem.index, []).append(f"{problem.kind}: {problem.message}")

    def write(self, start: int) -> str:
        end, blocks = len(self.layout), self.layout.blocks
        parts = ['<div class="mv mv-tree">']
        if start and not any(block.start < start for block in blocks):
            count = self._count(0, start)
            parts.append(f'<details class="mv-prompt"><summary>prompt <span class="mv-note">{count}</span></summary>')
            parts.append(self._box(self._text(0, start)) + "</details>")
        else:
            start = 0
        return "".join([*parts, self._region(start, end, blocks, 0), "</div>"])

    def _region(self, start: int, end: int, blocks: Sequence[Block], depth: int) -> str:
        """One branch's own text with whole blocks in between."""
        parts = []
        for block in blocks:
            # A block inside the goal or the conclusion of another one is written there.
            if start <= block.start < end and depth < _DEEPEST:
                stop = block.end
                if stop is None:  # what is left open ends with its document
                    after = self.documents[bisect_right(self.documents, block.start) :]
                    stop = min([end, *after[:1]])
                parts += [self._box(self._text(start, block.start)), self._block(block, stop, blocks, depth)]
                start = stop
        return "".join([*parts, self._box(self._text(start, end))])

    def _block(self, block: Block, end: int, around: Sequence[Block], depth: int) -> str:
        self.blocks += 1
        count = f"{len(block.paths)} paths" if len(block.paths) != 1 else "1 path"
        if len(block.outlines) != len(block.paths):
            count += f" for {len(block.outlines)} outlines"
        parts = [
            f'<details class="mv-block" open><summary>block {self.blocks} '
            f'<span class="mv-note">{count}, {self._count(block.start, end)}</span></summary>'
        ]
        at, paths = block.start, list(block.paths)
        while at < end:
            # Paths follow one another; a parent's text between two of them is malformed, and stands where it is.
            row: list[str] = []
            while paths and paths[0].start == at:
                path = paths.pop(0)
                at = end if path.end is None else path.end
                row.append(self._path(path, at, depth))
            if row:
                parts.append(f'<div class="mv-paths">{"".join(row)}</div>')
            stop = paths[0].start if paths else end
            if block.conclusion is not None and at < block.conclusion < stop:
                stop = block.conclusion
            if at < stop:
                parts.append(self._part(block, at, stop, around, depth))
                at = stop
        return "".join([*parts, "</details>"])

    def _part(self, block: Block, start: int, end: int, around: Sequence[Block], depth: int) -> str:
        """Goal, conclusion, or what stands outside both and outside the paths."""
        inner = [each for each in around if start < each.start < end]
        stage = "goal" if start == block.start else "conclusion" if start == block.conclusion else ""
        parts, at = ['<section class="mv-part">', f"<h4>{stage}</h4>" if stage else ""], start
        for number, outline in enumerate(block.outlines if stage == "goal" else []):
            after = self.events[bisect_left(self.events, (outline + 1, "")) :][:1]
            stop = next((index + (tag == "</Outline>") for index, tag in after), end)
            if any(each.start < stop and outline < (each.end or end) for each in inner) or stop > end:
                continue
            path = block.paths[number].branch if number < len(block.paths) else 0
            parts.append(self._region(at, outline, inner, depth + 1))
            parts.append(f'<div class="mv-outline" style="--mv-branch:{branch_colour(path)}">')
            parts.append(self._box(self._text(outline, stop)) + "</div>")
            at = stop
        return "".join([*parts, self._region(at, end, inner, depth + 1), "</section>"])

    def _path(self, path: Path, end: int, depth: int) -> str:
        note = self._count(path.start, end)
        if self.notes is not None and (more := self.notes(path.branch)):
            note += f", {escaped(more)}"
        wide = " mv-wide" if path.blocks else ""
        return (
            f'<details class="mv-path{wide}" style="--mv-branch:{branch_colour(path.branch)}"{self.open}>'
            f'<summary>path {self.numbers[path.branch]} <span class="mv-note">{note}</span></summary>'
            f"{self._region(path.start, end, path.blocks, depth + 1)}</details>"
        )

    def _text(self, start: int, end: int) -> str:
        """Plain text, tags and problems from one index to another."""
        parts, at = [], start
        for index, tag in self.events[bisect_left(self.events, (start, "")) : bisect_left(self.events, (end, ""))]:
            parts.append(escaped(self.text_of(at, index)) if at < index else "")
            parts.append(f'<span class="mv-tag">{escaped(tag)}</span>')
            parts += [f'<strong class="mv-problem">{escaped(text)}</strong>' for text in self.problems.get(index, ())]
            at = index + 1
        parts.append(escaped(self.text_of(at, end)) if at < end else "")
        return "".join(parts)

    def _box(self, content: str) -> str:
        if not content.strip():
            return f'<span class="mv-gap">{content}</span>' if content else ""
        # A line break before or after a block is there in the text, but a frame divides well enough.
        begin = content[: len(content) - len(content.lstrip("\n"))]
        gap = f'<span class="mv-gap">{begin}</span>' if begin else ""
        # What scrolls must be reached by the keyboard; what does not is no place to stop at.
        scrolls = ' mv-long" tabindex="0' if len(content) > _LONG else ""
        return f'<div class="mv-text{scrolls}">{gap}{content[len(begin) :]}</div>'

    def _count(self, start: int, end: int) -> str:
        return f"{end - start:,} {self.unit if end - start != 1 else self.unit.removesuffix('s')}"


def _mask_area(run: KeyRun, parents: Sequence[int], numbers: dict[int, str], unit: str) -> str:
    start, end = run.start, run.end
    name = f"path {numbers[run.branch]}" if run.branch in numbers else "root"
    colour = ROOT_COLOUR if parents[run.branch] < 0 else branch_colour(run.branch)
    areas = "".join(
        f'<rect x="{start}" y="{first}" width="{end - start}" height="{last - first}"/>' for first, last in run.seen_by
    )
    return (
        f'<g fill="{colour}"><title>{name}: {unit} {start:,} to {end - 1:,}</title>'
        f'<polygon points="{start},{start} {end},{end} {start},{end}"/>{areas}</g>'
    )


def _svg(width: float, height: float, what: str, css: str) -> str:
    what = escaped(what)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="{css}" role="img" aria-label="{what}" width="{width:g}" '
        f'height="{height:g}" viewBox="0 0 {width:g} {height:g}" font-family="system-ui, sans-serif" font-size="12">'
        f"<title>{what}</title>"
    )


def _ticks(length: int, most: int = 6) -> Iterable[int]:
    """Round numbers from 0 to `length`."""
    if length <= 0:
        return [0]
    exact = length / most
    power = 10 ** math.floor(math.log10(exact)) if exact >= 1 else 1
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= exact)
    return range(0, length + 1, step)


def _indent(span: Span) -> int:
    # Malformed text nests without end.
    return 4 + 12 * min(span.depth, 10)


def _short(label: str, most: int = 34) -> str:
    return label if len(label) <= most else label[: most - 1].rstrip() + "…"


def escaped(text: str) -> str:
    """`text` for HTML and XML, in an attribute or outside.

    Characters that XML cannot hold are replaced; a carriage return is written as a reference, since it would be read
    as a line feed.
    """
    return html.escape(_NOT_XML.sub("\ufffd", text)).replace("\r", "&#13;")


#: Colours come from the text around; only `.mv-page`, a page of its own, sets any.
STYLE = """
.mv, .mv * { box-sizing: border-box; }
.mv { line-height: 1.45; }
.mv-scroll { overflow-x: auto; }
.mv-scroll > svg { display: block; min-width: 40rem; max-width: 100%; height: auto; }
.mv-scroll > .mv-mask { min-width: 22rem; }
.mv-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.mv-long { max-height: 24rem; overflow-y: auto; scrollbar-width: thin;
  border-bottom: 1px dashed color-mix(in srgb, currentColor 40%, transparent); }
.mv-gap { white-space: normal; }
.mv-tag { opacity: 0.62; font-size: 0.78em; font-family: ui-monospace, monospace; }
.mv-note { opacity: 0.75; font-size: 0.85em; font-weight: normal; }
.mv-problem { display: inline-block; margin: 0 0.3em; padding: 0 0.4em; border-radius: 3px; font-size: 0.85em;
  background: #c1121f; color: #fff; }
.mv summary { cursor: pointer; font-weight: 600; padding: 0.15rem 0; }
.mv-block, .mv-prompt { border: 1px solid color-mix(in srgb, currentColor 30%, transparent); border-radius: 6px;
  padding: 0.4rem 0.7rem; margin: 0.6rem 0; }
.mv-part h4 { margin: 0.4rem 0 0.1rem; font-size: 0.8em; opacity: 0.75; text-transform: uppercase;
  letter-spacing: 0.05em; }
.mv-paths { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0.6rem;
  align-items: start; margin: 0.5rem 0; }
.mv-path { border-top: 4px solid var(--mv-branch); padding: 0.2rem 0.6rem 0.5rem; min-width: 0;
  background: color-mix(in srgb, var(--mv-branch) 7%, transparent); }
.mv-wide { grid-column: 1 / -1; }
.mv-outline { border-left: 4px solid var(--mv-branch); padding-left: 0.6rem; margin: 0.3rem 0; }
"""
