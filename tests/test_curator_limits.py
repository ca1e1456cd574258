"""The engine where models do not answer, caps are reached, or a run is not the one its store was made for."""

import sqlite3
from dataclasses import replace

import pytest
from curated import (
    OPTIONS,
    STAGES,
    Branches,
    InProcess,
    asked,
    curate,
    http_options,
    of_chain,
    passes,
    record,
    results,
    toy_answer,
    toy_chains,
)
from multiverse.curator.budget import Limits, worst_cost
from multiverse.curator.checks import Checks
from multiverse.curator.completion import CallRefused, CallUnanswered, Completion
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.models import Models
from multiverse.curator.pipeline import run
from multiverse.curator.records import StageFailure
from multiverse.curator.store import Store
from scripted_llm import Mood, ScriptedLLM


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


# Models that do not answer


def test_a_model_that_refuses_every_call_stops_the_run_and_rejects_nobody(path):
    error = CallRefused("toy", "HF_TOKEN is not set", for_all=True)
    with pytest.raises(CallRefused, match="HF_TOKEN is not set"):
        curate(path, InProcess(lambda messages: error))
    with Store(path) as store:
        assert store.counts()["rejected"] == 0
    assert curate(path).progress.finished == 6


def test_a_call_that_is_refused_while_others_are_answered_rejects_its_record(path):
    def answer(messages):
        return CallRefused("toy", "too long for the context") if of_chain(messages, 4) else toy_answer(messages)

    assert curate(path, InProcess(answer), concurrency=1, in_flight=1).progress.finished == 5
    found = record(path, "c4")
    assert (found.status, dict(found.attempts)) == ("rejected", {"steps": 1})
    assert found.history[0]["reason"] == "too long for the context"


def test_refusals_before_the_first_answer_are_taken_for_a_wrong_option(path):
    with pytest.raises(CallRefused, match="no such field"):
        curate(path, InProcess(lambda messages: CallRefused("toy", "no such field")), toy_chains(9))
    with Store(path) as store:
        assert store.counts()["rejected"] == 0


def test_a_record_without_an_answer_is_set_aside_and_taken_up_by_the_next_run(path, tmp_path):
    def answer(messages):
        return CallUnanswered("toy", "no answer in 6 tries") if of_chain(messages, 4) else toy_answer(messages)

    for _ in range(2):
        summary = curate(path, InProcess(answer), concurrency=1)
        assert (summary.progress.finished, summary.progress.rejected, summary.progress.set_aside) == (5, 0, 1)
        assert dict(summary.set_aside) == {"c4": "no answer in 6 tries"}
        found = record(path, "c4")
        assert (found.status, found.held, found.history) == ("set aside", "no answer in 6 tries", ())
    assert curate(path).progress.finished == 6
    assert record(path, "c4").held is None
    curate(tmp_path / "undisturbed")
    assert results(path) == results(tmp_path / "undisturbed")


def test_an_endpoint_that_has_gone_stops_the_run(path):
    def answer(messages):
        return toy_answer(messages) if len(backend.calls) < 9 else CallUnanswered("toy", "gone")

    backend = InProcess(answer)
    with pytest.raises(CallUnanswered, match="gone"):
        curate(path, backend, toy_chains(50), concurrency=1)
    assert len(backend.calls) < 20
    assert curate(path, chains=toy_chains(50)).progress.finished == 50


def test_records_that_are_never_answered_do_not_keep_the_others_from_being_finished(path):
    def answer(messages):
        silent = any(of_chain(messages, number) for number in (0, 2, 4, 5))
        return CallUnanswered("toy", "too long") if silent else toy_answer(messages)

    # More in a row than it takes to give an endpoint up; but it answers, and nothing else is left to be tried.
    summary = curate(path, InProcess(answer), concurrency=8)
    assert (summary.progress.finished, sorted(summary.set_aside)) == (2, ["c0", "c2", "c4", "c5"])
    with Store(path) as store:
        assert store.counts() == {"waiting": 0, "running": 0, "set aside": 4, "finished": 2, "rejected": 0}


