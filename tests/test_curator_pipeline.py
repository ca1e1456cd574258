"""The engine with toy stages: the way of a record, limits, and results that do not depend on order."""

import asyncio
import json
import random
import weakref
from dataclasses import replace

import pytest
from curated import (
    STAGES,
    Branches,
    InProcess,
    Steps,
    Structure,
    curate,
    http_options,
    of_chain,
    passes,
    record,
    results,
    toy_answer,
    toy_chains,
)
from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.models import Models
from multiverse.curator.records import BlockText, StageFailure, Step
from multiverse.curator.store import Store
from scripted_llm import Mood, ScriptedLLM, failing, sloppy, slow


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


def test_every_record_walks_through_its_stages_in_order(path):
    summary = curate(path)
    assert (summary.progress.total, summary.progress.finished, summary.stopped) == (6, 6, None)
    with Store(path) as store:
        for chain, found in zip(toy_chains(6), store.records("finished"), strict=True):
            words = chain.trajectory.split()
            draft = found.draft
            assert draft.steps == tuple(Step(str(number), word) for number, word in enumerate(words, 1))
            paths = tuple(f"{word} of {chain.id}".upper() for word in words)
            assert draft.blocks == {"1": BlockText("", (), paths, str(len(words)))}
            assert draft.done == ("steps", "structure", "branches")
            assert set(draft.measures) == set(draft.done)
            assert found.chain == chain
            assert dict(found.attempts) == {"steps": 1, "structure": 1, "branches": 1}
            assert found.history == ()


def test_a_finished_run_asks_nothing_again(path):
    curate(path)
    before, backend = results(path), InProcess()
    assert curate(path, backend).progress.finished == 6
    assert backend.calls == []
    assert results(path) == before


def test_calls_of_a_round_go_out_together_and_rounds_one_after_the_other(path):
    backend = InProcess(pause=0.01)
    curate(path, backend, [toy_chains(4)[3]], in_flight=1)
    assert backend.most_open == 6
    tasks = [json.loads(messages[-1]["content"])["task"] for messages, _ in backend.calls]
    assert tasks == ["words", *["upper"] * 6, "count"]


@pytest.mark.parametrize("personality", ["slow", "sloppy", "failing"])
def test_results_do_not_depend_on_concurrency_or_order(tmp_path, personality):
    def moods(digest: str, visit: int) -> Mood:
        mood = {"slow": slow, "sloppy": sloppy, "failing": failing}[personality](digest, visit)
        return mood._replace(latency=0.01 * random.Random(digest + run).random())

    async def at_once(seconds: float) -> None:
        await asyncio.sleep(0)

    found = []
    for run, concurrency, in_flight in (("a", 1, 1), ("b", 16, None), ("c", 3, 20)):
        path = tmp_path / run
        with ScriptedLLM(toy_answer, moods) as llm:
            # Tries enough that none runs out of them where the machine is slow to answer.
            options = http_options(llm.url, timeout=0.3 if personality == "failing" else 60.0, tries=40)
            limits = {"concurrency": concurrency, "in_flight": in_flight}
            curate(path, Models(sleep=at_once), toy_chains(8), options=options, **limits)
            # A call that was given up may still be open there when it is sent again.
            assert llm.most_open <= concurrency or personality == "failing"
        found.append(results(path))
    assert found[0] == found[1] == found[2]
    if personality == "sloppy":
        assert b"no JSON" in found[0]
        assert b"rejected" in found[0]
        assert b"finished" in found[0]


def test_concurrency_is_used_and_never_exceeded(path):
    for concurrency in (1, 5):
        backend = InProcess(pause=0.002)
        curate(path.with_name(str(concurrency)), backend, toy_chains(20), concurrency=concurrency)
        assert backend.most_open == concurrency


