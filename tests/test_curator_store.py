"""The store: what is kept, what is compared, and who is let in."""

import json
import sqlite3
from dataclasses import replace

import pytest
from curated import InProcess, curate, toy_chains
from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.records import Chain, Draft, Group, Step
from multiverse.curator.store import Store, answer_key
from multiverse.curator.store_file import SCHEMA_VERSION

SETTINGS = {"stages": {"steps": {"version": "1", "model": "m"}}, "max_attempts": 3}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "store.sqlite"


def test_a_record_comes_back_as_it_was_saved(path):
    draft = Draft(
        steps=(Step("1", "Ünïcode \ud83d", True, (Step("1.1", "a"),)),),
        groups=(Group(("1", "2"), "selective", "why"),),
        texts={"10": "z", "2": "a"},
        measures={"distance": 0.1},
        done=("steps",),
    )
    with Store(path) as store:
        store.add_chains([Chain("x", "q", "t", "a", "7", {"source": "s1", "n": [1, None]}), Chain("y", "", "", "")])
        record = replace(
            store.load(0), status="running", stage="groups", attempts={"steps": 2}, draft=draft, complaint="no",
            history=({"stage": "steps", "reason": "r"},), held="gone \ud83d",
        )  # fmt: skip
        saved = store.save(record)
    with Store(path, read_only=True) as store:
        assert store.load(0) == saved == replace(record, draft=saved.draft, held="gone \ufffd") == store.find("x")
        assert saved.draft == draft
        assert list(saved.draft.texts) == ["10", "2"]
        assert store.load(1).status == "waiting"
        assert store.counts() == {"waiting": 1, "running": 1, "set aside": 0, "finished": 0, "rejected": 0}
        assert store.find("z") is None


def test_records_come_in_input_order_whatever_ended_first(path):
    with Store(path) as store:
        store.add_chains(toy_chains(12))
        for position in (7, 2, 11, 0):
            store.save(replace(store.load(position), status="finished"))
        store.save(replace(store.load(5), status="rejected"))
        store.save(replace(store.load(3), status="running"))
        store.save(replace(store.load(8), status="set aside"))
        assert [each.position for each in store.records("finished")] == [0, 2, 7, 11]
        assert [each.position for each in store.records()] == list(range(12))
        assert list(store.unfinished()) == [1, 3, 4, 6, 8, 9, 10]


def test_an_answer_is_found_by_what_was_asked_and_counted_by_stage_and_model(path):
    with Store(path) as store:
        store.add_answer("k1", Completion("a\ud83d\0b", "length", 10, 5, "m"), 0, "steps", "c", 1, 0.5)
        store.add_answer("k2", Completion("b", "stop", 1, 2, "m"), 1, "steps", "c", 1, 0.25)
        store.add_answer("k3", Completion("c", "stop", 3, 4, "n"), 0, "groups", "c", 2, 0.0)
    with Store(path) as store:
        assert store.answer("k1") == Completion("a\ufffd\0b", "length", 10, 5, "m")
        assert store.answer("k4") is None
        assert store.answer_keys() == {"k1", "k2", "k3"}
        found = {(each.stage, each.model): each for each in store.usage()}
        assert set(found) == {("steps", "m"), ("groups", "n")}
        steps = found["steps", "m"]
        assert (steps.calls, steps.prompt_tokens, steps.completion_tokens, steps.cost) == (2, 11, 7, 0.75)
        assert (steps.cut, found["groups", "n"].cut) == (1, 0)
        assert [each["text"] for each in store.answers_of(0)] == ["c", "a\ufffd\0b"]


def test_the_key_changes_with_all_that_an_answer_depends_on_and_with_nothing_else():
    options = ModelOptions("m", base_url="http://a/v1", seed=1)
    asked = [{"role": "user", "content": "x"}]
    key = answer_key(options, asked, 1)
    for name, value in {
        "model": "n", "temperature": 0.5, "max_tokens": 5, "seed": 2, "extra_body": {"top_p": 0.5},
    }.items():  # fmt: skip
        assert answer_key(replace(options, **{name: value}), asked, 1) != key
    for name, value in {
        "base_url": "http://b/v1", "timeout": 5.0, "tries": 1, "prompt_price": 9.0, "completion_price": 9.0,
        "api_key_variable": "OTHER",
    }.items():  # fmt: skip
        assert answer_key(replace(options, **{name: value}), asked, 1) == key
    assert answer_key(options, asked, 2) != key
    assert answer_key(options, [{"role": "user", "content": "y"}], 1) != key


