"""Runs that are stopped or killed at any moment: nothing is lost, no finished call is repeated."""

import asyncio
import random
import signal

import pytest
from curated import (
    OPTIONS,
    PROCESSES,
    STAGES,
    InProcess,
    curate,
    curate_over_http,
    http_options,
    passes,
    results,
    toy_answer,
    toy_chains,
)
from multiverse.curator.model_options import ModelOptions
from multiverse.curator.models import Models
from multiverse.curator.pipeline import Curation
from multiverse.curator.store import Store, answer_key
from scripted_llm import Mood, ScriptedLLM, sloppy, slow


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.sqlite"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_open_calls_end_stores_them_and_begins_no_others(path, tmp_path, number):
    before = signal.getsignal(number)

    def progress(state):
        if state.calls == 5:
            signal.raise_signal(number)

    backend = InProcess(pause=0.01)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as caught:
        curate(path, backend, progress=progress, concurrency=4)
    assert number != signal.SIGTERM or caught.value.code == 143
    assert signal.getsignal(number) is before
    with Store(path) as store:
        # Four were open, and four more may have begun in the turn of the loop that the signal came in.
        assert len(store.answer_keys()) == len(backend.calls) <= 5 + 4 + 4
    again = InProcess()
    assert curate(path, again).progress.finished == 6
    curate(tmp_path / "undisturbed", whole := InProcess())
    assert len(backend.calls) + len(again.calls) == len(whole.calls)
    assert results(path) == results(tmp_path / "undisturbed")


def test_a_second_signal_and_the_end_of_the_grace_give_open_calls_up(path):
    class Signalling(InProcess):
        """Sends signals to its own process once a call is open, and hangs."""

        async def complete(self, messages, options):
            if not self.calls:
                for number in range(signals):
                    asyncio.get_running_loop().call_later(0.05 * number, signal.raise_signal, signal.SIGTERM)
            return await super().complete(messages, options)

    for signals, grace in ((2, 600.0), (1, 0.05)):
        backend = Signalling(pause=600.0)
        with pytest.raises(SystemExit):
            curate(path.with_name(str(signals)), backend, grace=grace)
        assert backend.calls
        assert backend.open == 0


def test_a_run_inside_an_event_loop_can_be_stopped_by_its_caller(path):
    async def part(store: Store):
        curation = Curation(
            toy_chains(6), STAGES, passes, InProcess(), store, OPTIONS, None, lambda state: states.append(state)
        )
        states = []
        running = asyncio.create_task(curation.run())
        while not states or states[-1].calls < 3:
            await asyncio.sleep(0)
        curation.stop("enough")
        return await running

    with Store(path) as store:
        assert asyncio.run(part(store)).stopped == "enough"
    assert curate(path).progress.finished == 6


def start(path, llm: ScriptedLLM, count: int, concurrency: int = 8):
    """A run in a process of its own."""
    process = PROCESSES.Process(target=curate_over_http, args=(str(path), llm.url, count, concurrency))
    process.start()
    return process


def key_of(body) -> str:
    """The store's name for the answer that a request asks for; the seed tells the attempt."""
    options = ModelOptions("toy", seed=0)
    return answer_key(options, body["messages"], body["seed"] + 1)


def stored_keys(path) -> set[str]:
    """Answers in the store; none where a process was killed before it had made one."""
    try:
        with Store(path) as store:
            return store.answer_keys()
    except ValueError:
        assert not path.exists()
        return set()


def slow_and_sloppy(digest: str, visit: int) -> Mood:
    return sloppy(digest, visit)._replace(latency=slow(digest, visit).latency)


def test_kill_9_at_any_moment_repeats_no_finished_call_and_changes_no_result(path, tmp_path):
    count, kills, rng = 60, 0, random.Random(7)
    with ScriptedLLM(toy_answer, slow_and_sloppy) as llm:
        stored: set[str] = set()
        for attempt in range(20):
            process = start(path, llm, count)
            seen = len(llm.bodies)
            # From the reading of the input on, or from the first call of this process.
            if attempt % 3:
                while len(llm.bodies) == seen and process.is_alive():
                    process.join(0.002)
            process.join(rng.uniform(0.0, 0.25))
            killed = process.is_alive()
            process.kill()
            process.join()
            llm.wait_until_idle()
            requested = [key_of(body) for body in llm.bodies[seen:]]
            assert not stored & set(requested), "a finished call was repeated"
            assert len(set(requested)) == len(requested)
            now = stored_keys(path)
            assert stored <= now, "a stored answer was lost"
            # What was on its way when the process died, and that alone, is asked again.
            assert len(set(requested) - now) <= 8
            stored, kills = now, kills + killed
            if kills == 8 or not killed:
                break
        assert kills == 8, "the work ended before it was killed often enough"
        seen = len(llm.bodies)
        process = start(path, llm, count)
        process.join()
        assert process.exitcode == 0
        assert not stored & {key_of(body) for body in llm.bodies[seen:]}
    with ScriptedLLM(toy_answer, slow_and_sloppy) as llm:
        curate(tmp_path / "undisturbed", Models(), toy_chains(count), options=http_options(llm.url))
    assert results(path) == results(tmp_path / "undisturbed")
    with Store(path) as store, Store(tmp_path / "undisturbed") as undisturbed:
        assert [each.position for each in store.records()] == list(range(count))
        assert store.counts()["waiting"] == store.counts()["running"] == 0
        assert store.answer_keys() == undisturbed.answer_keys()


def test_sigterm_ends_a_process_with_everything_stored(path, tmp_path):
    with ScriptedLLM(toy_answer, slow_and_sloppy) as llm:
        process = start(path, llm, 40)
        while len(llm.bodies) < 30:
            process.join(0.005)
        process.terminate()
        process.join()
        assert process.exitcode == 143
        llm.wait_until_idle()
        assert stored_keys(path) == {key_of(body) for body in llm.bodies}
        seen, stored = len(llm.bodies), stored_keys(path)
        process = start(path, llm, 40)
        process.join()
        assert process.exitcode == 0
        assert not stored & {key_of(body) for body in llm.bodies[seen:]}
    assert sum(llm.requests.values()) == len(stored_keys(path))
    with ScriptedLLM(toy_answer, slow_and_sloppy) as llm:
        curate(tmp_path / "undisturbed", Models(), toy_chains(40), options=http_options(llm.url))
    assert results(path) == results(tmp_path / "undisturbed")


def test_a_second_process_on_the_same_store_is_refused_while_the_first_goes_on(path):
    with ScriptedLLM(toy_answer, lambda digest, visit: Mood(latency=0.05)) as llm:
        first = start(path, llm, 10)
        while not llm.bodies:
            first.join(0.005)
        with pytest.raises(ValueError, match=rf"another run \(process {first.pid}\) is writing to"):
            curate(path, chains=toy_chains(10))
        first.join()
        assert first.exitcode == 0
    with Store(path, read_only=True) as store:
        assert store.counts()["finished"] == 10


def test_a_killed_process_leaves_no_lock_behind(path):
    with ScriptedLLM(toy_answer, lambda digest, visit: Mood(latency=0.05)) as llm:
        process = start(path, llm, 10)
        while not llm.bodies:
            process.join(0.005)
        process.kill()
        process.join()
    with Store(path) as store:
        # Open for writing, with all its input.
        assert sum(store.counts().values()) == 10