def test_an_endpoint_that_answers_nobody_stops_the_run_however_few_the_records_are(path):
    with pytest.raises(CallUnanswered, match="gone"):
        curate(path, InProcess(lambda messages: CallUnanswered("toy", "gone")), toy_chains(3), concurrency=8)


def test_a_chain_that_is_refused_at_intake_is_rejected_before_anything_is_asked(path):
    def intake(chain):
        if chain.id == "c1":
            raise StageFailure("source", "holds a tag")
        if chain.id == "c2":
            raise KeyError("broken")

    backend = InProcess()
    with Store(path) as store:
        summary = run(toy_chains(4), STAGES, passes, backend, store, OPTIONS, intake=intake)
    assert (summary.progress.finished, summary.progress.rejected) == (2, 2)
    assert not any(of_chain(messages, number) for messages, _ in backend.calls for number in (1, 2))
    found = record(path, "c1")
    assert (found.status, found.stage) == ("rejected", "source")
    assert found.history == ({"stage": "source", "back_to": None, "attempt": 1, "reason": "holds a tag"},)
    assert record(path, "c2").history[0]["reason"].startswith("KeyError: 'broken'")


# Caps


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_the_spending_cap_is_never_passed_whatever_the_next_answers_cost(path, concurrency):
    options = ModelOptions("toy", prompt_price=1e4, completion_price=2e4, max_tokens=50)

    def dear(messages):
        # As dear as an answer can be: every byte of the prompt a token, and all of `max_tokens`.
        prompt = sum(len(message["content"].encode()) for message in messages)
        return Completion(toy_answer(messages), "stop", prompt, 50, "toy")

    most = max(worst_cost(asked("branches", "upper", "epsilon of c10"), options), 1.0)
    backend = InProcess(dear, pause=0.001)
    summary = curate(path, backend, options=StageOptions(options), max_cost=20.0, concurrency=concurrency)
    assert "`max_cost` of 20 could be passed" in str(summary.stopped)
    assert 20.0 - 2 * most < summary.progress.cost <= 20.0
    with Store(path) as store:
        assert sum(each.cost for each in store.usage()) == pytest.approx(summary.progress.cost)
        assert sum(each.calls for each in store.usage()) == len(backend.calls)
    again = InProcess(dear)
    assert curate(path, again, options=StageOptions(options), max_cost=20.0).stopped
    assert again.calls == []
    assert curate(path, options=StageOptions(options), max_cost=1e9).progress.finished == 6


def test_the_spending_cap_holds_where_the_endpoint_counts_no_tokens(path):
    options = ModelOptions("toy", prompt_price=1e4, completion_price=2e4, max_tokens=50)
    backend = InProcess(lambda messages: Completion(toy_answer(messages), "stop", 0, 0, "toy"))
    summary = curate(path, backend, options=StageOptions(options), max_cost=20.0)
    assert "`max_cost` of 20 could be passed" in str(summary.stopped)
    most = [worst_cost(messages, options) for messages, _ in backend.calls]
    assert summary.progress.cost == pytest.approx(sum(most))
    assert summary.progress.cost <= 20.0


def test_the_cap_on_calls_is_used_to_the_last_and_counts_all_runs(path):
    backend = InProcess(pause=0.001)
    assert "`max_calls` of 7 is reached" in str(curate(path, backend, max_calls=7).stopped)
    assert len(backend.calls) == 7
    assert curate(path, backend, max_calls=9).progress.calls == 9
    assert len(backend.calls) == 9


def test_calls_that_fail_give_their_room_back(path):
    def answer(messages):
        return CallUnanswered("toy", "gone") if len(backend.calls) == 2 else toy_answer(messages)

    backend = InProcess(answer)
    summary = curate(path, backend, chains=toy_chains(2), max_calls=100, concurrency=1)
    assert summary.stopped is None
    assert summary.progress.calls == len(backend.calls) - 1


