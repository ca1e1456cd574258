"""`multiverse view`: one page that needs nothing else, about the text that was asked for."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pyarrow
import pytest
import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.cli import app
from multiverse.hub_card.branch_shapes import report_spans
from multiverse.hub_card.page import TaggedText, render_page
from multiverse.hub_card.view import from_output, from_row, from_text, read_row, split_prompt, view
from page_reader import NASTY, Reader
from pyarrow import parquet
from tiny import tiny_config, tiny_tokenizer
from typer.testing import CliRunner

GOAL = "Let us see.\n<Parallel>\n<Goal>\n<Outline>\n1: add\n</Outline>\n<Outline>\n2: take\n</Outline>\n</Goal>\n"
TEXT = (
    f"{GOAL}<Path>\n1: one two three\n</Path>\n<Path>\n2: four\n</Path>\n"
    "<Conclusion>\nboth done\n</Conclusion>\n</Parallel>\nSo it is.\n"
)
MESSAGES = [
    {"role": "system", "content": "Think."},
    {"role": "user", "content": "Add <b>this</b>."},
    {"role": "assistant", "content": TEXT},
]
CHATML = "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"


def figures(page: str) -> dict[str, str]:
    """What the head of a page says."""
    return dict(re.findall(r"<div><dt>([^<]*)</dt><dd>([^<]*)</dd></div>", page))


def run(*arguments: object) -> str:
    """Output of the command on one line."""
    done = CliRunner().invoke(app, ["view", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def refused(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["view", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    return re.sub(r"[\s│]+", " ", done.output)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model with random weights, tags and a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = MultiverseForCausalLM(tiny_config("llama", len(tokenizer), eos_token_id=tokenizer.eos_token_id))
    add_multiverse_tokens(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A tokenizer of bytes that knows no tags."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def check_page(page: str) -> Reader:
    """A page by itself: well nested, nothing from elsewhere, no scripts, every id once."""
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    for tag, attributes in reader.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action")]
        assert attributes.get("href", "#").startswith("#")
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert not any(word in style for word in ("@import", "url(", "http"))
    assert "prefers-color-scheme: dark" in style
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for _, attributes in reader.elements if "href" in attributes}
    assert targets <= set(ids)
    drawn = re.findall("<svg .*?</svg>(?=</div>)", page)
    assert drawn
    for svg in drawn:
        ElementTree.fromstring(svg)
    return reader


def test_a_text_file_is_shown_with_its_words_counted(tmp_path):
    (tmp_path / "answer.txt").write_text(f"Problem: add.\n\n{CHATML}{TEXT}<|im_end|>", encoding="utf-8")
    printed = run(tmp_path / "answer.txt", "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    # Root: 3 words before the block; to `</Goal>` 7 tags, 4 words and 4 line breaks between two tags; a line break.
    # Paths: 2 tags, 4 or 2 words, a line break. Root: 3 tags, 2 words, a line break; 4 words with the end of the turn.
    root_before, root_after = 3 + 7 + 4 + 4, 3 + 2 + 1 + 4
    assert figures(page) == {
        "words": str(root_before + 1 + 7 + 5 + root_after),
        "critical path": str(root_before + 6 + root_after),
        "degree of parallelism": f"{(root_before + 13 + root_after) / (root_before + 6 + root_after):.2f}",
        "blocks": "1",
        "paths": "2",
        "depth": "1",
        "problems": "0",
    }
    assert f"{root_before + 13 + root_after} words" in printed
    assert "words, not tokens" in page
    assert "not measured" in page
    reader = check_page(page)
    assert reader.text.strip("\n") == f"{CHATML}{TEXT}<|im_end|>".strip("\n")
    assert next(attrs["class"] for tag, attrs in reader.elements if tag == "details") == "mv-prompt"
    assert "Problem: add." not in page


def test_a_tokenizer_counts_a_tag_as_one_whether_it_knows_it_or_not(tmp_path, tokenizer_folder, checkpoint):
    source = tmp_path / "answer.txt"
    source.write_text(TEXT + "é😀", encoding="utf-8")
    for folder in (tokenizer_folder, checkpoint):
        page = tmp_path / "page.html"
        run(source, "--output", page, "--tokenizer", folder)
        shown = figures(page.read_text(encoding="utf-8"))
        tags = re.findall(r"</?[A-Z]\w+>", TEXT)
        assert shown["tokens"] == str(len((re.sub(r"</?[A-Z]\w+>", "", TEXT) + "é😀").encode()) + len(tags))
        reader = check_page(page.read_text(encoding="utf-8"))
        assert reader.text.strip("\n") == TEXT + "é😀"
        assert "not tokens" not in page.read_text(encoding="utf-8")


def write_rows(folder: Path, rows: list[dict]) -> dict[str, Path]:
    """The same rows as files of all three kinds."""
    files = {kind: folder / f"rows.{kind}" for kind in ("json", "jsonl", "parquet")}
    files["json"].write_text(json.dumps(rows), encoding="utf-8")
    files["jsonl"].write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), files["parquet"])
    return files


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_a_row_of_a_file_is_shown(kind, tmp_path):
    source = write_rows(tmp_path, [{"text": "first"}, {"text": TEXT}, {"text": "last"}])[kind]
    run(source, "--output", tmp_path / "page.html", "--row", 1)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert check_page(page).text.strip("\n") == TEXT.strip("\n")
    assert f"<h1>rows.{kind}, row 1</h1>" in page
    run(source, "--output", tmp_path / "page.html")
    assert check_page((tmp_path / "page.html").read_text(encoding="utf-8")).text.strip() == "first"


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_messages_are_shown_with_the_last_answer_as_the_text(kind, tmp_path, tokenizer_folder):
    source = write_rows(tmp_path, [{"chat": MESSAGES}])[kind]
    run(source, "--output", tmp_path / "page.html", "--column", "chat")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert check_page(page).text.strip("\n") == f"system: Think.\n\nuser: Add <b>this</b>.\n\n{TEXT}".strip("\n")
    # With a tokenizer, as its chat template puts them.
    run(source, "--output", tmp_path / "page.html", "--column", "chat", "--tokenizer", tokenizer_folder)
    prompt = tiny_tokenizer().apply_chat_template(MESSAGES[:2], add_generation_prompt=True, tokenize=False)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert check_page(page).text.strip("\n") == (prompt + TEXT).strip("\n")


def test_a_completion_is_shown_behind_its_prompt():
    row = {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}
    for text in (
        from_row(row, None, None, "row"),
        from_row({"prompt": "Add.\n", "completion": TEXT}, None, None, "row"),
    ):
        assert text.text_of(text.start, len(text.layout)) == TEXT
        assert text.text_of(0, text.start).startswith(("Add.", "system: Think."))
        assert text.made == from_text(TEXT).made


def test_the_models_own_turn_is_found():
    assert split_prompt(TEXT) == ("", TEXT)
    assert split_prompt(f"log {CHATML}{TEXT}") == (CHATML, TEXT)
    earlier = f"{CHATML}{TEXT}<|im_end|>\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"
    assert split_prompt(earlier + TEXT) == (earlier, TEXT)
    # A log that goes on after the answer: the turn with tags is the one to be looked at.
    assert split_prompt(f"{earlier}no tags") == (CHATML, f"{TEXT}<|im_end|>\n")
    assert split_prompt(f"{CHATML}no tags") == (CHATML, "no tags")
    head = (
        "<|start_header_id|>user<|end_header_id|>\n\nAdd.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert split_prompt(f"<|begin_of_text|>{head}{TEXT}") == (head, TEXT)


@pytest.mark.parametrize("end", range(0, len(TEXT), 5))
def test_text_that_is_cut_off_anywhere_is_shown(end):
    cut = TEXT[: end + 1]
    page = render_page([from_text(cut)])
    assert check_page(page).text.strip("\n") == cut.strip("\n")
    assert ("The text is not well-formed" in page) == bool(from_text(cut).layout.problems)


@pytest.mark.parametrize("nasty", NASTY)
def test_nothing_that_a_model_writes_gets_out_of_its_place(nasty):
    text = TEXT.replace("1: add", nasty).replace("one two", nasty).replace("1: one", nasty).replace("both", nasty)
    shown = from_text(nasty + text, name=nasty, prompt=nasty)
    page = render_page([shown, shown], nasty)
    reader = check_page(page)
    assert reader.text.strip("\n") == ((nasty + nasty + text) * 2).strip("\n")
    plain = check_page(render_page([from_text("a" + TEXT, name="a", prompt="a")] * 2, "a"))
    kinds = {tag for tag, _ in reader.elements}
    assert kinds <= {tag for tag, _ in plain.elements} | {"strong", "span"}
    assert page.encode("utf-8")


def test_lone_surrogates_and_control_characters_are_replaced(tmp_path):
    (tmp_path / "row.json").write_text(json.dumps({"text": "a\ud800b\x00c\x1b"}))
    view(tmp_path / "row.json", tmp_path / "page.html")
    assert check_page((tmp_path / "page.html").read_text(encoding="utf-8")).text.strip("\n") == "a\ufffdb\ufffdc\ufffd"


def test_a_long_text_with_many_paths_makes_a_page_little_larger_than_itself():
    outlines = "".join(f"<Outline>\n{n}: part {n}\n</Outline>\n" for n in range(1, 61))
    words = "word " * 520
    paths = "".join(f"<Path>\n{n}: {words}\n</Path>\n" for n in range(1, 61))
    text = f"<Parallel>\n<Goal>\n{outlines}</Goal>\n{paths}<Conclusion>\nend\n</Conclusion>\n</Parallel>"
    shown = from_text(text)
    assert shown.made > 31_000
    assert len(render_page([shown])) < len(text) + 100_000


REPORT = {
    "finish_reason": "eos",
    "generated_tokens": 60,
    "sequential_steps": 40,
    "branches": [{"label": "", "first_step": 1, "last_step": 40}],
    "blocks": [
        {
            "paths": [
                {"label": "1", "branch": 1, "first_step": 20, "last_step": 30, "blocks": []},
                {"label": "2", "branch": 2, "first_step": 20, "last_step": 24, "blocks": []},
            ]
        }
    ],
}


@pytest.mark.parametrize("form", [dict, json.dumps])
def test_a_report_beside_the_text_makes_the_timeline_a_measured_one(form, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT, "report": form(REPORT)}))
    printed = run(tmp_path / "rows.jsonl", "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "60 tokens, 40 sequential steps, 1.50 degree of parallelism" in printed
    assert figures(page)["ended by"] == "eos"
    assert "not measured" not in page
    assert "<title>1: one two three: sequential steps 20 to 30</title>" in page
    assert "<title>root: sequential steps 1 to 20, 30 to 40</title>" in page
    check_page(page)


def test_a_report_of_another_text_is_refused():
    with pytest.raises(ValueError, match=r"`report` tells of branch 2, but the text has 1 branches"):
        from_text("no paths", report=REPORT)


def test_a_checkpoint_is_asked_and_its_steps_are_measured(checkpoint, tmp_path):
    # What the prompt leaves open is forked: two paths whatever the weights are.
    printed = run(checkpoint, "--output", tmp_path / "page.html", "--prompt", GOAL, "--max-new-tokens", 60)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = check_page(page)
    shown = figures(page)
    assert shown["paths"] == "2"
    assert 0 < int(shown["sequential steps"]) < int(shown["tokens"]) <= 60
    assert f"{shown['tokens']} tokens, {shown['sequential steps']} sequential steps" in printed
    assert "Measured: in one sequential step" in page
    assert "Think step by step and in parallel." in reader.text
    run(checkpoint, "--output", tmp_path / "page.html", "--prompt", "Add.", "--max-new-tokens", 4, "--system", "")
    assert "in parallel.<|im_end|>" not in Reader((tmp_path / "page.html").read_text(encoding="utf-8")).text


def test_every_row_of_a_batch_has_its_own_text_and_steps(checkpoint):
    model = MultiverseForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = tiny_tokenizer()
    add_multiverse_tokens(model, tokenizer)
    prompts = [GOAL, "a" + GOAL]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**batch, max_new_tokens=50, return_dict_in_generate=True)
    for row, prompt in enumerate(prompts):
        length = batch.input_ids.shape[1]
        text = from_output(output, tokenizer, model.config.multiverse_token_ids, length, row)
        report = output.reports[row]
        assert text.text_of(0, text.start) == prompt
        assert len(text.layout) - text.start == text.made == report.generated_tokens
        assert text.steps == report.sequential_steps
        spans = report_spans(report.to_dict())
        assert [span.segments for span in text.spans] == [span.segments for span in spans]
        assert [span.label[0] for span in text.spans if span.branch] == ["1", "2"]
        check_page(render_page([text]))


def test_several_texts_make_one_page():
    page = render_page([from_text(TEXT, name="one"), from_text("two words", name="two")], "both")
    reader = check_page(page)
    assert [attrs["href"] for _, attrs in reader.elements if "href" in attrs] == ["#text-1", "#text-2"]
    with pytest.raises(ValueError, match="`texts` is empty"):
        render_page([])


def test_the_browser_opens_only_when_asked(tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", lambda url: opened.append(url) or 0)
    (tmp_path / "a.txt").write_text(TEXT)
    run(tmp_path / "a.txt", "--output", tmp_path / "page.html")
    assert opened == []
    run(tmp_path / "a.txt", "--output", tmp_path / "page.html", "--open")
    assert opened == [(tmp_path / "page.html").as_uri()]


def test_bad_input_is_named_and_nothing_is_written(tmp_path, checkpoint):
    page = tmp_path / "page.html"
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text(f"{CHATML} \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "rows.json").write_text(json.dumps([{"text": 3, "other": "a", "talk": MESSAGES[:2]}, 7]))
    for arguments, message in (
        (["nowhere.txt"], "`source` (nowhere.txt) is neither a file nor"),
        (["a.txt", "--row", "1"], "`row` is 1, but"),
        (["a.txt", "--prompt", "x"], "`prompt` is 'x', but"),
        (["a.txt", "--max-new-tokens", "3"], "`max_new_tokens` is 3, but"),
        (
            ["a.txt", "--tokenizer", "nothing/here/at-all"],
            "`tokenizer`: none could be loaded from nothing/here/at-all",
        ),
        (["empty.txt"], "empty.txt holds no text"),
        (["bytes.txt"], "no text in UTF-8"),
        (["odd.jsonl", "--row", "1"], "line 2 of"),
        (["odd.jsonl", "--row", "2"], "`row` is 2, but"),
        (["odd.jsonl", "--row=-1"], "`row` must not be negative, got -1"),
        (["odd.jsonl", "--column", "none"], "has 'none' among its columns"),
        (["rows.json"], "'text' of rows.json, row 0 holds int"),
        (["rows.json", "--column", "talk"], "has no message of the assistant"),
        (["rows.json", "--row", "1"], "is int, not an object"),
        ([checkpoint], "`prompt` is None, but the checkpoint"),
        ([checkpoint, "--prompt", "x", "--row", "0"], "`row` is 0, but"),
        ([checkpoint, "--prompt", "x", "--tokenizer", "y"], "`tokenizer` is 'y', but"),
    ):
        # The frame around a message may break its line anywhere.
        printed = refused(tmp_path / arguments[0], *arguments[1:], "--output", page)
        words = message.replace("(nowhere.txt)", f"({tmp_path / 'nowhere.txt'})")
        assert words.replace(" ", "") in printed.replace(" ", ""), printed
        assert not page.exists()
    assert "`output`" in refused(tmp_path / "a.txt", "--output", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == TEXT


def test_rows_are_read_without_holding_a_place_for_empty_lines(tmp_path):
    files = write_rows(tmp_path, [{"text": "a"}, {"text": "b"}])
    assert [read_row(path, 1) for path in files.values()] == [{"text": "b"}] * 3
    for path in files.values():
        with pytest.raises(ValueError, match=r"`row` is 2, but .* has 2 rows"):
            read_row(path, 2)


def test_a_start_outside_the_text_is_refused():
    text = from_text(TEXT)
    with pytest.raises(ValueError, match=r"`start` must lie in \[0, "):
        TaggedText("a", text.layout, text.text_of, start=len(text.layout) + 1)
