"""The whole curator over real HTTP: its own stages and checks, models of every mood, kills, and what is exported."""

import json
import multiprocessing
import random
from pathlib import Path

import pytest
from curated_problems import chain, right_answer
from datasets import load_dataset
from multiverse.curator.budget import Limits
from multiverse.curator.checks import check
from multiverse.curator.grammar import check_grammar
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.models import Models
from multiverse.curator.output import read_lines
from multiverse.curator.pipeline import run
from multiverse.curator.run_commands import DATASET_FOLDER, STORE_FILE, app
from multiverse.curator.stages import make_stages
from multiverse.curator.store import Store
from scripted_llm import PERSONALITIES, Mood, ScriptedLLM
from typer.testing import CliRunner

#: As a run of a thousand chains would look like, every kind of trouble at once.
MOODS = [PERSONALITIES[name] for name in ("good", "sloppy", "slow", "failing")]


def every_mood(digest: str, visit: int) -> Mood:
    """One of four models, the same one for the same messages."""
    return random.Random(f"mood {digest}").choice(MOODS)(digest, visit)


def curate(path: Path, url: str, count: int) -> None:
    # Tries enough that none runs out of them where the machine is slow to answer.
    options = StageOptions(ModelOptions("scripted", base_url=url, timeout=4.0, tries=40, seed=0))
    chains = (chain(number) for number in range(count))

    async def no_pause(seconds: float) -> None:
        pass

    with Store(path) as store:
        run(chains, make_stages(), check, Models(sleep=no_pause), store, options, Limits(concurrency=16))


def records(path: Path) -> list:
    with Store(path, read_only=True) as store:
        return list(store.records())