def test_no_more_records_are_in_memory_than_asked_for(path):
    alive, most = _Identities(), 0

    class Watched(Steps):
        def calls(self, chain, draft, complaint=None):
            nonlocal most
            alive.add(chain)
            most = max(most, len({id(each) for each in alive}))
            return super().calls(chain, draft, complaint)

    stages = (Watched(), *STAGES[1:])
    summary = curate(path, InProcess(pause=0.001), toy_chains(60), stages, concurrency=3, in_flight=4)
    assert summary.progress.finished == 60
    assert 1 < most <= 4


class _Identities(list):
    """Weak references to objects that cannot be hashed."""

    def add(self, item) -> None:
        self.append(weakref.ref(item))

    def __iter__(self):
        return iter([item for reference in super().__iter__() if (item := reference()) is not None])


def test_the_same_question_of_two_records_is_asked_once(path):
    twins = [replace(toy_chains(1)[0], id=name) for name in ("x", "y")]
    backend = InProcess(pause=0.01)
    curate(path, backend, twins, (Steps(), Structure()))
    assert len(backend.calls) == 1
    assert record(path, "x").draft == record(path, "y").draft


# Failures


def test_a_failure_leads_back_to_the_stage_it_names_with_its_reason(path):
    complaints = []

    def check(chain, draft, stage):
        if stage == "branches" and chain.id == "c1" and len(complaints) < 1:
            complaints.append(stage)
            raise StageFailure("steps", "the steps overlap")
        return passes(chain, draft, stage)

    backend = InProcess()
    curate(path, backend, check=check)
    found = record(path, "c1")
    assert found.status == "finished"
    assert dict(found.attempts) == {"steps": 2, "structure": 1, "branches": 1}
    assert found.history == ({"stage": "branches", "back_to": "steps", "attempt": 1, "reason": "the steps overlap"},)
    bodies = [json.loads(messages[-1]["content"]) for messages, _ in backend.calls if of_chain(messages, 1)]
    told = [(body["stage"], body["complaint"]) for body in bodies]
    # Later stages had their answers already, to the same questions.
    assert told == [*[("steps", None)], *[("branches", None)] * 5, ("steps", "the steps overlap")]
    assert record(path, "c0").history == ()


def test_a_complaint_stays_for_all_rounds_of_its_stage_and_goes_with_it(path):
    seen = []

    class Watched(Branches):
        failed = False

        def calls(self, chain, draft, complaint=None):
            seen.append((len(draft.blocks), complaint))
            return super().calls(chain, draft, complaint)

        def accept(self, chain, draft, answers):
            if draft.blocks and not self.failed:
                self.failed = True
                raise StageFailure("branches", "too short")
            return super().accept(chain, draft, answers)

    class After(Structure):
        name = "structure"

        def calls(self, chain, draft, complaint=None):
            seen.append(("structure", complaint))
            return []

    curate(path, None, toy_chains(1), (Steps(), After(), Watched()))
    assert seen == [("structure", None), (0, None), (1, None), (0, "too short"), (1, "too short")]
    assert record(path, "c0").complaint is None


def test_attempts_at_a_stage_are_bounded_and_the_whole_story_is_kept(path):
    told: list[str] = []

    def failing_check(chain, draft, stage):
        if stage == "steps" and chain.id == "c2":
            told.append(stage)
            raise StageFailure("steps", f"bad {len(told)}")
        return passes(chain, draft, stage)

    summary = curate(path, check=failing_check, max_attempts=3)
    assert (summary.progress.finished, summary.progress.rejected) == (5, 1)
    found = record(path, "c2")
    assert (found.status, found.stage, dict(found.attempts)) == ("rejected", "steps", {"steps": 3})
    assert [(each["attempt"], each["reason"]) for each in found.history] == [(1, "bad 1"), (2, "bad 2"), (3, "bad 3")]


