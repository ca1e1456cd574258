"""SIGINT and SIGTERM let a run end in order; a second one ends it at once."""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Protocol

logger = logging.getLogger(__name__)


class Stoppable(Protocol):
    """What signals end."""

    @property
    def stopping(self) -> bool: ...

    def stop(self, reason: str, now: bool = False) -> None: ...


@contextlib.contextmanager
def ended_by_signals(run: Stoppable) -> Iterator[None]:
    """Lets SIGINT and SIGTERM end a run inside. Python hands them to the main thread only; one that is ignored stays
    ignored."""
    loop, heard = asyncio.get_running_loop(), []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            previous = signal.getsignal(number)
            try:
                loop.add_signal_handler(number, _receive, run, number)
            except NotImplementedError:  # Windows
                continue
            heard.append((number, previous))
    try:
        yield
    finally:
        for number, previous in heard:
            loop.remove_signal_handler(number)
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def _receive(run: Stoppable, number: signal.Signals) -> None:
    again = run.stopping
    if not again:
        logger.warning("%s: waiting for open calls; once more stops at once.", number.name)
    run.stop(number.name, now=again)
