"""The page on which records are read beside their source."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from multiverse.cli import app
from multiverse.curator.inspect_page import (
    PAGE,
    InspectedRecord,
    finished_records,
    inspect,
    rejected_records,
    render_records,
)
from multiverse.curator.output import DATA_FILE, FinishedRecord, write_output
from multiverse.curator.records import Draft, Node, Step
from multiverse.curator.rendering import render
from multiverse.curator.source_colours import Piece, coloured_pieces, step_colours
from multiverse.curator.synthetic_data import write_synthetic
from multiverse.hub_card.drawings import ROOT_COLOUR, branch_colour
from one_record import DRAFT, FIRST, LAST, LEFT, PARALLEL, RIGHT, TRAJECTORY, chain, finished, rejected
from page_reader import NASTY, Reader
from typer.testing import CliRunner


def check_page(page: str) -> Reader:
    """A page by itself: well nested, nothing from elsewhere, no scripts, every id once."""
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    for tag, attributes in reader.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form", "a")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action", "href")]
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert not any(word in style for word in ("@import", "url(", "http"))
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    return reader


def steps_of(page: str) -> list[tuple[str, str, str]]:
    """Colour, label and text of every coloured stretch of an original."""
    found = re.findall(
        r'<span class="cu-step" style="--mv-branch:(#\w+)" title="([^:]*):[^"]*">(.*?)</span>', page, re.S
    )
    return [(colour, label, text) for colour, label, text in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder with two finished records, one of them without a draft, and a rejected one."""
    write_output(tmp_path / "out", [finished("a"), finished("c", draft=None)], [rejected("b")])
    return tmp_path / "out"