def test_failures_of_all_stages_together_are_bounded(path):
    def check(chain, draft, stage):
        seen.append(stage)
        if stage == "branches" or (stage == "structure" and seen.count("structure") <= 2):
            raise StageFailure("structure" if stage == "structure" else "steps", "no")
        return draft

    seen: list[str] = []
    curate(path, chains=toy_chains(1), check=check, max_attempts=3, max_failures=4)
    found = record(path, "c0")
    assert found.status == "rejected"
    assert [each["back_to"] for each in found.history] == ["structure", "structure", "steps", "steps"]


def test_a_failure_that_names_a_later_stage_or_none_rejects_the_record(path):
    def check(chain, draft, stage):
        if chain.id in ("c0", "c1"):
            raise StageFailure("branches" if chain.id == "c0" else "elsewhere", "why")
        return draft

    curate(path, check=check)
    for chain_id, target in (("c0", "branches"), ("c1", "elsewhere")):
        found = record(path, chain_id)
        assert (found.status, len(found.history)) == ("rejected", 1)
        assert f"why (sent back to '{target}'" in found.history[0]["reason"]


def test_an_unexpected_error_rejects_its_record_alone_and_tells_where(path, caplog):
    class Broken(Structure):
        def accept(self, chain, draft, answers):
            if chain.id == "c3":
                {}["missing"]
            return super().accept(chain, draft, answers)

    assert curate(path, stages=(Steps(), Broken(), Branches())).progress.finished == 5
    found = record(path, "c3")
    assert (found.status, found.stage) == ("rejected", "structure")
    reason = found.history[-1]["reason"]
    assert reason.startswith("KeyError: 'missing' (")
    assert "test_curator_pipeline.py:" in reason
    assert " accept)" in reason
    assert "/" not in reason
    assert "c3" in caplog.text


def test_an_unexpected_error_of_a_call_rejects_the_record_that_asked(path):
    def answer(messages):
        return OSError("out of memory") if of_chain(messages, 4) else toy_answer(messages)

    assert curate(path, InProcess(answer)).progress.finished == 5
    assert "OSError: out of memory" in record(path, "c4").history[0]["reason"]


def test_a_stage_that_gets_nowhere_rejects_the_record_instead_of_asking_for_ever(path):
    class Stuck(Structure):
        def accept(self, chain, draft, answers):
            return draft

    assert curate(path, stages=(Steps(), Stuck()), chains=toy_chains(1)).progress.rejected == 1
    assert "has changed nothing" in record(path, "c0").history[0]["reason"]


def test_two_calls_of_one_key_reject_the_record(path):
    class Twice(Steps):
        def calls(self, chain, draft, complaint=None):
            return super().calls(chain, draft, complaint) * 2

    assert curate(path, stages=(Twice(),), chains=toy_chains(1)).progress.rejected == 1
    assert "two calls of one key" in record(path, "c0").history[0]["reason"]


def test_each_attempt_has_its_seed_and_its_answer(path):
    def check(chain, draft, stage):
        if len(seeds) < 3:
            raise StageFailure("steps", "always the same reason")
        return draft

    def answer(messages):
        seeds.append(backend.calls[-1][1].seed)
        return toy_answer(messages)

    seeds: list[int] = []
    backend = InProcess(answer)
    options = StageOptions(ModelOptions("toy", seed=40))
    curate(path, backend, toy_chains(1), (Steps(),), check, options)
    assert seeds == [40, 41, 42]


def test_a_stage_is_told_that_an_answer_was_cut_off(path):
    reasons = []

    class Watched(Steps):
        def accept(self, chain, draft, answers):
            reasons.append(answers["words"].finish_reason)
            if reasons[-1] == "length":
                raise StageFailure("steps", "cut off")
            return super().accept(chain, draft, answers)

    def answer(messages):
        return toy_answer(messages) if reasons else Completion("{", "length", 1, 1, "toy")

    curate(path, InProcess(answer), toy_chains(1), (Watched(),))
    assert reasons == ["length", "stop"]
