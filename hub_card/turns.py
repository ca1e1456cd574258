"""Several generations on one processor, a decode step at a time, each with a clock that runs only in its own steps.

Two generations at once would share cores and memory in ways that nobody could read off a clock. Here one works while
the others wait, and the one that has used the least time goes next. So after every round all have had the same time,
and a race between them is as fair as if each had the machine to itself.
"""

import threading
import time
from collections.abc import Callable


class Turns:
    """What the lanes of one model share.

    Args:
        clock (`Callable[[], float]`): seconds, by any count.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.condition = threading.Condition()
        self.lanes: list[Lane] = []
        self.running: Lane | None = None

    def lane(self) -> "Lane":
        """A further generation; it takes part once it is entered."""
        return Lane(self)

    def pass_on(self) -> None:
        """Lets the lane with the least use go on; the condition must be held."""
        self.running = min(self.lanes, key=lambda lane: lane.used, default=None)
        self.condition.notify_all()


class Lane:
    """One generation, `with turns.lane() as lane:` around it and `lane.step()` after each of its steps.

    Entering waits for the first turn, and leaving passes it on, however the generation ends.

    Attributes:
        seconds (`float`): time in which it had the turn, up to the last step.
        used (`float`): what decides whose turn it is: as `seconds`, but counted from what the others have used when it
            came, so that a newcomer does not keep everyone waiting.
    """

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.seconds = 0.0
        self.used = 0.0
        self._began = 0.0

    def __enter__(self) -> "Lane":
        with self.turns.condition:
            self.used = min((lane.used for lane in self.turns.lanes), default=0.0)
            self.turns.lanes.append(self)
            if self.turns.running is None:
                self.turns.running = self
            self._wait()
        return self

    def __exit__(self, *exception: object) -> None:
        with self.turns.condition:
            self._count()
            self.turns.lanes.remove(self)
            self.turns.pass_on()

    def step(self, show: Callable[[], None] | None = None) -> None:
        """Gives the turn to whoever has used the least, and comes back when it is this lane's again.

        Args:
            show (`Callable[[], None]`, *optional*): called first, on nobody's clock.
        """
        with self.turns.condition:
            self._count()
        if show is not None:
            show()
        with self.turns.condition:
            self.turns.pass_on()
            self._wait()

    def _count(self) -> None:
        now = self.turns.clock()
        self.seconds += now - self._began
        self.used += now - self._began
        self._began = now

    def _wait(self) -> None:
        self.turns.condition.wait_for(lambda: self.turns.running is self)
        self._began = self.turns.clock()
