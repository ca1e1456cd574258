"""`BranchLayout.plot` draws the mask and the positions, and models are saved without it."""

import sys

import matplotlib
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layout_samples import SAMPLES, TWO_PATHS, every_kind_of_text, examples, layout_of
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from multiverse import BranchLayout
from multiverse.hub_card.drawings import ROOT_COLOUR, branch_colour
from multiverse.hub_card.remote_code import flat_sources
from strategies import token_ids

matplotlib.use("agg")


@pytest.fixture
def two_paths() -> BranchLayout:
    return BranchLayout.from_token_ids(TWO_PATHS, token_ids)


def new_axes(count: int):
    """Axes that pyplot does not keep."""
    return Figure().subplots(1, count, squeeze=False)[0]


def cells_of(axes, length: int) -> tuple[torch.Tensor, dict[tuple[int, int], str]]:
    """How often every cell of a mask is covered by the patches, and with which colour."""
    covered = torch.zeros(length, length, dtype=torch.long)
    colours = {}
    for patch in axes.patches:
        cells = torch.zeros(length, length, dtype=torch.long)
        if isinstance(patch, Rectangle):
            x, y, width, height = (int(value) for value in patch.get_bbox().bounds)
            cells[y : y + height, x : x + width] = 1
        else:
            assert isinstance(patch, Polygon)
            (start, _), (end, _) = patch.get_xy()[:2].astype(int).tolist()
            assert patch.get_xy()[:3].tolist() == [[start, start], [end, end], [start, end]]
            for row in range(start, end):
                cells[row, start : row + 1] = 1
        covered += cells
        colours |= {tuple(cell): to_hex(patch.get_facecolor()) for cell in cells.nonzero().tolist()}
    return covered, colours


@every_kind_of_text
def test_the_mask_that_is_drawn_is_the_mask_of_the_layout(kind):
    @examples(10)
    @given(SAMPLES[kind])
    def check(sample):
        layout = layout_of(sample)
        (axes,) = new_axes(1)
        assert layout.plot("mask", axes=axes) is axes.get_figure()
        covered, colours = cells_of(axes, len(layout))
        assert torch.equal(covered, layout.attention_mask().long())
        for (_, key), colour in colours.items():
            branch = int(layout.branch_ids[key])
            root = layout.machine.parents[branch] < 0
            assert colour == (ROOT_COLOUR if root else branch_colour(branch))

    check()


@every_kind_of_text
def test_the_bars_of_the_timeline_are_the_positions(kind):
    @examples(10)
    @given(SAMPLES[kind], st.data())
    def check(sample, data):
        layout = layout_of(sample)
        start = data.draw(st.integers(0, len(layout)))
        (axes,) = new_axes(1)
        layout.plot("timeline", axes=axes, start=start)
        rows = [each for each in axes.collections if isinstance(each, PolyCollection)]
        branches, positions = layout.branch_ids[start:], layout.position_ids[start:]
        assert len(rows) == len(branches.unique())
        for number, (branch, row) in enumerate(zip(branches.unique().tolist(), rows, strict=True)):
            drawn = set()
            for bar in row.get_paths():
                (left, low), (right, high) = bar.vertices.min(axis=0), bar.vertices.max(axis=0)
                assert (low + high) / 2 == pytest.approx(number)
                drawn |= set(range(round(left), round(right)))
            assert drawn == set((positions[branches == branch] - positions.min()).tolist())

    check()


def test_both_are_drawn_side_by_side_with_the_names_of_tokens_and_branches(two_paths):
    tokens = ["$a$\n", *"bcdefghijklmnopqrstuvw"]
    figure = two_paths.plot(tokens=tokens)
    mask, timeline = figure.axes
    assert [label.get_text() for label in mask.get_xticklabels()] == [r"$a$\n", *tokens[1:]]
    assert not any(label.get_parse_math() for label in mask.get_yticklabels())
    assert mask.get_xticks().tolist() == [index + 0.5 for index in range(23)]
    assert mask.get_ylim() == (23, 0), "the first token is at the top"
    assert [label.get_text() for label in timeline.get_yticklabels()] == ["root", "1", "2"]
    assert timeline.get_ylim() == (2.5, -0.5)
    figure.draw_without_rendering()
    matplotlib.pyplot.close(figure)


def test_given_axes_are_drawn_on(two_paths):
    axes = new_axes(2)
    assert two_paths.plot(axes=axes) is axes[0].get_figure()
    assert axes[0].patches
    assert axes[1].collections
    assert len(axes[0].get_figure().axes) == 2


def test_an_empty_text_has_empty_pictures():
    figure = BranchLayout.from_token_ids([], token_ids).plot(axes=new_axes(2))
    figure.draw_without_rendering()
    assert [len(axes.patches) + len(axes.collections) + len(axes.lines) for axes in figure.axes] == [0, 0]


def test_arguments_that_do_not_fit_are_named(two_paths):
    for options, message in (
        ({"kind": "tree"}, r"`kind` must be one of .*'tree'"),
        ({"tokens": ["a"]}, r"`tokens` has 1 texts for 23 tokens"),
        ({"tokens": ["a"] * 23, "kind": "timeline"}, r"`tokens`.*`kind='timeline'`"),
        ({"start": 24}, r"`start` must lie in \[0, 23\], got 24"),
        ({"axes": new_axes(2), "kind": "mask"}, r"`axes` holds 2 axes, but `kind='mask'` draws on 1"),
        ({"axes": new_axes(1)[0]}, r"`axes` holds 1 axes, but `kind='both'` draws on 2"),
    ):
        with pytest.raises(ValueError, match=message):
            two_paths.plot(**options)


def test_without_matplotlib_the_extra_is_named(two_paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"multiverse-transformers\[plots\]"):
        two_paths.plot()


def test_beside_a_checkpoint_without_the_package_it_says_what_is_missing(two_paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "multiverse.plot", None)
    with pytest.raises(ImportError, match=r"code beside a checkpoint.*multiverse-transformers\[plots\]"):
        two_paths.plot()


def test_checkpoints_carry_no_pictures():
    sources = flat_sources()
    assert "layout" in sources
    assert not [
        name for name in sources if any(word in name for word in ("plot", "drawing", "shapes", "page", "view"))
    ]
    assert not [name for name, text in sources.items() if "import matplotlib" in text or "from matplotlib" in text]
