"""The drawings show what the layout says, and nothing that a model writes gets out of its place in them."""

import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layout_samples import SAMPLES, TWO_PATHS, every_kind_of_text, examples, layout_of
from multiverse import BranchLayout
from multiverse.hub_card import drawings
from multiverse.hub_card.branch_shapes import Span, mask_runs, position_spans, report_spans
from multiverse.hub_card.drawings import (
    ROOT_COLOUR,
    STYLE,
    branch_colour,
    mask_svg,
    timeline_svg,
    tree_html,
)
from page_reader import NASTY, Reader
from strategies import NEWLINE, Sample, encode, token_ids

SVG = "{http://www.w3.org/2000/svg}"
TAG_OF_ID = {token_id: tag for tag, token_id in token_ids.items()}


def pieces_of(ids: list[int]) -> list[str]:
    """A text for each token: tags, line breaks, and the nasty ones."""
    return [TAG_OF_ID.get(each) or ("\n" if each == NEWLINE else NASTY[each % len(NASTY)]) for each in ids]


def tree_of(sample: Sample, **options) -> tuple[str, str]:
    """The tree of a sample, and the text that it is to show."""
    pieces = pieces_of(sample.ids)
    drawn = tree_html(layout_of(sample), lambda first, end: "".join(pieces[first:end]), **options)
    return drawn, "".join(pieces)


def rasterised(svg: str) -> tuple[torch.Tensor, dict[tuple[int, int], str]]:
    """How often every cell of a mask is covered, and with which colour, by the areas of the inner `<svg>`."""
    _, inner = ElementTree.fromstring(svg).iter(f"{SVG}svg")
    length = int(inner.get("viewBox").split()[2])
    assert inner.get("viewBox") == f"0 0 {length} {length}"
    covered = torch.zeros(length, length, dtype=torch.long)
    colours = {}
    for group in inner:
        assert group.tag == f"{SVG}g"
        cells = torch.zeros(length, length, dtype=torch.long)
        for area in group:
            if area.tag == f"{SVG}rect":
                x, y, width, height = (int(area.get(name)) for name in ("x", "y", "width", "height"))
                assert width > 0
                assert height > 0
                cells[y : y + height, x : x + width] += 1
            elif area.tag == f"{SVG}polygon":
                corners = [tuple(map(int, corner.split(","))) for corner in area.get("points").split()]
                start, end = corners[0][0], corners[1][0]
                assert corners == [(start, start), (end, end), (start, end)]
                for row in range(start, end):
                    cells[row, start : row + 1] += 1
            else:
                assert area.tag == f"{SVG}title"
        covered += cells
        colours |= {tuple(cell): group.get("fill") for cell in cells.nonzero().tolist()}
    return covered, colours


@every_kind_of_text
def test_the_mask_that_is_drawn_is_the_mask_of_the_layout(kind):
    @examples(40)
    @given(SAMPLES[kind])
    def check(sample):
        layout = layout_of(sample)
        if not len(layout):
            return
        covered, colours = rasterised(mask_svg(layout))
        assert torch.equal(covered, layout.attention_mask().long())
        roots = [branch for branch, parent in enumerate(layout.machine.parents) if parent < 0]
        for (_, key), colour in colours.items():
            branch = int(layout.branch_ids[key])
            assert colour == (ROOT_COLOUR if branch in roots else branch_colour(branch))

    check()


def test_the_mask_has_axes_in_tokens_a_name_and_the_end_of_the_prompt():
    layout = BranchLayout.from_token_ids(TWO_PATHS, token_ids)
    root = ElementTree.fromstring(mask_svg(layout, size=230, name='a "mask" & more', unit="words", start=2))
    assert root.get("role") == "img"
    assert root.get("aria-label").startswith('a "mask" & more: 23 words')
    texts = [(text.get("x"), text.text) for text in root.iter(f"{SVG}text")]
    assert [text for _, text in texts][:5] == ["0", "5", "10", "15", "20"]
    assert "what is seen (words)" in [text for _, text in texts]
    # Ten points a token.
    at = [float(x) for x, _ in texts[:5]]
    assert [place - at[0] for place in at] == [0, 50, 100, 150, 200]
    (corner,) = (path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "mv-start")
    assert corner == f"M{at[0]:g} 60.0H{at[0] + 20}V40"


