"""Turns of several generations: one at a time, equal time for all, and nobody is left waiting."""

import threading

import pytest
from multiverse.hub_card.turns import Turns


class Clock:
    """A clock that only the work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work(turns, cost: float, steps: int, seen: list, name: str, fail_at: int | None = None, gate=None) -> None:
    """A generation of `steps` steps; `seen` gets its name whenever it works."""
    busy = turns.clock
    try:
        with turns.lane() as lane:
            if gate is not None:
                gate.wait(5)
            for step in range(steps):
                seen.append(("in", name))
                busy.now += cost
                seen.append(("out", name))
                if step == fail_at:
                    raise RuntimeError(name)
                lane.step()
    except RuntimeError:
        pass
    seen.append(("left", name, lane.seconds))


def start(*jobs) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, args=job[:5], kwargs=job[5] if len(job) > 5 else {}) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return threads


def worked(seen: list) -> list[str]:
    return [entry[1] for entry in seen if entry[0] == "in"]


def alone(seen: list) -> bool:
    """Whether nobody worked while another did."""
    moves = [entry for entry in seen if entry[0] != "left"]
    return all(
        first[0] == "in" and second == ("out", first[1]) for first, second in zip(moves[::2], moves[1::2], strict=True)
    )


def in_wait(turns: Turns, count: int) -> threading.Event:
    """Set when `count` lanes have come, so that they start together."""
    gate = threading.Event()

    def watch() -> None:
        while len(turns.lanes) < count:
            pass
        gate.set()

    threading.Thread(target=watch, daemon=True).start()
    return gate


def test_all_get_the_same_time_whatever_their_steps_cost():
    turns, seen = Turns(Clock()), []
    gate = in_wait(turns, 2)
    start((turns, 1.0, 30, seen, "quick", {"gate": gate}), (turns, 3.0, 10, seen, "slow", {"gate": gate}))
    assert alone(seen)
    order = worked(seen)
    for end in range(1, len(order) + 1):
        quick, slow = order[:end].count("quick"), 3 * order[:end].count("slow")
        # Until one of them is through.
        if quick < 30 and slow < 30:
            assert abs(quick - slow) <= 3
    assert {entry[1]: entry[2] for entry in seen if entry[0] == "left"} == {"quick": 30.0, "slow": 30.0}


def test_a_newcomer_starts_where_the_others_are():
    turns, seen = Turns(Clock()), []
    with turns.lane() as lane:
        turns.clock.now += 100.0
        lane.step()
        assert lane.seconds == 100.0
        gate = in_wait(turns, 2)
        thread = threading.Thread(target=work, args=(turns, 1.0, 50, seen, "new"))
        thread.start()
        gate.wait(5)
        for _ in range(10):
            turns.clock.now += 1.0
            lane.step()
        # It has not had a hundred seconds at one go.
        assert 5 <= len(worked(seen)) <= 15
    thread.join(20)
    assert len(worked(seen)) == 50


def test_a_failure_passes_the_turn_on():
    turns, seen = Turns(Clock()), []
    gate = in_wait(turns, 3)
    together = {"gate": gate}
    start(
        (turns, 1.0, 20, seen, "a", together),
        (turns, 1.0, 20, seen, "b", {**together, "fail_at": 4}),
        (turns, 1.0, 20, seen, "c", together),
    )
    assert [worked(seen).count(name) for name in "abc"] == [20, 5, 20]
    assert alone(seen)
    assert turns.lanes == []


def test_what_is_shown_is_on_nobodys_clock():
    turns = Turns(Clock())
    with turns.lane() as lane:
        turns.clock.now += 2.0

        def show() -> None:
            assert lane.seconds == 2.0
            turns.clock.now += 50.0

        lane.step(show)
        turns.clock.now += 1.0
        lane.step()
    assert lane.seconds == pytest.approx(3.0)
