"""Pictures of a layout with matplotlib: what `BranchLayout.plot` draws."""

from collections.abc import Sequence
from typing import Any

from multiverse.hub_card.branch_shapes import mask_runs, path_numbers, position_spans
from multiverse.hub_card.drawings import ROOT_COLOUR, branch_colour
from multiverse.layout import BranchLayout

KINDS = ("mask", "timeline", "both")


def plot_layout(
    layout: BranchLayout, kind: str = "both", tokens: Sequence[str] | None = None, axes: Any = None, start: int = 0
) -> Any:
    """Draws a layout, see `BranchLayout.plot`."""
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}, got {kind!r}.")
    if tokens is not None and len(tokens) != len(layout):
        raise ValueError(f"`tokens` has {len(tokens)} texts for {len(layout)} tokens. Pass one for each.")
    if tokens is not None and kind == "timeline":
        raise ValueError("`tokens` are written along the axes of the mask, which `kind='timeline'` does not draw.")
    if not 0 <= start <= len(layout):
        raise ValueError(f"`start` must lie in [0, {len(layout)}], got {start}.")
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("`plot` needs matplotlib: `pip install 'multiverse-transformers[plots]'`.") from error
    wanted = 2 if kind == "both" else 1
    if axes is None:
        rows = len(layout.machine.parents)
        size = {"mask": (5.5, 5.5), "timeline": (7, 1.2 + 0.25 * rows), "both": (12, max(5.5, 1.2 + 0.25 * rows))}
        _, axes = pyplot.subplots(1, wanted, figsize=size[kind], layout="constrained", squeeze=False)
        axes = axes[0]
    places = [axes] if hasattr(axes, "get_figure") else list(axes)
    if len(places) != wanted:
        raise ValueError(f"`axes` holds {len(places)} axes, but `kind={kind!r}` draws on {wanted}.")
    if kind != "timeline":
        _draw_mask(layout, places[0], tokens)
    if kind != "mask":
        _draw_timeline(layout, places[-1], start)
    return places[0].get_figure()


def _draw_mask(layout: BranchLayout, axes: Any, tokens: Sequence[str] | None) -> None:
    from matplotlib.patches import Polygon, Rectangle

    length, parents = len(layout), layout.machine.parents
    for run in mask_runs(layout):
        colour = ROOT_COLOUR if parents[run.branch] < 0 else branch_colour(run.branch)
        corners = [(run.start, run.start), (run.end, run.end), (run.start, run.end)]
        areas: list[Any] = [Polygon(corners)]
        areas += [Rectangle((run.start, first), run.end - run.start, last - first) for first, last in run.seen_by]
        for area in areas:
            # Smoothed edges would leave a line between two areas that touch.
            area.set(facecolor=colour, linewidth=0, antialiased=False)
            axes.add_patch(area)
    axes.set(xlim=(0, max(length, 1)), ylim=(max(length, 1), 0), aspect="equal")
    axes.set(title="attention mask", xlabel="seen token", ylabel="token that looks")
    if tokens is not None:
        middles = [index + 0.5 for index in range(length)]
        texts = [token.replace("\n", r"\n") for token in tokens]
        # Dollar signs are no formulas here.
        axes.set_xticks(middles, texts, rotation=90, parse_math=False)
        axes.set_yticks(middles, texts, parse_math=False)


def _draw_timeline(layout: BranchLayout, axes: Any, start: int) -> None:
    from matplotlib.ticker import MaxNLocator

    spans, numbers, parents = position_spans(layout, start), path_numbers(layout), layout.machine.parents
    for row, span in enumerate(spans):
        colour = ROOT_COLOUR if parents[span.branch] < 0 else branch_colour(span.branch)
        if len(span.segments) > 1:
            axes.plot([span.segments[0][1], span.segments[-1][0] - 1], [row, row], ":", color=colour, linewidth=1)
        bars = [(first - 1, last - first + 1) for first, last in span.segments]
        axes.broken_barh(bars, (row - 0.35, 0.7), facecolor=colour)
    axes.set_yticks(range(len(spans)), [numbers.get(span.branch, "root") for span in spans])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_axisbelow(True)
    axes.set(ylim=(max(len(spans), 1) - 0.5, -0.5), xlim=(0, None), title="possible timeline", xlabel="step")
    axes.grid(visible=True, axis="x", alpha=0.3)