def large_text(paths: int, tokens: int) -> list[int]:
    """Blocks of `paths` in all, each third nested in the one before, filled up with words."""
    ids = encode("a <Parallel> <Goal>") + encode("<Outline> b </Outline>") * paths + encode("</Goal>")
    words = (tokens - len(ids) - 2 * paths - 4) // paths
    for number in range(paths):
        inner = encode(
            "<Parallel> <Goal> <Outline> </Outline> </Goal> <Path> a </Path> <Conclusion> </Conclusion> </Parallel>"
        )
        filled = [NEWLINE + 15] * (words - len(inner)) + inner if number % 3 == 0 else [NEWLINE + 15] * words
        ids += [token_ids["<Path>"], *filled, token_ids["</Path>"]]
    return ids + encode("<Conclusion> a </Conclusion> </Parallel>")


def test_a_long_text_with_many_paths_is_a_small_drawing():
    ids = large_text(60, 32_768)
    layout = BranchLayout.from_token_ids(ids, token_ids)
    assert 32_000 < len(ids) <= 32_768
    assert len(layout.machine.parents) == 81
    runs = mask_runs(layout)
    # A run is seen by all that follows but its siblings: at most one stretch more than blocks are around it.
    assert max(len(run.seen_by) for run in runs) <= 3
    svg = mask_svg(layout)
    assert len(svg) < 60_000
    # Too large to be compared cell by cell, so row by row in places: how many keys a token sees.
    branch_ids = layout.branch_ids
    for token in range(0, len(ids), 500):
        drawn = sum(end - start for _, start, end, seen in runs if any(first <= token < last for first, last in seen))
        drawn += next(token - start + 1 for _, start, end, _ in runs if start <= token < end)
        assert drawn == int(layout.compatible[branch_ids[token]][branch_ids[: token + 1]].sum())
    assert len(timeline_svg(position_spans(layout), 1_000)) < 60_000


@every_kind_of_text
def test_segments_of_the_possible_timeline_are_the_positions(kind):
    @examples(40)
    @given(SAMPLES[kind], st.data())
    def check(sample, data):
        layout = layout_of(sample)
        start = data.draw(st.integers(0, len(layout)))
        spans = position_spans(layout, start)
        branches, positions = layout.branch_ids[start:].tolist(), layout.position_ids[start:].tolist()
        steps: dict[int, set[int]] = {}
        for branch, position in zip(branches, positions, strict=True):
            steps.setdefault(branch, set()).add(position - min(positions) + 1)
        assert [span.branch for span in spans] == sorted(steps)
        for span in spans:
            inside = [step for first, last in span.segments for step in range(first, last + 1)]
            assert len(inside) == len(set(inside))
            assert set(inside) == steps[span.branch]
            assert all(left[1] + 1 < right[0] for left, right in itertools.pairwise(span.segments))
            parents = layout.machine.parents
            assert (span.depth == 0) == (parents[span.branch] < 0)

    check()


def test_the_two_paths_drawn_by_hand_have_this_timeline():
    layout = BranchLayout.from_token_ids(TWO_PATHS, token_ids)
    assert position_spans(layout, 1, {2: "two"}) == [
        Span("root", [(1, 8), (13, 17)], 0, 0),
        Span("1", [(9, 12)], 1, 1),
        Span("two", [(9, 13)], 1, 2),
    ]


def bars(svg: str) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """Label, tooltip, and begin and end of the bars of every row."""
    rows = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            label = group.find(f"{SVG}text")
            places = [(float(bar.get("x")), float(bar.get("width"))) for bar in group.iter(f"{SVG}rect")]
            rows.append((label.text, title.text, [(x, x + width) for x, width in places]))
    return rows


