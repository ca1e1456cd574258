"""The report of an evaluation: what its page, its Markdown file and its metadata for the Hub say."""

import re
from html import unescape
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from multiverse.evaluation.paper import TABLE_2
from multiverse.evaluation.report import MARKDOWN, MODEL_INDEX, PAGE, model_index, write_report
from multiverse.evaluation.report_page import render_markdown, render_page
from multiverse.evaluation.summary import summarise_run
from reported import (
    BROKEN,
    FACTS,
    PARALLEL,
    broken,
    check_page,
    condition,
    markdown_tables,
    prompts,
    record,
    row,
    summary_of,
    tables_of,
    whole,
    wrong,
)


@pytest.fixture(scope="module")
def page() -> str:
    """The page of `whole`."""
    summary, records = whole()
    return render_page(summary, records, FACTS, prompts("sums", "aime24"))


def test_the_files_are_written_as_wholes(tmp_path):
    summary, records = whole()
    (tmp_path / PAGE).write_text("old")
    paths = write_report(tmp_path, summary, records, FACTS, prompts("sums", "aime24"))
    assert [path.name for path in paths] == [PAGE, MARKDOWN, MODEL_INDEX]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([PAGE, MARKDOWN, MODEL_INDEX])
    check_page((tmp_path / PAGE).read_text(encoding="utf-8"))


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    summary, records = whole()
    before = [path.read_bytes() for path in write_report(tmp_path, summary, records, FACTS, {})]
    with pytest.raises(KeyError):
        write_report(tmp_path, {**summary, "conditions": [{"task": "sums"}]}, records, FACTS, {})
    assert [(tmp_path / name).read_bytes() for name in (PAGE, MARKDOWN, MODEL_INDEX)] == before


