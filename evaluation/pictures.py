"""Figures 7 and 8 of the paper for a checkpoint, as strings of SVG for a page (they need the extra `evaluate`).

A figure is several small pictures, so that a narrow page can put them below one another. Lines and letters take the
colour of the text around them, and the same numbers give the same bytes.
"""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from multiverse.evaluation.report_tables import names
from multiverse.hub_card.drawings import COLOURS, ROOT_COLOUR, escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Tasks of which curves are drawn, and tasks and prompts whose speed is.
MOST_TASKS, MOST_SWEEPS = 8, 3
#: Inches of a picture.
SIZE = (4.2, 3.0)
# Stands for the colour of the text around, which matplotlib has no name for.
_INK = "#012345"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "multiverse",
    # Letters stay letters: readable aloud, searchable, and small.
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.framealpha": 0,
    "legend.edgecolor": "none",
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}
_MODES = {"parallel": COLOURS[0], "sequential": COLOURS[1]}
_PROMPTS = {"parallel": "-", "sequential": "--"}
_LABELS = {"parallel": "paths side by side", "sequential": "one path at a time"}


class Picture(NamedTuple):
    """One picture of a figure.

    Attributes:
        title (`str`): what it is about, in a line above it.
        svg (`str`): an `<svg>` element that says in words what it shows.
    """

    title: str
    svg: str