def test_bars_stand_over_their_steps():
    spans = [
        Span("root", [(1, 20), (61, 100)]),
        Span("1", [(21, 30), (41, 60)], 1, 1, "closed"),
        Span("1.1", [(31, 40)], 2, 2),
    ]
    svg = timeline_svg(spans, 100, 800)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "Timeline: 3 branches over 100 sequential steps"
    rows = bars(svg)
    assert [row[0] for row in rows] == ["root", "1", "1.1"]
    assert rows[1][1] == "1: sequential steps 21 to 30, 41 to 60; closed"
    (left, _), (_, right) = rows[0][2]
    for (_, _, drawn), span in zip(rows, spans, strict=True):
        expected = [
            (left + (first - 1) * (right - left) / 100, left + last * (right - left) / 100)
            for first, last in span.segments
        ]
        assert np.allclose(drawn, expected, atol=0.11)
    ticks = {
        text.text: float(text.get("x"))
        for text in root.iter(f"{SVG}text")
        if text.text.isdecimal() and text.get("y") != "36"
    }
    assert {"0", "20", "40", "60", "80", "100"} <= set(ticks)
    assert math.isclose(ticks["40"] - left, 0.4 * (right - left), abs_tol=0.11)
    indents = [float(text.get("x")) for text in root.iter(f"{SVG}text") if text.text in ("root", "1", "1.1")]
    assert indents == sorted(set(indents)), "a nested path stands further in"
    # One waiting line for each branch with two segments.
    assert sum(path.get("stroke-dasharray") is not None for path in root.iter(f"{SVG}path")) == 2


@pytest.mark.parametrize("label", [*NASTY, "\x00\x0b\ufffe\ud800 control", ""])
def test_any_label_makes_well_formed_svg(label):
    rows = bars(timeline_svg([Span(label, [(0, 0), (3, 3)], 5000, 7, label)], 3, unit=label, name=label))
    assert rows[0][1].startswith(label.translate({0: "\ufffd", 11: "\ufffd", 0xFFFE: "\ufffd", 0xD800: "\ufffd"}))
    assert len(rows[0][0] or "") <= 34


def test_nothing_at_all_can_be_drawn():
    layout = BranchLayout.from_token_ids([], token_ids)
    assert position_spans(layout) == []
    ElementTree.fromstring(timeline_svg([], 0))
    ElementTree.fromstring(mask_svg(layout))
    assert Reader(tree_html(layout, lambda first, end: "")).text == ""


def path(label: str, branch: int, first: int | None, last: int | None, blocks=()) -> dict:
    return {"label": label, "branch": branch, "first_step": first, "last_step": last, "blocks": list(blocks)}


def test_measured_branches_stop_between_fork_and_merge():
    nested = {"paths": [path("1.1", 2, 12, 20), path("1.2", 3, 12, 18)]}
    report = {
        "branches": [{"label": "", "first_step": 1, "last_step": 40}],
        "blocks": [
            {"paths": [path("1", 1, 8, 25, [nested]), path("2", 4, 8, 15)]},
            {"paths": [path("1", 5, 30, 31), path("2", 6, None, None)]},
        ],
    }
    assert report_spans(report, {4: "second"}) == [
        # The step that forks and the one that merges are its own too; a block of two steps leaves nothing to wait for.
        Span("root", [(1, 8), (25, 40)], 0, 0),
        Span("1", [(8, 12), (20, 25)], 1, 1),
        Span("1.1", [(12, 20)], 2, 2),
        Span("1.2", [(12, 18)], 2, 3),
        Span("second", [(8, 15)], 1, 4),
        Span("1", [(30, 31)], 1, 5),
    ]
    with pytest.raises(ValueError, match=r"`report`.*`blocks`"):
        report_spans({"branches": report["branches"]})


@every_kind_of_text
def test_the_tree_holds_the_whole_text_once_and_nothing_of_it_gets_out(kind):
    @examples(40)
    @given(SAMPLES[kind], st.booleans())
    def check(sample, folded):
        drawn, text = tree_of(sample, folded=folded)
        reader = Reader(drawn)
        assert reader.text == text
        assert {tag for tag, _ in reader.elements} <= {"div", "details", "summary", "section", "h4", "span", "strong"}
        names = {name for _, attributes in reader.elements for name in attributes}
        assert names <= {"class", "style", "open", "tabindex"}
        layout = layout_of(sample)
        paths = [attrs for tag, attrs in reader.elements if tag == "details" and "mv-path" in attrs["class"]]
        assert len(paths) == sum(parent >= 0 for parent in layout.machine.parents)
        assert all(("open" in attrs) != folded for attrs in paths)
        columns = sorted(branch_colour(n) for n, parent in enumerate(layout.machine.parents) if parent >= 0)
        assert sorted(attrs["style"].removeprefix("--mv-branch:") for attrs in paths) == columns

    check()