def test_sentences_have_the_colour_of_the_path_that_they_went_to(folder, tmp_path):
    inspect(folder, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    check_page(page)
    with_draft, without_draft, rejected_one = re.split(r'id="record-\d"', page)[1:]
    expected = [
        (ROOT_COLOUR, "1", FIRST.strip()),
        (branch_colour(1), "2", LEFT.strip()),
        (branch_colour(2), "3", RIGHT.strip()),
        (ROOT_COLOUR, "4", LAST),
    ]
    assert steps_of(with_draft) == expected
    # The same colours mark the paths of the tree.
    paths = re.findall(r'<details class="mv-path" style="--mv-branch:(#\w+)"', with_draft)
    assert paths == [branch_colour(1), branch_colour(2)]
    assert steps_of(without_draft) == []
    assert steps_of(rejected_one) == []


def test_everything_about_a_record_is_on_the_page(folder, tmp_path):
    inspect(folder, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    one, _, lost = re.split(r'id="record-\d"', page)[1:]
    for words in (
        ">finished<", "4 attempts", "2 paths", "neither needs the other", "collective", "distance", "0.0625",
        "org/model-b", "The sums are 3 and 9.", "It is 12.", "<svg", "degree of parallelism",
    ):  # fmt: skip
        assert words in one, words
    for words in (
        ">rejected<", "2 attempts", "failed at refill", "refill: sentence 2 comes twice", "sentence 3 is missing",
        "400 characters", "No text was made of it.", "say what is needed",
    ):  # fmt: skip
        assert words in lost, words


def test_records_come_out_of_a_folder_as_they_went_in(folder):
    first, second = finished_records(folder)
    assert first.finished
    assert (first.id, first.draft, first.parallel, first.trajectory) == ("a", DRAFT, PARALLEL, TRAJECTORY)
    assert (second.id, second.draft) == ("c", None)
    (lost,) = rejected_records(folder)
    assert not lost.finished
    assert (lost.stage, lost.draft, list(lost.story)) == ("refill", rejected().draft, list(rejected().story))
    assert [each.draft for each in finished_records(folder / DATA_FILE)] == [DRAFT, None]
    assert [each.id for each in rejected_records(folder / "rejects.jsonl")] == ["b"]


def test_nested_paths_have_the_colours_of_their_branches():
    nested = Node("2-3", "collective", (
        Node("2", children=(Node("2.1"), Node("2.2-2.3", "selective", (Node("2.2"), Node("2.3"))))),
        Node("3"),
    ))  # fmt: skip
    inner = Step("2", "", True, (Step("2.1", ""), Step("2.2", ""), Step("2.3", "")))
    draft = Draft(
        steps=(Step("1", ""), inner, Step("3", ""), Step("10", "")),
        structure=(Node("1"), nested, Node("10")),
        texts={"1": "a", "2.1": "b", "2.2": "c", "2.3": "d", "3": "e", "10": "f"},
    )
    # Branches in linear order: path 2, in it 2.2 and 2.3, and then path 3.
    assert step_colours(draft) == {
        "1": ROOT_COLOUR, "2": branch_colour(1), "2.1": branch_colour(1), "2.2": branch_colour(2),
        "2.3": branch_colour(3), "3": branch_colour(4), "10": ROOT_COLOUR,
    }  # fmt: skip
    assert [piece.label for piece in coloured_pieces("abcdef", draft)] == ["1", "2.1", "2.2", "2.3", "3", "10"]
    unstructured = step_colours(replace(draft, structure=()))
    assert len(set(unstructured.values())) == 6


def test_the_hand_made_draft_is_rendered_as_its_text():
    assert render(DRAFT) == PARALLEL


def test_pieces_cover_the_original_whatever_the_texts_are():
    whole = "One  two.\n\nThree four. Five."
    exact = Draft(texts={"1": "One  two.\n\n", "2": "Three four. ", "3": "Five."})
    assert coloured_pieces(whole, exact) == [
        Piece(0, 9, "1"), Piece(9, 11, None), Piece(11, 22, "2"), Piece(22, 23, None), Piece(23, 28, "3")
    ]  # fmt: skip
    blanks = Draft(texts={"1": "One two.", "2": "not there", "3": "Five."})
    assert coloured_pieces(whole, blanks) == [Piece(0, 9, "1"), Piece(9, 23, None), Piece(23, 28, "3")]
    assert coloured_pieces(whole, None) == [Piece(0, 28, None)]
    assert coloured_pieces("", None) == []
    # A text that comes twice is looked for after what went before.
    twice = Draft(texts={"1": "a.", "2": "a."})
    assert coloured_pieces("a. a.", twice) == [Piece(0, 2, "1"), Piece(2, 3, None), Piece(3, 5, "2")]


@pytest.mark.parametrize("nasty", NASTY)
def test_no_text_gets_out_of_its_place(nasty):
    everything = {
        "id": f"a{nasty}", "question": nasty, "trajectory": f"{nasty} and {nasty}", "attempt": nasty, "answer": nasty,
        "draft": replace(
            DRAFT,
            steps=tuple(replace(step, title=nasty) for step in DRAFT.steps),
            groups=tuple(replace(group, reason=nasty) for group in DRAFT.groups),
            texts={"1": nasty},
        ),
        "provenance": {nasty: nasty, "attempts": {nasty: 1}, "list": [nasty]},
    }  # fmt: skip
    one = InspectedRecord(**everything, parallel=PARALLEL.replace("The left one", nasty))
    lost = InspectedRecord(**everything, stage=nasty, reason=nasty, story=({nasty: nasty, "answer": nasty * 50},))
    plain = InspectedRecord("a", "q", "t", "a", parallel=PARALLEL)
    title = f"page {nasty}"
    page = render_records([one, lost, plain], title)
    reader = check_page(page)
    assert [dict(attributes).get("id") for tag, attributes in reader.elements if "id" in attributes] == [
        "record-1", "record-2", "record-3"
    ]  # fmt: skip
    assert nasty in reader.text
    assert {tag for tag, _ in reader.elements} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h3", "h4", "p", "main", "footer", "details",
        "summary", "span", "div", "section", "dl", "dt", "dd", "ul", "ol", "li", "svg", "g", "path", "text", "rect",
        "strong",
    }  # fmt: skip


def test_many_records_are_divided_into_folds_and_bounded(tmp_path):
    write_synthetic(tmp_path / "many", rows=120)
    assert inspect(tmp_path / "many", tmp_path / "page.html") == (50, 0)
    page = (tmp_path / "page.html").read_text()
    reader = check_page(page)
    folds = [attributes for tag, attributes in reader.elements if "cu-fold" in attributes.get("class", "")]
    assert ["open" in attributes for attributes in folds] == [True, False]
    records = [attributes for tag, attributes in reader.elements if attributes.get("class") == "cu-record"]
    assert len(records) == 50
    assert not any("open" in attributes for attributes in records)
    assert f"records {PAGE + 1} to {2 * PAGE}" in page
    assert inspect(tmp_path / "many", tmp_path / "all.html", limit=1000) == (120, 0)
    shown = sum(record.parallel.count("") for record in finished_records(tmp_path / "many"))
    assert (tmp_path / "all.html").stat().st_size < 30 * shown


def test_malformed_text_is_shown_with_what_is_wrong():
    broken = PARALLEL.replace("<Conclusion>", "").replace("</Conclusion>", "")
    page = render_records([InspectedRecord("a", "q", "t", "a", parallel=broken)])
    assert [text.partition(":")[0] for _, text in check_page(page).marks] == ["missing conclusion"]
    assert re.search(r"<ul><li>missing conclusion at token \d+: ", page)
    without = render_records([InspectedRecord("a", "q", "", "a", parallel=" ")])
    check_page(without)
    assert "No text was made of it." in without


def test_nothing_to_show_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="`records` is empty"):
        render_records([])
    for limit in (0, -3):
        with pytest.raises(ValueError, match=f"`limit` is {limit}"):
            inspect(folder, tmp_path / "page.html", limit)
    with pytest.raises(ValueError, match="does not exist"):
        inspect(tmp_path / "missing", tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"neither {DATA_FILE} nor rejects.jsonl"):
        inspect(tmp_path / "empty", tmp_path / "page.html")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x"}))
    with pytest.raises(ValueError, match=r"holds other rows than rejected records: \['text'\]"):
        inspect(tmp_path / "rows.jsonl", tmp_path / "page.html")
    with pytest.raises(ValueError, match="is the source itself"):
        inspect(tmp_path / "rows.jsonl", tmp_path / "rows.jsonl")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_the_page(tmp_path, folder):
    page = tmp_path / "own.html"
    done = CliRunner().invoke(app, ["curate", "inspect", str(folder), "--output", str(page), "--limit", "1"])
    assert done.exit_code == 0, done.output
    assert "1 finished and 1 rejected records" in " ".join(done.output.split())
    assert len(re.findall('class="cu-record"', page.read_text())) == 2
    done = CliRunner().invoke(app, ["curate", "inspect", str(tmp_path / "missing")])
    assert done.exit_code == 2
    assert "does not exist" in re.sub(r"[\s│]+", " ", done.output)


def test_rows_of_other_datasets_in_these_columns_are_shown(tmp_path):
    """Multiverse-1K has neither an id nor a provenance."""
    from datasets import Dataset
    from multiverse.curator.output import make_dataset

    own = make_dataset([FinishedRecord(chain("x"), PARALLEL, "", {})]).remove_columns(["id", "provenance"])
    Dataset.from_list(list(own)).to_parquet(tmp_path / "rows.parquet")
    (record,) = finished_records(tmp_path / "rows.parquet")
    assert (record.id, record.parallel, record.answer) == ("0", PARALLEL, "12")
    own.remove_columns("deepseek_thinking_trajectory_parallel").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(ValueError, match="has no column 'deepseek_thinking_trajectory_parallel'"):
        list(finished_records(tmp_path / "bare.parquet"))