# What a store was made for


def test_the_same_input_and_options_are_let_in_again_and_a_longer_input_adds_to_it(path):
    with Store(path) as store:
        store.begin(SETTINGS)
        assert store.add_chains(iter(toy_chains(5))) == 5
        store.save(replace(store.load(2), status="finished"))
    with Store(path) as store:
        store.begin(json.loads(json.dumps(SETTINGS)))
        assert store.add_chains(iter(toy_chains(700))) == 700
        assert store.load(2).status == "finished"
        assert store.load(699).chain == toy_chains(700)[699]


def test_other_options_are_refused_and_each_is_named(path):
    with Store(path) as store:
        store.begin(SETTINGS)
        with pytest.raises(ValueError) as caught:
            store.begin(
                {"stages": {"steps": {"version": "2", "model": "m"}, "groups": {"version": "1"}}, "max_attempts": 4}
            )
    for part in ('stages.steps.version is "2" and was "1"', "stages.groups.version is", "max_attempts is 4 and was 3"):
        assert part in str(caught.value)
    assert "stages.steps.model" not in str(caught.value)


@pytest.mark.parametrize("field", ["id", "question", "trajectory", "attempt", "answer", "columns"])
def test_another_input_is_refused_and_the_difference_named(path, field):
    chains = toy_chains(4)
    with Store(path) as store:
        store.add_chains(chains)
        chains[2] = replace(chains[2], **{field: {"a": 1} if field == "columns" else "other"})
        with pytest.raises(ValueError, match=rf"chain 2, id .* differs in `{field}`\."):
            store.add_chains(chains)


def test_a_shorter_input_is_refused(path):
    with Store(path) as store:
        store.add_chains(toy_chains(4))
        with pytest.raises(ValueError, match="made for 4 chains, and the input has 3"):
            store.add_chains(toy_chains(3))


@pytest.mark.parametrize("already", [0, 2])
def test_an_id_that_comes_twice_is_refused_with_both_places(path, already):
    chains = [*toy_chains(4), replace(toy_chains(2)[1], question="another")]
    with Store(path) as store:
        store.add_chains(chains[:already])
        with pytest.raises(ValueError, match="`chains` 1 and 4 have the same id 'c1'"):
            store.add_chains(chains)


def test_a_column_that_json_cannot_hold_is_named(path):
    with Store(path) as store, pytest.raises(ValueError, match=r"`chains` 0, id 'x', has column 'image'"):
        store.add_chains([Chain("x", "", "", "", columns={"n": 1, "image": b"\0"})])


def test_what_does_not_change_the_results_may_change_between_runs(tmp_path):
    path = tmp_path / "store"
    curate(path, concurrency=1, max_calls=3)
    elsewhere = StageOptions(
        ModelOptions("toy", base_url="http://b/v1", timeout=1.0, prompt_price=5.0, completion_price=2.0, max_tokens=50)
    )
    backend = InProcess()
    assert curate(path, backend, options=elsewhere, concurrency=7).progress.finished == 6
    asked = [str(messages) for messages, _ in backend.calls]
    assert len(asked) == len(set(asked)) == curate(path).progress.calls - 3


# Who is let in


def test_a_second_writer_is_refused_and_a_reader_is_not(path):
    with Store(path) as store:
        store.add_chains(toy_chains(3))
        with pytest.raises(ValueError, match=r"another run \(process \d+\) is writing to"):
            Store(path)
        with Store(path, read_only=True) as reader:
            store.save(replace(store.load(1), status="finished"))
            assert reader.counts()["finished"] == 1
            with pytest.raises(sqlite3.OperationalError):
                reader.save(reader.load(0))
    with Store(path) as store:
        assert store.counts()["finished"] == 1


def test_a_store_of_another_version_is_refused(path):
    Store(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(
        ValueError, match=rf"version {SCHEMA_VERSION + 1}; this release reads version {SCHEMA_VERSION}"
    ):
        Store(path)
    with pytest.raises(ValueError, match="reads version"):
        Store(path, read_only=True)


def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(tmp_path):
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("not a database, and long enough to have a header of one " * 20)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    for file in (text, other):
        before = file.read_bytes()
        for read_only in (False, True):
            with pytest.raises(ValueError, match="not a curator's store"):
                Store(file, read_only=read_only)
        assert file.read_bytes() == before
    with pytest.raises(ValueError, match="where there is no store"):
        Store(tmp_path / "none", read_only=True)