@every_kind_of_text
def test_problems_are_marked_where_they_are(kind):
    @examples(40)
    @given(SAMPLES[kind])
    def check(sample):
        layout = layout_of(sample)
        pieces = pieces_of(sample.ids)
        ends = np.cumsum([len(piece) for piece in pieces])
        # Each stands behind the token that shows it.
        expected = [(int(ends[each.index]), f"{each.kind}: {each.message}") for each in layout.problems]
        assert sorted(Reader(tree_of(sample)[0]).marks) == sorted(expected)

    check()


def test_paths_of_a_block_stand_side_by_side_and_nested_blocks_inside_their_path():
    text = (
        "a <Parallel> <Goal> <Outline> b </Outline> <Outline> c </Outline> </Goal> "
        "<Path> d <Parallel> <Goal> <Outline> </Outline> </Goal> <Path> e </Path> <Conclusion> </Conclusion> "
        "</Parallel> </Path> <Path> f </Path> <Conclusion> g </Conclusion> </Parallel> h"
    )
    words = text.split()
    drawn = tree_html(
        BranchLayout.from_token_ids(encode(text), token_ids),
        lambda a, b: " ".join(words[a:b]),
        notes=lambda n: f"<{n}>",
    )
    root = ElementTree.fromstring(drawn.replace(" open>", ">"))

    def children(element, name):
        return [each for each in element.iter() if name in (each.get("class") or "").split() and each is not element]

    outer, inner = children(root, "mv-block")
    rows = [each for each in outer if each.get("class") == "mv-paths"]
    assert len(rows) == 1
    first, second = list(rows[0])
    assert inner in list(first.iter())
    assert inner not in list(second.iter())
    assert [summary[0].text for each in (first, second) for summary in each.findall("summary")] == [
        "14 tokens, <1>",
        "3 tokens, <3>",
    ]
    assert "mv-wide" in first.get("class")
    outlines = [each for each in outer.iter() if each.get("class") == "mv-outline"][:2]
    assert [each.get("style") for each in outlines] == [first.get("style"), second.get("style")]
    assert [each.text for each in outer.iter("h4")] == ["goal", "goal", "conclusion", "conclusion"]


def test_a_prompt_is_folded_away_unless_a_block_begins_in_it():
    drawn, text = tree_of(Sample(TWO_PATHS), start=1)
    reader = Reader(drawn)
    assert reader.text == text
    assert next(attrs.get("class") for tag, attrs in reader.elements if tag == "details") == "mv-prompt"
    assert "open" not in reader.elements[1][1]
    drawn, whole = tree_of(Sample(TWO_PATHS), start=12)
    assert Reader(drawn).text == whole
    assert "mv-prompt" not in drawn


def test_only_long_stretches_scroll_and_those_by_the_keyboard_too():
    for length, scrolls in ((drawings._LONG, False), (drawings._LONG + 1, True)):
        layout = BranchLayout.from_token_ids([NEWLINE + 15], token_ids)
        boxes = [attrs for tag, attrs in Reader(tree_html(layout, lambda a, b: "x" * length)).elements if tag == "div"]  # noqa: B023
        assert ("tabindex" in boxes[-1]) == ("mv-long" in boxes[-1]["class"]) == scrolls


def test_text_that_nests_without_end_is_drawn_flat_from_some_depth_on():
    ids = encode("<Parallel> <Path>") * 1500
    sample = Sample(ids)
    drawn, text = tree_of(sample)
    reader = Reader(drawn)
    assert reader.text == text
    deepest = depth = 0
    for character in range(len(drawn)):
        if drawn.startswith("<details", character):
            depth += 1
        elif drawn.startswith("</details", character):
            depth -= 1
        deepest = max(deepest, depth)
    # Chrome and Firefox stop at 512 elements inside one another.
    assert 20 < deepest < 100
    ElementTree.fromstring(timeline_svg(position_spans(layout_of(sample)), len(ids)))


def test_the_style_touches_no_other_element_and_loads_nothing():
    assert not any(word in STYLE for word in ("@import", "url(", "http"))
    selectors = [part for rule in STYLE.split("}")[:-1] for part in rule.split("{")[0].split(",")]
    assert selectors
    assert all(selector.strip().startswith(".mv") for selector in selectors)