def test_tokens_and_costs_are_stored_by_stage_and_model(path):
    options = StageOptions(
        ModelOptions("toy", prompt_price=1.0, completion_price=2.0),
        {"branches": ModelOptions("large", prompt_price=10.0, completion_price=20.0)},
    )
    curate(path, chains=toy_chains(1), options=options)
    with Store(path) as store:
        usage = {(each.stage, each.model): each for each in store.usage()}
    # One call for three words, then one for each of them and one for all; 10 and 5 tokens each.
    assert {name: each.calls for name, each in usage.items()} == {("steps", "toy"): 1, ("branches", "large"): 4}
    assert usage["steps", "toy"].cost == pytest.approx(20e-6)
    assert usage["branches", "large"].cost == pytest.approx(4 * 200e-6)
    assert usage["branches", "large"].prompt_tokens == 40


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"concurrency": 0}, "`concurrency` must be a whole number of at least 1, got 0"),
        ({"max_attempts": 1.5}, "`max_attempts` must be a whole number"),
        ({"max_cost": -1.0}, "`max_cost` must not be negative"),
        ({"max_calls": -1}, "`max_calls` must not be negative"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_by_name(limits, message):
    with pytest.raises(ValueError, match=message):
        Limits(**limits)


def test_a_cap_on_costs_without_prices_is_refused_before_any_call(path):
    backend = InProcess()
    with pytest.raises(ValueError, match="'free' has no prices"):
        curate(path, backend, options=StageOptions(ModelOptions("free")), max_cost=1.0)
    assert backend.calls == []


# The run as a whole


@pytest.mark.parametrize("changed", ["version", "model", "max_attempts", "stages", "check"])
def test_a_store_of_other_options_is_refused_before_any_call(path, changed):
    curate(path, max_calls=3)

    class Newer(Branches):
        version = "2"

    given = {
        "version": {"stages": (*STAGES[:2], Newer())},
        "model": {"options": StageOptions(replace(OPTIONS.default, temperature=0.3))},
        "max_attempts": {"max_attempts": 4},
        "stages": {"stages": STAGES[:2]},
        "check": {"check": Checks(path_bound=0.4)},
    }[changed]
    named = {
        "version": "branches.version",
        "model": "steps.temperature",
        "max_attempts": "max_attempts",
        "stages": "order",
        "check": "checks.path_bound is 0.4",
    }
    backend = InProcess()
    with pytest.raises(ValueError, match=named[changed]):
        curate(path, backend, **given)
    assert backend.calls == []


def test_progress_is_told_from_the_stored_state_to_the_end(path):
    told = []
    curate(path, progress=told.append, max_calls=5)
    assert (told[0].total, told[0].calls, told[-1].calls) == (6, 0, 5)
    told.clear()
    curate(path, progress=told.append)
    assert told[0].calls == 5
    assert (told[-1].finished, told[-1].ended) == (6, 6)
    assert [each.calls for each in told] == sorted(each.calls for each in told)


def test_an_error_of_the_progress_callback_ends_the_run_and_rejects_nobody(path):
    def progress(state):
        if state.calls == 4:
            raise RuntimeError("no terminal")

    with pytest.raises(RuntimeError, match="no terminal"):
        curate(path, progress=progress)
    assert curate(path).progress.finished == 6


def test_a_store_that_cannot_be_written_ends_the_run_and_rejects_nobody(path, monkeypatch):
    def full(self, *arguments):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_answer", full)
        with pytest.raises(sqlite3.OperationalError, match="full"):
            curate(path)
    assert curate(path).progress.finished == 6


def test_keys_reach_neither_the_store_nor_a_log_nor_a_result(path, tmp_path, monkeypatch, caplog):
    key = "sk-a-key-that-nobody-may-see-0123456789"
    monkeypatch.setenv("MY_KEY", key)
    caplog.set_level("DEBUG")

    def moods(digest: str, visit: int) -> Mood:
        if visit == 1 and int(digest, 16) % 3 == 0:
            return Mood("500")
        return Mood("400" if int(digest, 16) % 7 == 0 else None)

    async def at_once(seconds: float) -> None:
        pass

    with ScriptedLLM(toy_answer, moods) as llm:
        options = http_options(llm.url, api_key_variable="MY_KEY")
        curate(path, Models(sleep=at_once), toy_chains(12), options=options, concurrency=2)
        assert set(llm.keys) == {f"Bearer {key}"}
    assert b"HTTP 400" in results(path)
    for file in tmp_path.iterdir():
        assert key.encode() not in file.read_bytes()
    assert key not in caplog.text
