"""Draws the statistics of a tagged corpus (needs the extra `curate`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiverse.curator.statistics import UNKNOWN, CorpusStatistics
from multiverse.hub_card.drawings import COLOURS, ROOT_COLOUR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colour of every kind of block.
_KINDS = {"collective": COLOURS[0], "selective": COLOURS[1], UNKNOWN: ROOT_COLOUR}


def draw(statistics: CorpusStatistics) -> "Figure":
    """Six pictures: branches per block, depth, kind, length, possible speed-up, and what is malformed.

    Args:
        statistics (`CorpusStatistics`): of a corpus with at least one text.

    Returns:
        `matplotlib.figure.Figure`: not registered with pyplot, so nothing needs to close it.

    Raises:
        ValueError: if there is no text.
    """
    from matplotlib.figure import Figure

    if not statistics.texts:
        raise ValueError(f"`statistics` of {statistics.name} holds no text, so there is nothing to draw.")
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(f"{statistics.name}: {len(statistics.texts):,} texts, {statistics.branches.total():,} blocks")
    _bars(axes[0, 0], statistics.branches, "branches per block", "blocks")
    _bars(axes[0, 1], statistics.depths, "depth", "texts")
    kinds = statistics.kinds
    shown = {kind: kinds[kind] for kind in _KINDS if kinds[kind]}
    axes[0, 2].bar(list(shown), list(shown.values()), color=[_KINDS[kind] for kind in shown])
    axes[0, 2].set(xlabel="kind", ylabel="blocks")
    lengths = [text.tokens for text in statistics.texts]
    paths = [text.critical_path for text in statistics.texts]
    bins = _edges(0, max(lengths))
    axes[1, 0].hist(lengths, bins, color=COLOURS[0], alpha=0.6, label="length")
    axes[1, 0].hist(paths, bins, histtype="step", color=COLOURS[1], linewidth=1.5, label="critical path")
    axes[1, 0].set(xlabel=statistics.unit, ylabel="texts")
    axes[1, 0].legend()
    speed_ups = [text.speed_up for text in statistics.texts]
    axes[1, 1].hist(speed_ups, _edges(1, max(speed_ups)), color=COLOURS[0])
    axes[1, 1].axvline(statistics.speed_up, color=COLOURS[1], label=f"all texts: {statistics.speed_up:.2f}")
    axes[1, 1].set(xlabel="possible speed-up", ylabel="texts")
    axes[1, 1].legend()
    found = {"well-formed": statistics.valid, **dict(statistics.texts_with.most_common())}
    axes[1, 2].barh(list(found), list(found.values()), color=[COLOURS[4], *[COLOURS[3]] * (len(found) - 1)])
    axes[1, 2].invert_yaxis()
    axes[1, 2].set(xlabel="texts")
    for each in axes.flat:
        each.set_axisbelow(True)
        each.grid(visible=True, axis="x" if each is axes[1, 2] else "y", alpha=0.3)
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    """Writes a figure; the same figure gives the same bytes."""
    from matplotlib import rc_context

    path = Path(path)
    # Neither the time nor random names of clip paths.
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "multiverse"}):
        figure.savefig(path, metadata=metadata or None)


def _bars(axes: Any, counts: Mapping[int, int], label: str, of: str) -> None:
    from matplotlib.ticker import MaxNLocator

    names = sorted(counts)
    axes.bar(names, [counts[name] for name in names], color=COLOURS[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=label, ylabel=of)


def _edges(low: float, high: float, count: int = 24) -> list[float]:
    """Edges of bins that are there even where all values are the same."""
    width = max(high - low, 0.5) / count
    return [low + width * number for number in range(count + 1)]
