"""`multiverse evaluate`: one command runs, reports and compares, and says what is wrong in one line."""

import json
import random
from pathlib import Path

import pytest
from evaluated import LONGEST, evaluate_elsewhere, write_checkpoint, write_questions
from multiverse.cli import app
from multiverse.evaluation.report_page import without_times
from multiverse.evaluation.run_folder import RunFolder
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("commands")
    model = write_checkpoint(folder / "model")
    questions = write_questions(folder / "questions.jsonl", model)
    return (
        f"--model {model} --dtype float64 --tasks own --data own={questions},kind=number --batch-size 2 "
        f"--max-new-tokens {LONGEST}"
    ).split()


@pytest.fixture(scope="module")
def done(asked, tmp_path_factory) -> Path:
    """A run in both modes, with its report."""
    folder = tmp_path_factory.mktemp("commands") / "done"
    invoke("run", folder, *asked, "--modes", "parallel,sequential", "--budgets", "none,12", "--batch-sizes", "1,2")
    return folder


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def of_reports(folder: Path) -> tuple[str, str, dict]:
    """What two runs of the same have in common: reports apart from times, and the summary without them."""
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("sessions", "speed"):
        summary.pop(name)
    for condition in summary["conditions"]:
        condition.pop("times")
    page, text = (without_times((folder / name).read_text()) for name in ("report.html", "report.md"))
    return page, text, summary


def test_a_run_ends_with_its_report(done):
    assert {"report.html", "report.md", "summary.json", "model_index.yaml"} <= {each.name for each in done.iterdir()}
    summary = json.loads((done / "summary.json").read_text())
    assert [row["mode"] for row in summary["conditions"]] == ["parallel", "parallel", "sequential", "sequential"]
    for row in summary["conditions"]:
        condition = (row["mode"], row["budget"])
        records = [each for each in RunFolder(done).records() if (each["mode"], each["budget"]) == condition]
        assert row["right"] == sum(each["right"] for each in records)
        assert row["sequential_steps"] == pytest.approx(sum(e["sequential_steps"] for e in records) / 9, abs=6e-3)
    assert {(row["batch_size"], row["length"]) for row in summary["speed"]} == {(1, None), (2, None)}


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_was_cut_off_ends_with_the_same_report(done, asked, tmp_path, seed):
    other = RunFolder(tmp_path / "cut")
    for path in done.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl") and path.name != "summary.json":
            copy = other.path / path.relative_to(done)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    records = other.path / "records" / "rank-0000.jsonl"
    cut = random.Random(seed).randrange(records.stat().st_size)
    records.write_bytes(records.read_bytes()[:cut])
    assert other.missing() > 0
    invoke("run", other.path, *asked, "--modes", "parallel,sequential", "--budgets", "none,12", "--batch-sizes", "1,2")
    assert of_reports(other.path) == of_reports(done)


def test_two_processes_end_with_the_same_report_as_one(done, tmp_path):
    folder = tmp_path / "two"
    evaluate_elsewhere(RunFolder(done).settings(), folder, 2)
    assert len(list((folder / "records").glob("*.jsonl"))) == 2
    invoke("report", folder)
    assert of_reports(folder) == of_reports(done)


def test_a_report_of_half_a_run_says_what_is_missing(done, tmp_path):
    folder = tmp_path / "half"
    for path in done.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            (folder / path.relative_to(done)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(done)).write_bytes(path.read_bytes())
    records = folder / "records" / "rank-0000.jsonl"
    # Nine answers in batches of two, and half of the next batch.
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:10]))
    assert "27 generations are missing" in invoke("report", folder)
    assert "Generations are missing" in invoke(
        "compare", folder, done, "--select-first", "mode=parallel", "--select-second", "mode=parallel", code=2
    )


def test_modes_of_a_run_are_compared(done):
    told = invoke("compare", done, "--select-first", "mode=parallel", "--select-second", "mode=sequential")
    assert "own, parallel prompt, parallel mode against own, parallel prompt, sequential mode" in told
    selected = [
        "--select-first",
        "mode=parallel,budget=none",
        "--select-second",
        "mode=sequential,budget=none",
        "--json",
    ]
    found = json.loads(CliRunner().invoke(app, ["evaluate", "compare", str(done), *selected]).output)
    [compared] = found["comparisons"]
    records = {(each["mode"], each["question"]): each for each in RunFolder(done).records() if each["budget"] is None}
    steps = [
        sum(each["sequential_steps"] for (mode, _), each in records.items() if mode == wanted) / 9
        for wanted in ("parallel", "sequential")
    ]
    assert compared["sequential_steps"]["ratio"] == pytest.approx(steps[0] / steps[1], abs=1e-4)
    assert compared["questions"] == 9


def test_runs_with_other_settings_are_compared_only_when_told_to(done, asked, tmp_path):
    invoke("run", tmp_path / "other", *asked, "--max-new-tokens", 40)
    pair = ("compare", tmp_path / "other", done, "--select-second", "mode=parallel,budget=none")
    told = invoke(*pair, code=2)
    assert "max_new_tokens is 40 and 100" in told
    assert "--allow-different-settings" in told
    assert "max_new_tokens is 40 and 100" in invoke(*pair, "--allow-different-settings")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tasks", "chess"], "chess"),
        (["--modes", "fast"], "`modes` may hold"),
        (["--budgets", "none,many"], "`budgets` must hold whole numbers"),
        (["--data", "own"], "`data` must look like TASK=PATH"),
        (["--samples", "3"], "greedy decoding"),
        (["--dtype", "float12"], "`dtype`"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_made(tmp_path, options, told):
    assert told in invoke("run", tmp_path / "run", *options, code=2)
    assert not (tmp_path / "run").exists()


def test_instructions_come_from_a_file(asked, tmp_path):
    (tmp_path / "own.yaml").write_text("parallel: a b c\n")
    invoke("run", tmp_path / "run", *asked, "--limit", 2, "--instructions", tmp_path / "own.yaml")
    assert "a b c" in json.loads((tmp_path / "run" / "prompts.json").read_text())["own"]["parallel"]["text"]
    (tmp_path / "own.yaml").write_text("- a\n")
    assert "must hold texts" in invoke("run", tmp_path / "new", "--instructions", tmp_path / "own.yaml", code=2)