@pytest.mark.parametrize(
    ("changes", "word"), [({"schema_version": 0}, "schema version 0"), ({"conditions": []}, "no conditions")]
)
def test_summaries_that_are_none_are_refused(tmp_path, changes, word):
    with pytest.raises(ValueError, match=f"`summary`.*{word}"):
        write_report(tmp_path, summary_of([row([record(PARALLEL)])], **changes), [], {}, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`folder`"):
        write_report(tmp_path / "none", summary_of([row([record(PARALLEL)])]), [], {}, {})


def test_the_page_stands_by_itself(page):
    reader = check_page(page)
    tags = [tag for tag, _ in reader.elements]
    # One of Figure 7's and three of Figure 8's, and timelines beside them.
    pictures = [attributes for tag, attributes in reader.elements if attributes.get("class") == "ev-picture"]
    assert len(pictures) == 4
    assert tags.count("main") == 1
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page


def test_tables_say_what_the_summary_says(page):
    summary, _ = whole()
    tables = tables_of(page)
    head, *rows = tables["Accuracy, tokens and steps of every condition"]
    assert len(rows) == len(summary["conditions"])
    for own, cells in zip(summary["conditions"], rows, strict=True):
        named = dict(zip(head, cells, strict=True))
        assert named["condition"] == f"{own['task']}, {own['prompt']} prompt, {own['mode']} mode"
        assert float(named["pass@1, %"]) == pytest.approx(100 * own["pass_at_1"], abs=0.05)
        ends = [float(end) / 100 for end in named["95% interval"].split(" to ")]
        assert ends == pytest.approx(own["pass_at_1_interval_95"], abs=0.0005)
        assert [int(named[name]) for name in ("questions", "generations", "right")] == [7, 7, 5]
        assert float(named["tokens"]) == own["generated_tokens"]
        assert float(named["sequential steps"]) == own["sequential_steps"]
        assert float(named["# parallel"]) == own["degree_of_parallelism"]
        assert float(named["all tokens / all steps"]) == own["total_tokens_per_step"]
    assert rows[2][6] == "60.0 (51.2 to 68.7), k = 8"
    structure = tables["Structure of the generations (means)"]
    assert structure[1][1:3] == ["85.7", "100.0"]
    problems = tables["Structure problems"]
    assert problems[:2] == [
        ["condition", "unclosed block", "unclosed tag"],
        ["sums, parallel prompt, parallel mode", "1", "2"],
    ]
    ends = dict(zip(*tables["Why generations ended"][:2], strict=True))
    assert (ends["eos"], ends["length"]) == ("6", "1")
    verdicts = dict(zip(*tables["Verdicts of the judge"][:2], strict=True))
    assert (verdicts["right"], verdicts["truncated"], verdicts["wrong answer"]) == ("5", "1", "1")
    stages = dict(zip(*tables["Tokens of a generation by stage (mean and share)"][:2], strict=True))
    assert stages["process"] == "250.0 (83.3%)"
    compared = dict(zip(*tables["First condition against the second, paired by question"], strict=True))
    assert compared["pass@1, points (95% interval)"] == "8.3 (-4.2 to 20.8)"
    assert compared["first / second better"] == "3 / 1"
    assert compared["p (test)"] == "0.625 (McNemar, exact)"
    assert compared["steps, ratio (95% interval)"] == "0.500 (0.471 to 0.533)"


def test_times_and_speed_say_what_the_summary_says(page):
    tables = tables_of(page)
    name = "Time by stage (means), to the first token, per token and per step (medians)"
    times = dict(zip(*tables[name][:2], strict=True))
    assert [times[f"{stage}, s"] for stage in ("prefill", "map", "process", "reduce")] == [
        *("0.050", "0.800", "6.250", "0.900")
    ]
    assert (times["first token, s"], times["per token, ms"], times["per step, ms"]) == ("0.061", "28.10", "56.20")
    assert times["peak memory, MiB"] == "–"
    head, *rows = tables["Speed-up over the sequential twin: median of paired runs"]
    first = dict(zip(head, rows[0], strict=True))
    assert (first["batch"], first["length"], first["speed-up"]) == ("1", "128", "1.73")
    assert first["lowest to highest"] == "1.53 to 1.83"
    assert rows[1][2] == "its own"
    assert "Machine and versions" in page
    assert "2.13.0" in page


def test_table_2_has_the_published_values_of_the_same_task_beside_its_own(page):
    rows = tables_of(page)["pass@1, % (95% interval) and # parallel, by task"]
    assert rows[0] == ["prompt and mode", "sums", "AIME24"]
    by_name = {cells[0]: cells[1:] for cells in rows}
    assert by_name["parallel prompt, parallel mode"] == ["71.4 (59.1 to 83.8)", "2.00"] * 2
    assert by_name["Multiverse-32B"] == ["–", "–", "53.8", "1.18"]
    assert by_name["Multiverse-32B-zero"] == ["–", "–", "52.1", "1.04"]
    assert by_name["Qwen2.5-32B-Instruct"] == ["–", "–", "15.8", "1.00"]
    assert "arXiv 2506.09991, Table 2" in page


def test_the_published_values_are_those_of_the_paper():
    """Table 2 of arXiv 2506.09991, line by line."""
    lines = """
        s1-32B 35.4 1.00 25.8 1.00 88.6 1.00 48.0 1.00
        s1.1-32B 52.9 1.00 41.7 1.00 93.4 1.00 62.6 1.00
        Qwen2.5-32B-Instruct 15.8 1.00 10.4 1.00 80.4 1.00 47.0 1.00
        Autoregressive-32B 54.6 1.00 45.0 1.00 92.8 1.00 61.6 1.00
        Multiverse-32B-zero 52.1 1.04 44.2 1.05 92.4 1.12 63.6 1.17
        Multiverse-32B 53.8 1.18 45.8 1.15 91.8 1.15 60.7 1.17
    """
    read = {line.split()[0]: list(map(float, line.split()[1:])) for line in lines.strip().splitlines()}
    tasks = ("aime24", "aime25", "math500", "gpqa_diamond")
    written = {
        model: [value for task in tasks for value in (cells[task].pass_at_1, cells[task].parallelism)]
        for model, cells in TABLE_2.items()
    }
    assert written == read


def test_nothing_is_published_of_other_tasks():
    summary, records = summary_of([row([record(PARALLEL)])]), [record(PARALLEL)]
    for text in (render_page(summary, records, {}, {}), render_markdown(summary, {}, {})):
        assert "s1.1-32B" not in text
        assert "32B parameters" not in text


def test_figures_and_their_sections_are_left_out_where_nothing_was_measured():
    summary, records = summary_of([row([record(PARALLEL)])]), [record(PARALLEL)]
    bare = render_page(summary, records, {}, {})
    reader = check_page(bare)
    assert not [attributes for _, attributes in reader.elements if attributes.get("class") == "ev-picture"]
    assert "Figure 7" not in bare
    assert "Figure 8" not in bare
    assert "Comparisons" not in bare
    lacking = {name: value for name, value in summary.items() if name not in ("comparisons", "budget_curves", "speed")}
    assert render_page({**lacking, "sessions": summary["sessions"]}, records, {}, {}) == bare


def test_pictures_have_the_points_of_the_summary(page):
    """Of every drawn line, the heights of its points rise as the values do."""
    drawn = re.search(r'<svg[^>]*aria-label="Accuracy on sums.*?</svg>', page, re.DOTALL)[0]
    assert "currentColor" in drawn
    assert "paths side by side, parallel prompt" in drawn
    # Each name once, though one arm has both a measured and a derived curve.
    assert drawn.count("paths side by side") == 1
    lines = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #0475b6', drawn)
    points = [re.findall(r"[ML] ([\d.]+) ([\d.]+)", line) for line in lines]
    heights = [[float(y) for _, y in line] for line in points if len(line) == 3]
    across = [[float(x) for x, _ in line] for line in points if len(line) == 3]
    assert len(heights) >= 2
    for places, tops in zip(across, heights, strict=True):
        if tops[0] == tops[1]:  # the line of the legend
            continue
        # Values 10, 40, 62 at 64, 128, 256, in a picture whose heights count downwards.
        assert (tops[0] - tops[2]) / (tops[0] - tops[1]) == pytest.approx(52 / 30, rel=1e-4)
        assert (places[2] - places[0]) / (places[1] - places[0]) == pytest.approx(3, rel=1e-4)


def test_generations_are_shown_with_expected_answer_verdict_and_text(page):
    start = page.index('id="generations"')
    entries = re.split(r'<details class="ev-generation" id="generation-\d+">', page[start:])[1:]
    assert len(entries) == 4 * 7
    # Wrong ones come first.
    assert ["ev-wrong" in entry for entry in entries[:7]] == [True] * 2 + [False] * 5
    assert "sums-0001, sample 0" in entries[0]
    values = dict(re.findall(r'<div><dt>([^<]*)</dt><dd class="mv-text">([^<]*)</dd></div>', entries[0]))
    assert values["expected"] == "12"
    assert values["read off"] == "11"
    assert values["verdict"] == "wrong answer"
    assert values["seed"] == "18"
    assert "300 tokens in 150 steps" in entries[0]
    assert "mv-timeline" in entries[0]
    cut = dict(re.findall(r'<div><dt>([^<]*)</dt><dd class="mv-text">([^<]*)</dd></div>', entries[1]))
    assert cut["read off"] == "nothing"
    assert cut["structure problems"] == "unclosed block (1), unclosed tag (2)"


def test_every_malformed_generation_can_be_found(page):
    listed = re.findall(r'<li><a href="#(generation-\d+)">([^<]*)</a></li>', page)
    assert len(listed) == 4
    for id_, name in listed:
        entry = page[page.index(f'id="{id_}"') :][:500]
        assert "ev-malformed" in entry
        assert name in entry


def test_the_markdown_table_says_what_the_summary_says():
    summary, _ = whole()
    text = render_markdown(summary, FACTS, prompts("sums", "aime24"))
    card, published, compared, curves, *_ = markdown_tables(text)
    assert card[0][:3] == ["condition", "right", "pass@1, % (95% interval)"]
    assert card[1][:4] == ["sums, parallel prompt, parallel mode", "5 of 7", "71.4 (59.1 to 83.8)", "–"]
    assert card[1][4:] == ["2.00", "300", "150", "85.7"]
    assert len(card) == 1 + len(summary["conditions"])
    assert published[0] == ["model", "AIME24"]
    assert published[-1] == ["Multiverse-32B", "53.8 / 1.18"]
    assert compared[1][0] == "sums, parallel prompt, parallel mode – sums, parallel prompt, sequential mode"
    assert curves[1] == [
        "sums, parallel prompt, parallel mode",
        "64",
        "10.0",
        "5.0 to 15.0",
        "from the run without a limit",
    ]
    # The prompts stand there to the letter.
    assert prompts("sums")["sums"]["parallel"]["text"] in text
    assert text.count("Think step by step and in parallel.") == 2
    assert "temperature | 0.6" in text


def test_a_long_derived_curve_is_thinned_in_markdown_only():
    points = list(range(10, 410, 10))
    long = {
        **{name: PARALLEL[name] for name in ("task", "prompt", "mode")},
        "budgets": points,
        "pass_at_1": [budget / 400 for budget in points],
        "intervals": [[0.0, 1.0]] * 40,
        "derived": True,
    }
    records = [record(PARALLEL)]
    summary = summary_of([row(records)], budget_curves=[long])
    name = "Accuracy against sequential steps allowed"
    assert len(tables_of(render_page(summary, records, {}, {}))[name]) == 41
    steps = [cells[1] for cells in markdown_tables(render_markdown(summary, {}, {}))[1]]
    assert steps == ["steps allowed", "50", "100", "150", "200", "250", "300", "350", "400"]


def test_what_is_missing_is_said_first():
    records = [record(PARALLEL)]
    summary = summary_of([row(records)], missing=17)
    for text in (render_page(summary, records, {}, {}), render_markdown(summary, {}, {})):
        assert "17 generations are missing" in text[: text.index("are right")]
    done = summary_of([row(records)])
    assert "missing" not in render_page(done, records, {}, {})


def test_a_limited_run_is_not_held_against_whole_benchmarks_in_silence():
    records = [record(condition("math500"))]
    summary = summary_of([row(records)], settings={"model": "demo", "limit": 20})
    assert "first 20 questions" in render_page(summary, records, {}, {})
    assert "first 20 questions" in render_markdown(summary, {}, {})


def test_settings_prompts_sources_and_machine_are_published(page):
    for words in ("temperature", "0.6", "ab" * 32, FACTS["aime24"]["source"], "2026-01-02T03:04:05"):
        assert words in page
    assert "Think step by step and in parallel." in page
    # Both tasks have the same prompts, which are written once.
    assert "<h4>sums, aime24</h4>" in page


def test_the_hub_reads_the_model_index():
    summary, _ = whole()
    text = model_index(summary, FACTS)
    card = ModelCard(f"---\n{text}---\n# demo\n")
    assert card.data.model_name == "demo"
    found = {
        (each.dataset_type, each.dataset_name, each.metric_type, each.metric_name): each.metric_value
        for each in card.data.eval_results
    }
    assert len(found) == 2 * len(summary["conditions"])
    share = found["HuggingFaceH4/aime_2024", "AIME24", "pass@1", "pass@1 (parallel prompt, parallel mode)"]
    assert share == pytest.approx(5 / 7, abs=1e-4)
    degree = "degree of parallelism (parallel prompt, sequential mode)"
    assert found["sums", "sums", "degree_of_parallelism", degree] == 2.0
    aime = next(each for each in card.data.eval_results if each.dataset_name == "AIME24")
    assert (aime.dataset_split, aime.dataset_revision) == ("train", "0a1b2c")


def test_a_summary_as_it_is_made_can_be_reported(tmp_path: Path):
    conditions = [condition("sums", "parallel", mode) for mode in ("parallel", "sequential")]
    seconds = {"prefill": 0.1, "sequential": 0.2, "map": 0.3, "process": 0.4, "reduce": 0.1}
    times = {"seconds": seconds, "first_token_seconds": 0.1, "seconds_per_token": 0.01, "batch_rows": 1}
    records = [
        make(each, number, times=times) for each in conditions for number, make in enumerate((record, wrong, broken))
    ]
    asked = {"model": "demo", "tasks": ["sums"], "prompts": ["parallel"], "modes": ["parallel", "sequential"]}
    calls = [
        {
            **{name: each[name] for name in ("task", "prompt", "mode")},
            **{"batch_size": size, "length": None, "repeat": 0, "generated_tokens": 100 * size},
            **{"sequential_steps": 50, "degree_of_parallelism": 2.0, "seconds": 1.0 if number else 0.5},
            **{"prefill_seconds": 0.1, "peak_memory_bytes": None},
        }
        for number, each in enumerate(conditions)
        for size in (1, 4)
    ]
    facts = {"sums": {"source": "x", "questions": 3, "samples": 1, "sha256": "ab"}}
    summary = summarise_run({**asked, "budgets": [None]}, facts, records, calls, [{"rank": 0, "started": 1.0}])
    paths = write_report(tmp_path, summary, records, facts, prompts("sums"))
    page = paths[0].read_text(encoding="utf-8")
    check_page(page)
    tables = tables_of(page)
    assert dict(zip(*tables["Accuracy, tokens and steps of every condition"][:2], strict=True))["pass@1, %"] == "33.3"
    assert tables["Speed-up over the sequential twin: median of paired runs"][1][3] == "2.00"
    assert BROKEN.splitlines()[-1] in unescape(page)