def exported(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset, after the command."""
    done = CliRunner().invoke(app, ["export", str(folder)])
    assert done.exit_code == 0, done.output
    files = (path for path in sorted((folder / DATASET_FOLDER).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_two_hundred_chains_through_models_of_every_mood(tmp_path):
    with ScriptedLLM(right_answer, every_mood) as llm:
        curate(tmp_path / STORE_FILE, llm.url, 200)
        llm.wait_until_idle()
        # Nothing that was answered in full is asked again, but by another attempt.
        seeds = [(json.dumps(body["messages"]), body["seed"]) for body in llm.bodies]
        assert len(llm.bodies) > len(set(seeds)), "no model has failed"
        answered = sum(llm.answered.values())
    found = records(tmp_path / STORE_FILE)
    assert [each.chain.id for each in found] == [chain(number).id for number in range(200)]
    assert {each.status for each in found} <= {"finished", "rejected"}
    finished = [each for each in found if each.status == "finished"]
    assert len(finished) >= 190
    # Careless answers were noticed, and mended by asking again.
    assert sum(bool(each.history) for each in finished) >= 20
    with Store(tmp_path / STORE_FILE, read_only=True) as store:
        assert len(store.answer_keys()) == answered

    exported(tmp_path)
    rows = load_dataset(str(tmp_path / DATASET_FOLDER), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"] == [each.chain.id for each in finished]
    for row, record in zip(rows, finished, strict=True):
        check_grammar(row["deepseek_thinking_trajectory_parallel"], record.draft.structure)
        assert row["deepseek_thinking_trajectory"] == record.chain.trajectory
        assert record.draft.measures["content_distance"] <= 0.2
        provenance = json.loads(row["provenance"])
        assert provenance["models"]["refill"] == "scripted"
        assert provenance["attempts"] == record.attempts
        assert provenance["kinds"] == ["collective", "collective"]
    rejected = [each for each in found if each.status == "rejected"]
    rejects = list(read_lines(tmp_path / DATASET_FOLDER / "rejects.jsonl"))
    assert [each["id"] for each in rejects] == [each.chain.id for each in rejected]
    for each in rejects:
        assert each["reason"]
        assert all(event["reason"] and event["answers"] for event in each["story"])


def test_kill_9_at_twenty_moments_changes_nothing(tmp_path):
    count, rng, kills = 150, random.Random(3), 0
    # Forked, so that a kill costs no start of an interpreter.
    processes = multiprocessing.get_context("fork")
    folders = {name: tmp_path / name for name in ("killed", "undisturbed")}
    for folder in folders.values():
        folder.mkdir()
    path = folders["killed"] / STORE_FILE
    with ScriptedLLM(right_answer, PERSONALITIES["slow"]) as llm:
        for _ in range(60):
            process = processes.Process(target=curate, args=(path, llm.url, count))
            process.start()
            process.join(rng.uniform(0.03, 0.3))
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            llm.wait_until_idle()
            if kills == 20:
                break
        assert kills == 20, "the work ended before it was killed often enough"
        before = set()
        with Store(path) as store:
            before = store.answer_keys()
        requests = len(llm.bodies)
        curate(path, llm.url, count)
        with Store(path, read_only=True) as store:
            assert before <= store.answer_keys()
            assert len(store.answer_keys()) - len(before) == len(llm.bodies) - requests
        # Of every kill, what was on its way at most.
        assert len(llm.bodies) <= len({json.dumps(body["messages"]) for body in llm.bodies}) + 20 * 16
    with ScriptedLLM(right_answer, PERSONALITIES["slow"]) as llm:
        curate(folders["undisturbed"] / STORE_FILE, llm.url, count)
    assert exported(folders["killed"]) == exported(folders["undisturbed"])
    assert {each.status for each in records(path)} == {"finished"}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "chains.jsonl"
    rows = [
        {"question": each.question, "thought": each.trajectory, "reply": each.attempt, "solution": each.answer, "n": 1}
        for each in map(chain, range(4))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_commands_run_say_and_export(tmp_path, source):
    columns = ["--trajectory", "thought", "--attempt", "reply"]
    with ScriptedLLM(right_answer) as llm:
        arguments = ["run", str(source), str(tmp_path / "run"), "--model", "m", "--base-url", llm.url, *columns]
        limited = CliRunner().invoke(app, [*arguments, "--max-calls", "9"])
        assert limited.exit_code == 1, limited.output
        assert "The same command goes on" in limited.output
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert len(llm.bodies) == 4 * 6
        again = CliRunner().invoke(app, arguments)
        assert again.exit_code == 0
        assert len(llm.bodies) == 4 * 6
    assert "4 rows" in done.output
    said = CliRunner().invoke(app, ["status", str(tmp_path / "run")])
    assert "4 finished" in said.output
    assert "branches" in said.output
    rows = load_dataset(str(tmp_path / "run" / DATASET_FOLDER), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["n"] == [1] * 4
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run" / DATASET_FOLDER), "--output", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "4 finished and 0 rejected" in shown.output
    assert "problem 3" in page.read_text()


def test_what_is_hopeless_is_never_asked_about_and_what_is_silent_is_set_aside(tmp_path, monkeypatch):
    key = "sk-a-key-that-nobody-may-see-0123456789"
    monkeypatch.setenv("OWN_KEY", key)
    monkeypatch.setattr("multiverse.curator.models.FIRST_PAUSE", 0.0)
    rows = [
        {"question": each.question, "thought": each.trajectory, "reply": each.attempt, "solution": each.answer}
        for each in map(chain, range(4))
    ]
    rows[1]["solution"] = "1"
    rows[3]["thought"] += " <Path>"
    source, options = tmp_path / "chains.jsonl", tmp_path / "models.yaml"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def first_try_is_enough(digest: str, visit: int) -> Mood:
        return Mood("500" if silent and "problem 2 " in str(llm.messages[digest]) else None)

    run_folder, silent = tmp_path / "run", True
    with ScriptedLLM(right_answer, first_try_is_enough) as llm:
        default = {"model": "m", "base_url": llm.url, "tries": 1, "api_key_variable": "OWN_KEY"}
        default["extra_body"] = {"response_format": {"type": "json_object"}}
        options.write_text(json.dumps({"default": default}))
        arguments = ["run", str(source), str(run_folder), "--options", str(options), "--path-bound", "0.4"]
        arguments += ["--trajectory", "thought", "--attempt", "reply"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        asked = str(llm.bodies)
        assert "problem 0 " in asked
        assert "problem 1 " not in asked
        assert "problem 3 " not in asked
        assert all(body["response_format"] == {"type": "json_object"} for body in llm.bodies)
        said = CliRunner().invoke(app, ["status", str(run_folder)]).output
        assert "0 waiting, 0 running, 1 set aside, 1 finished, 2 rejected" in said
        assert "failed in source, rejected: 2" in said
        assert "set aside for want of an answer, for the next run: 1" in said
        assert "HTTP 500" in said
        assert "path_distance of finished records:" in said
        assert "0.4 allowed" in said
        reasons = [each["reason"] for each in read_lines(run_folder / DATASET_FOLDER / "rejects.jsonl")]
        assert ["known answer '1'" in reasons[0], "the tag <Path>" in reasons[1]] == [True, True]
        silent = False
        again = CliRunner().invoke(app, arguments)
        assert again.exit_code == 0, again.output
    said = CliRunner().invoke(app, ["status", str(run_folder)]).output
    assert "0 set aside, 2 finished, 2 rejected" in said
    card = (run_folder / DATASET_FOLDER / "README.md").read_text()
    assert "- `path_distance`: " in card
    assert "0.4 allowed" in card
    assert "2 at the stage source" in card
    measures = json.loads((run_folder / DATASET_FOLDER / "statistics.json").read_text())["measures"]
    assert measures["path_distance"]["bound"] == 0.4
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(app, ["inspect", str(run_folder / DATASET_FOLDER), "--output", str(page)])
    assert "2 finished and 2 rejected" in shown.output
    assert "failed at source" in page.read_text()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes()
    assert key not in done.output + again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "{source}", "{folder}"], "--options"),
        (["run", "{source}", "{folder}", "--model", "m", "--options", "o.yaml"], "--options"),
        (["run", "{source}", "{folder}", "--options", "o.yaml", "--local"], "--local"),
        (["run", "{source}", "{folder}", "--model", "m"], "has no column"),
        (["status", "{folder}"], "run.sqlite"),
        (["export", "{folder}"], "run.sqlite"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_made(arguments, message, tmp_path, source):
    places = {"source": source, "folder": tmp_path / "run"}
    done = CliRunner().invoke(app, [each.format(**places) for each in arguments])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