def budget_pictures(summary: Mapping[str, Any], most: int = MOST_TASKS) -> list[Picture]:
    """Figure 7: accuracy against the sequential steps that are allowed, a picture for every task.

    Args:
        summary (`Mapping`): of a run.
        most (`int`): tasks that are drawn.
    """
    curves = [curve for curve in summary.get("budget_curves") or [] if _points(curve)]
    pictures: list[Picture] = []
    for task in names(curves, "task")[:most]:
        figure, axes = _empty("sequential steps allowed", "pass@1, %")
        own, named = [curve for curve in curves if curve["task"] == task], set[str]()
        for curve in own:
            budgets, shares, lows, highs = zip(*_points(curve), strict=True)
            colour, marker = _MODES[curve["mode"]], "none" if curve["derived"] else "o"
            line: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3.5}
            # An arm may have both a measured and a derived curve.
            name = _arm(curve) if _arm(curve) not in named else "_nolegend_"
            named.add(name)
            axes.plot(budgets, shares, _PROMPTS[curve["prompt"]], label=name, **line)
            axes.fill_between(budgets, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(bottom=0)
        what = f"Accuracy on {task} against the sequential steps allowed: {len(own)} curves"
        pictures.append(Picture(task, _svg(figure, axes, what, f"budget-{len(pictures)}")))
    return pictures


def speed_pictures(summary: Mapping[str, Any], most: int = MOST_SWEEPS) -> list[Picture]:
    """Figure 8: latency per token against degree of parallelism, and speed-up against batch size and length.

    Args:
        summary (`Mapping`): of a run; without a speed sweep there is nothing to draw.
        most (`int`): tasks and prompts that are drawn, three pictures each.
    """
    entries = summary.get("speed") or []
    pictures: list[Picture] = []
    for task, prompt in pairs(entries)[:most]:
        own = [entry for entry in entries if (entry["task"], entry["prompt"]) == (task, prompt)]
        where = f"{task}, {prompt} prompt"
        latency = _latency_picture(own, where, f"latency-{len(pictures)}")
        batches = _speedup_picture(own, where, ("batch_size", "length"), f"batch-{len(pictures)}")
        lengths = _speedup_picture(own, where, ("length", "batch_size"), f"length-{len(pictures)}")
        pictures += [picture for picture in (latency, batches, lengths) if picture is not None]
    return pictures


def pairs(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every task and prompt of a speed sweep."""
    return list(dict.fromkeys((entry["task"], entry["prompt"]) for entry in entries))


def _latency_picture(entries: Sequence[Mapping[str, Any]], where: str, name: str) -> Picture | None:
    figure, axes = _empty("degree of parallelism (tokens per step)", "ms per token of a request")
    for mode, colour in _MODES.items():
        points = [
            (entry["degree_of_parallelism"][mode], 1000 * entry["batch_size"] / entry["tokens_per_second"][mode])
            for entry in entries
            if entry["tokens_per_second"].get(mode) and entry["degree_of_parallelism"].get(mode)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=colour, label=_LABELS[mode], markersize=4, alpha=0.8)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    what = f"Latency per token against degree of parallelism on {where}: {len(entries)} pairs of points"
    return Picture(f"Latency per token: {where}", _svg(figure, axes, what, name))


def _speedup_picture(
    entries: Sequence[Mapping[str, Any]], where: str, keys: tuple[str, str], name: str
) -> Picture | None:
    """Median and range of the paired ratios against the first key, a line for every value of the second."""
    from matplotlib.ticker import NullLocator

    words = {"batch_size": "batch size", "length": "length, tokens"}
    (along, by), drawn = keys, set()
    figure, axes = _empty(words[along], "speed-up")
    for number, value in enumerate(names(entries, by)):
        points = sorted(
            (entry[along], entry["speedup"], *entry["range"])
            for entry in entries
            if entry[by] == value and entry[along] is not None and entry["speedup"] is not None
        )
        if not points:
            continue
        places, medians, lows, highs = zip(*points, strict=True)
        drawn |= set(places)
        # Rounding may put an end on the wrong side of the median.
        reach = [
            [max(middle - low, 0.0) for middle, low in zip(medians, lows, strict=True)],
            [max(high - middle, 0.0) for middle, high in zip(medians, highs, strict=True)],
        ]
        of = "its own length" if value is None else f"{words[by].partition(',')[0]} {value:,}"
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(places, medians, reach, color=colour, label=of, marker="o", markersize=3.5, capsize=3)
    if not drawn:
        return None
    axes.axhline(1, color=ROOT_COLOUR, linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(drawn), [f"{place:,}" for place in sorted(drawn)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    what = f"Speed-up over the sequential twin against {words[along]} on {where}"
    return Picture(f"Speed-up by {words[along].partition(',')[0]}: {where}", _svg(figure, axes, what, name))


def _points(curve: Mapping[str, Any]) -> list[tuple[float, float, float, float]]:
    """Budget, pass@1 and interval, in percent, where there is a budget and something was measured."""
    rows = zip(curve["budgets"], curve["pass_at_1"], curve["intervals"], strict=True)
    return [
        (budget, 100 * share, 100 * ends[0], 100 * ends[1])
        for budget, share, ends in rows
        if budget is not None and share is not None and ends is not None and None not in ends
    ]


def _arm(curve: Mapping[str, Any]) -> str:
    return f"{_LABELS[curve['mode']]}, {curve['prompt']} prompt"


def _empty(across: str, up: str) -> tuple["Figure", "Axes"]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel=across, ylabel=up)
        axes.grid(visible=True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: "Figure", axes: "Axes", what: str, name: str) -> str:
    """The figure as an element of a page.

    Args:
        figure (`Figure`), axes (`Axes`): drawn.
        what (`str`): what it shows, for screen readers.
        name (`str`): goes before its ids, so that no two pictures of a page share one.
    """
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context(_STYLE):
        axes.legend(fontsize=8)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    # Neither the file's declaration nor words about the program; their namespaces look like addresses.
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)[0]
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r"url\(#", f"url(#{name}-", re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body))
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", body.replace(_INK, "currentColor"))
    # Blanks between elements say nothing.
    body = re.sub(r">\s+<", "><", body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ev-picture" role="img" aria-label="{escaped(what)}" '
        f'viewBox="0 0 {width} {height}"><title>{escaped(what)}</title>{body}'
    )
