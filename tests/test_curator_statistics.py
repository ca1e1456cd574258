"""Figures of tagged corpora, against texts whose figures can be counted by hand."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from multiverse import TAGS
from multiverse.cli import app
from multiverse.curator.corpus import measure_corpus
from multiverse.curator.output import write_output
from multiverse.curator.statistics import CorpusStatistics, TextStatistics, measure, table, united
from multiverse.curator.statistics_picture import draw, save
from multiverse.hub_card.view import from_text
from one_record import PARALLEL, finished, rejected
from reference_layout import reference_layout
from rich.console import Console
from strategies import edited, token_ids, trees
from tiny import tiny_tokenizer
from typer.testing import CliRunner

# 2 words, 9 tags and words up to </Goal>, paths of 5 and 3, 4 up to </Parallel>, a word.
FLAT = (
    "one two <Parallel><Goal><Outline>a</Outline><Outline>b</Outline></Goal><Path>x y z</Path><Path>u</Path>"
    "<Conclusion>c</Conclusion></Parallel> end"
)
FLAT_FIGURES = TextStatistics("flat", "words", 24, 24 - 3, (2,), 1)
# A block of three paths in the second of two: 12 up to </Goal>, paths of 3, 4 and 5, 4 at the end.
INNER = (
    "<Parallel><Goal><Outline>a</Outline><Outline>b</Outline><Outline>c</Outline></Goal><Path>p</Path>"
    "<Path>p q</Path><Path>p q r</Path><Conclusion>d</Conclusion></Parallel>"
)
NESTED = FLAT.replace("<Path>u</Path>", f"<Path>u v w {INNER}</Path>")
# The longer path is now the second one: <Path>, 3 words, the inner block without its shorter paths, </Path>.
NESTED_FIGURES = TextStatistics(
    "nested", "words", 24 - 3 + 2 + 3 + 12 + 12 + 4, 2 + 9 + (2 + 3 + 12 + 5 + 4) + 5, (2, 3), 2
)
BROKEN = "<Parallel><Goal></Goal><Path>a</Path> b"
PLAIN = "no block at all"


def statistics() -> CorpusStatistics:
    """Four texts, two of them sound and parallel."""
    texts = {"flat": FLAT, "nested": NESTED, "broken": BROKEN, "plain": PLAIN}
    kinds = {"flat": ["collective"], "nested": ["selective"]}
    read = (measure(from_text(text, name=name), kinds.get(name, ())) for name, text in texts.items())
    return CorpusStatistics("four", tuple(read))


def shown(*corpora: CorpusStatistics) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(table(*corpora))
    return re.sub(r" +", " ", console.file.getvalue().translate(str.maketrans("", "", "│┃")))


def test_figures_of_texts_are_those_counted_by_hand():
    assert measure(from_text(FLAT, name="flat")) == FLAT_FIGURES
    assert measure(from_text(NESTED, name="nested")) == NESTED_FIGURES
    assert FLAT_FIGURES.speed_up == 24 / 21
    assert measure(from_text(PLAIN)) == TextStatistics("text", "words", 4, 4)


@settings(max_examples=60, deadline=None)
@given(trees() | edited())
def test_lengths_and_critical_paths_are_those_of_the_brute_force_reference(sample):
    tags = {number: tag for tag, number in token_ids.items()}
    text = "".join(tags.get(token_id, " w") for token_id in sample.ids)
    if not text:
        return
    found = measure(from_text(text, prompt=""))
    layout = reference_layout(sample.ids, token_ids)
    assert found.tokens == len(sample.ids)
    assert found.critical_path == max(layout.positions) + 1
    assert sum(found.branches) == len(set(layout.branches) - {0})


def test_what_is_malformed_is_counted_by_kind():
    found = measure(from_text(BROKEN))
    assert found.problems == {"unclosed block": 1, "empty goal": 1}
    twice = measure(from_text(f"{BROKEN}{BROKEN}</Path>"))
    assert twice.problems["empty goal"] == 2
    corpus = statistics()
    assert corpus.valid == 3
    assert corpus.texts_with == {"unclosed block": 1, "empty goal": 1}


def test_a_corpus_is_the_sum_of_its_texts():
    corpus = statistics()
    assert corpus.branches == Counter({2: 2, 3: 1, 1: 1})
    assert corpus.depths == Counter({1: 2, 2: 1, 0: 1})
    assert corpus.kinds == Counter({"collective": 1, "selective": 1, "unknown": 2})
    assert corpus.tokens == sum(text.tokens for text in corpus.texts)
    assert corpus.critical_path == sum(text.critical_path for text in corpus.texts)
    assert corpus.speed_up == corpus.tokens / corpus.critical_path
    values = json.loads(json.dumps(corpus.to_dict(texts=True)))
    assert values["texts_with_blocks"] == 3
    assert values["valid_texts_with_blocks"] == 2
    assert values["nested_texts"] == 1
    assert values["branches_per_block"] == {"1": 1, "2": 2, "3": 1}
    assert values["problems"] == {"empty goal": 1, "unclosed block": 1}
    assert [each["name"] for each in values["each"]] == ["flat", "nested", "broken", "plain"]
    both = united([corpus, CorpusStatistics("other", corpus.texts[:1])])
    assert both.tokens == corpus.tokens + FLAT_FIGURES.tokens
    with pytest.raises(ValueError, match="counted in tokens and words"):
        CorpusStatistics("mixed", (FLAT_FIGURES, TextStatistics("x", "tokens", 1, 1)))


def test_the_table_has_a_column_for_every_corpus():
    # 7 and 4 words of the other two texts, one after the other.
    corpus = statistics()
    text = shown(corpus, CorpusStatistics("one", corpus.texts[:1]))
    assert "four one" in text
    for line in (
        "texts 4 1", "well-formed 3 (75.0%) 1 (100.0%)", "blocks 4 1", "paths 8 2", "paths per block, mean 2.00 2.00",
        f"possible speed-up {89 / 74:.2f} {24 / 21:.2f}", "texts of depth 2 1 (25.0%) 0 (0.0%)",
        "blocks, selective 1 (25.0%) 0 (0.0%)", "texts with: empty goal 1 (25.0%) 0 (0.0%)",
    ):  # fmt: skip
        assert line in text, (line, text)
    with pytest.raises(ValueError, match="`corpora` is empty"):
        table()


def test_the_picture_shows_the_counts_and_is_the_same_every_time(tmp_path):
    corpus = statistics()
    figure = draw(corpus)
    axes = dict(zip(("branches", "depth", "kind", "length", "speed_up", "sound"), figure.axes, strict=True))

    def heights(name: str) -> list[float]:
        return [bar.get_height() for bar in axes[name].patches]

    assert heights("branches") == [1, 2, 1]
    assert heights("depth") == [1, 2, 1]
    assert heights("kind") == [1, 1, 2]
    assert sum(heights("speed_up")) == 4
    assert [bar.get_width() for bar in axes["sound"].patches] == [3, 1, 1]
    save(figure, tmp_path / "one.svg")
    save(draw(corpus), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    alike = CorpusStatistics("alike", corpus.texts[-1:] * 3)
    assert sum(bar.get_height() for bar in draw(alike).axes[4].patches) == 3
    with pytest.raises(ValueError, match="holds no text"):
        draw(CorpusStatistics("none", ()))


def test_texts_are_found_in_files_folders_and_rows(tmp_path):
    flat, nested = (measure(from_text(text)).to_dict() for text in (FLAT, NESTED))

    def read(source, **options) -> list[dict]:
        found = measure_corpus(source, **options)
        return [{**text.to_dict(), "name": "text"} for text in found.texts]

    (tmp_path / "one.md").write_text(FLAT)
    assert read(tmp_path / "one.md") == [flat]
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "entry_10.txt").write_text(NESTED)
    (folder / "deep" / "entry_9.txt").write_text(FLAT)
    (folder / "README.md").write_text("No generation.")
    assert read(folder) == [flat, nested]
    rows = [{"text": FLAT, "other": NESTED}, {"text": NESTED, "other": FLAT}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(folder / "zrows.parquet")
    assert read(folder) == [flat, nested] * 3
    assert read(folder / "rows.jsonl", column="other") == [nested, flat]
    assert read(Dataset.from_list(rows), limit=1) == [flat]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [flat, nested]
    messages = [{"messages": [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": FLAT}]}]
    assert read(Dataset.from_list(messages)) == [flat]


def test_an_output_folder_is_read_with_the_kinds_of_its_blocks_and_without_its_rejects(tmp_path):
    written = write_output(tmp_path, [finished("a"), finished("b", provenance={})], [rejected()])
    read = measure_corpus(tmp_path)
    assert read.to_dict() == {**written.to_dict(), "name": tmp_path.name}
    assert read.kinds == Counter({"collective": 1, "unknown": 1})


def test_prompts_do_not_count_and_reports_do_not_turn_possible_into_measured():
    chat = f"<|im_start|>user\nsome words<|im_end|>\n<|im_start|>assistant\n{FLAT}"
    corpus = measure_corpus(Dataset.from_list([{"text": chat, "report": "{}"}]))
    assert (corpus.tokens, corpus.critical_path) == (FLAT_FIGURES.tokens, FLAT_FIGURES.critical_path)


def test_a_tokenizer_counts_tokens():
    tokenizer = tiny_tokenizer()
    found = measure_corpus(Dataset.from_list([{"text": FLAT}]), tokenizer=tokenizer)
    between = re.sub("|".join(TAGS), "", FLAT)
    assert found.unit == "tokens"
    assert found.tokens == len(re.findall("|".join(TAGS), FLAT)) + len(between)


def test_what_is_no_text_is_skipped_and_told(tmp_path):
    (tmp_path / "a.txt").write_text(FLAT)
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    corpus = measure_corpus(tmp_path)
    assert len(corpus.texts) == 1
    assert [reason.partition(":")[0] for reason in corpus.skipped] == ["b.txt", "c.txt"]
    assert "2 skipped, such as b.txt" in shown(corpus)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no text. b.txt"):
        measure_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"`column`: dataset has 'x' among its columns \['text'\]"):
        measure_corpus(Dataset.from_list([{"text": FLAT}]), column="x")
    with pytest.raises(ValueError, match="`limit` is 0"):
        measure_corpus(Dataset.from_list([{"text": FLAT}]), limit=0)


def test_the_command_prints_a_table_or_json_and_draws(tmp_path):
    for name, text in (("one", FLAT), ("two", PARALLEL)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
    sources = [str(tmp_path / "one"), str(tmp_path / "two")]
    run = CliRunner()
    done = run.invoke(app, ["curate", "stats", *sources, "--picture", str(tmp_path / "all.svg")])
    assert done.exit_code == 0, done.output
    assert re.search(r"texts +│ +1 │ +1 │ +2 ", done.output)
    assert (tmp_path / "all.svg").read_text().startswith("<?xml")
    done = run.invoke(app, ["curate", "stats", *sources, "--json", "--texts"])
    values = json.loads(done.output)
    assert values["corpora"][0]["each"][0] == {**FLAT_FIGURES.to_dict(), "name": "text.txt"}
    assert values["all"]["texts"] == 2
    done = run.invoke(app, ["curate", "stats", str(tmp_path / "missing.jsonl")])
    assert done.exit_code == 2
    assert "does not exist" in re.sub(r"[\s│]+", " ", done.output)
    done = run.invoke(app, ["curate", "stats", *sources, "--texts"])
    assert done.exit_code == 2


def test_the_main_command_starts_without_what_only_curating_needs():
    program = (
        "import sys, multiverse.cli\n"
        "print([name for name in ('datasets', 'matplotlib', 'pyarrow', 'rapidfuzz') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.strip() == "[]", done.stderr
