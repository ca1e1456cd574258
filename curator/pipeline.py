"""Takes every chain through the stages, many at a time, and stores each step before the next.

A record's way depends on its own answers alone, and an answer on what was asked. So the same input and the same
answers give the same drafts: whatever was in flight, in whatever order answers came, however often the run stopped.
"""

import asyncio
import contextlib
import logging
import signal
import sqlite3
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiverse.curator.budget import Budget, CapReached, Limits, worst_cost
from multiverse.curator.completion import CallRefused, CallUnanswered, Completion, ModelError
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.models import Backend
from multiverse.curator.progress import Progress
from multiverse.curator.records import Call, Chain, Draft, StageFailure
from multiverse.curator.store import Record, Store, answer_key

if TYPE_CHECKING:
    from multiverse.curator.stages import StageProtocol

logger = logging.getLogger(__name__)

Check = Callable[[Chain, Draft, str], Draft]
#: Calls in a row that may come to nothing before the fault is taken to be the endpoint's.
_STREAK = 3
_FRAMES_TOLD = 4


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        progress (`Progress`): the last state.
        stopped (`str`, *optional*): why it ended before its input did, such as `"SIGTERM"` or a cap.
        set_aside (`Mapping[str, str]`): records that are to be tried again, by id: what became of their call.
    """

    progress: Progress
    stopped: str | None
    set_aside: Mapping[str, str]


class Answer(str):
    """The text of an answer, as a stage is given it.

    Attributes:
        finish_reason (`str`): `"length"` says that it was cut off.
    """

    finish_reason: str

    @classmethod
    def of(cls, completion: Completion) -> "Answer":
        """The text of a completion with its `finish_reason`."""
        answer = cls(completion.text)
        answer.finish_reason = completion.finish_reason
        return answer


def run(
    chains: Iterable[Chain],
    stages: Sequence["StageProtocol"],
    check: Check,
    backend: Backend,
    store: Store,
    options: StageOptions,
    limits: Limits | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Curates all chains, or goes on with it.

    The first Ctrl-C (SIGINT) or SIGTERM lets open calls end for `grace` seconds and begins no others; the second stops
    at once. In either case everything is stored, and the same call goes on.

    Args:
        chains (`Iterable[Chain]`): the input, read once.
        stages (`Sequence[StageProtocol]`): in their order.
        check (`Callable`): `check(chain, draft, stage_name)` after each finished stage; returns the draft with its
            measures or raises a `StageFailure`.
        backend (`Backend`): answers calls; closed at the end.
        store (`Store`): open for writing.
        options (`StageOptions`): the models.
        limits (`Limits`, *optional*): what the run may use.
        progress (`Callable[[Progress], None]`, *optional*): told the state at every answer and every ended record.

    Returns:
        `Summary`: how it ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with everything stored.
        SystemExit: likewise with code 143 for SIGTERM.
        ModelError: if a model cannot be used at all, with everything stored.
        ValueError: if an argument cannot be used, or the store was made for other input or options.
    """
    curation = Curation(chains, stages, check, backend, store, options, limits, progress)

    async def listening() -> Summary:
        with _signals(curation):
            return await curation.run()

    summary = asyncio.run(listening())
    if summary.stopped == "SIGINT":
        raise KeyboardInterrupt("Stopped by Ctrl-C; the same command goes on.")
    if summary.stopped == "SIGTERM":
        logger.warning("Stopped by SIGTERM; the same command goes on.")
        raise SystemExit(128 + signal.SIGTERM)
    return summary


class Curation:
    """A run within an event loop; the arguments are those of `run`, which most callers want."""

    def __init__(
        self,
        chains: Iterable[Chain],
        stages: Sequence["StageProtocol"],
        check: Check,
        backend: Backend,
        store: Store,
        options: StageOptions,
        limits: Limits | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._stages, self._check, self._backend, self._store = tuple(stages), check, backend, store
        self._names = [stage.name for stage in self._stages]
        self._options = {name: options.of(name) for name in self._names}
        Budget.check(self._limits.max_cost, self._options.values())
        store.begin(self._settings())
        total = store.add_chains(chains)
        self._report = progress or (lambda state: None)
        counts, usage = store.counts(), store.usage()
        self._progress = Progress(
            total=total,
            finished=counts["finished"],
            rejected=counts["rejected"],
            calls=sum(each.calls for each in usage),
            prompt_tokens=sum(each.prompt_tokens for each in usage),
            completion_tokens=sum(each.completion_tokens for each in usage),
            cost=sum(each.cost for each in usage),
        )
        self._answered = {each.stage for each in usage}
        self._streak = 0
        self._stopped: str | None = None
        self._error: Exception | None = None
        self._set_aside: dict[str, str] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._open: dict[str, asyncio.Task[Completion]] = {}

    def _settings(self) -> dict[str, Any]:
        """What the results depend on."""
        stages = {
            stage.name: {"version": stage.version, **self._options[stage.name].identity()} for stage in self._stages
        }
        limits = {"max_attempts": self._limits.max_attempts, "max_failures": self._limits.max_failures}
        return {"stages": stages, "order": self._names, **limits}

    async def run(self) -> Summary:
        """Works until the input is done or something stops it."""
        self._slots = asyncio.Semaphore(self._limits.concurrency)
        state = self._progress
        self._budget = Budget(self._limits.max_cost, self._limits.max_calls, state.cost, state.calls)
        self._positions = self._store.unfinished()
        self._tell(state)
        in_flight = self._limits.in_flight or 2 * self._limits.concurrency
        self._workers = [asyncio.create_task(self._work()) for _ in range(in_flight)]
        try:
            await asyncio.gather(*self._workers, return_exceptions=True)
        finally:
            for task in (*self._workers, *self._open.values()):
                task.cancel()
            await asyncio.gather(*self._workers, *self._open.values(), return_exceptions=True)
            await self._backend.aclose()
        if self._error is not None:
            raise self._error
        return Summary(self._progress, self._stopped, dict(self._set_aside))

    def stop(self, reason: str, now: bool = False) -> None:
        """Ends the run.

        Args:
            reason (`str`): for `Summary.stopped`.
            now (`bool`): whether open calls are given up, which `grace` does otherwise after its time.
        """
        self._stopped = self._stopped or reason
        if now:
            self._give_up()
        else:
            asyncio.get_running_loop().call_later(self._limits.grace, self._give_up)

    @property
    def stopping(self) -> bool:
        """Whether something has stopped the run."""
        return self._stopped is not None

    def _give_up(self) -> None:
        for task in (*self._workers, *self._open.values()):
            task.cancel()

    async def _work(self) -> None:
        """Takes records one after the other; as many of these run as records may be in memory."""
        while self._stopped is None and (position := next(self._positions, None)) is not None:
            record = self._store.load(position)
            try:
                while record.status in ("waiting", "running"):
                    record = await self._advance(record)
            except _Stopped:
                return
            except (CallUnanswered, CallRefused) as error:
                self._without_answer(record, error)
            except Exception as error:  # of the store
                self._fail(error)

    async def _advance(self, record: Record) -> Record:
        """One round: the stage's calls, what it makes of the answers, and the checks; stored."""
        stage = next((stage for stage in self._stages if stage.name not in record.draft.done), None)
        if stage is None:
            return self._end(replace(record, status="finished"))
        attempt = record.attempts.get(stage.name, 1)
        record = replace(record, status="running", stage=stage.name, attempts={**record.attempts, stage.name: attempt})
        try:
            calls = stage.calls(record.chain, record.draft, record.complaint)
            answers = await self._ask(record, stage.name, attempt, calls)
            draft = stage.accept(record.chain, record.draft, answers)
            finished = stage.name in draft.done
            if finished:
                draft = self._check(record.chain, draft, stage.name)
            elif draft == record.draft:
                raise RuntimeError(f"Stage {stage.name!r} is not done and has changed nothing.")
        except StageFailure as failure:
            return self._go_back(record, failure)
        except (_Stopped, ModelError, sqlite3.Error):
            raise
        except Exception as error:
            logger.warning("Record %r is rejected for an error in %s.", record.chain.id, stage.name, exc_info=True)
            return self._reject(record, stage.name, attempt, _told(error))
        return self._store.save(replace(record, draft=draft, complaint=None if finished else record.complaint))

    def _go_back(self, record: Record, failure: StageFailure) -> Record:
        """The record at the stage that the failure names, with its reason; or rejected, if that was the last time."""
        stage, target = str(record.stage), failure.stage
        if target not in self._names[: self._names.index(stage) + 1]:
            reason = f"{failure.reason} (sent back to {target!r}, which is no stage up to {stage!r})"
            return self._reject(record, stage, record.attempts[stage], reason)
        attempt = record.attempts.get(target, 1)
        event = {"stage": stage, "back_to": target, "attempt": attempt, "reason": failure.reason}
        record = replace(record, history=(*record.history, event))
        if attempt >= self._limits.max_attempts or len(record.history) >= self._limits.max_failures:
            return self._end(replace(record, status="rejected"))
        return self._store.save(
            replace(
                record,
                draft=record.draft.back_to(target),
                stage=target,
                attempts={**record.attempts, target: attempt + 1},
                complaint=failure.reason,
            )
        )

    def _reject(self, record: Record, stage: str, attempt: int, reason: str) -> Record:
        event = {"stage": stage, "back_to": None, "attempt": attempt, "reason": reason}
        attempts, history = {**record.attempts, stage: attempt}, (*record.history, event)
        return self._end(replace(record, status="rejected", stage=stage, attempts=attempts, history=history))

    def _end(self, record: Record) -> Record:
        record = self._store.save(replace(record, complaint=None))
        ended = {record.status: getattr(self._progress, record.status) + 1}
        self._tell(replace(self._progress, **ended))
        return record

    def _without_answer(self, record: Record, error: ModelError) -> None:
        """A call has come to nothing: is it the record's fault, the endpoint's, or bad luck?"""
        stage, refused = _stage_of(record, self._names), isinstance(error, CallRefused)
        if isinstance(error, CallRefused) and error.for_all:
            self._fail(error)
        elif refused and stage in self._answered:
            self._reject(record, stage, record.attempts.get(stage, 1), str(error))
        else:
            # Nothing is held against the record: it is still unfinished, and the next run takes it up.
            logger.warning("Record %r is set aside: %s", record.chain.id, error)
            self._set_aside[record.chain.id] = str(error)
            self._streak += 1
            if self._streak >= _STREAK:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.stop(str(error))

    def _tell(self, state: Progress) -> None:
        self._progress = state
        try:
            self._report(state)
        except Exception as error:  # the caller's, and no record's fault
            self._fail(error)

    async def _ask(self, record: Record, stage: str, attempt: int, calls: Sequence[Call]) -> dict[str, str]:
        """The answers of a round by key; its calls go out together, and all of them end before one's error is told."""
        keys = [call.key for call in calls]
        if len(set(keys)) != len(keys):
            raise RuntimeError(f"Stage {stage!r} asks two calls of one key: {keys}.")
        found = await asyncio.gather(
            *(self._answer(record, stage, attempt, call) for call in calls), return_exceptions=True
        )
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return {key: Answer.of(each) for key, each in zip(keys, found, strict=True) if isinstance(each, Completion)}

    async def _answer(self, record: Record, stage: str, attempt: int, call: Call) -> Completion:
        """From the store, from a call that is open already, or from the model."""
        options = self._options[stage]
        key = answer_key(options, call.messages, attempt)
        stored = self._store.answer(key)
        if stored is not None:
            return stored
        if (task := self._open.get(key)) is None:
            if options.seed is not None:
                options = replace(options, seed=options.seed + attempt - 1)
            task = asyncio.create_task(self._call(key, options, record, stage, attempt, call))
            self._open[key] = task
            task.add_done_callback(lambda done: self._open.pop(key, None))
        return await task

    async def _call(
        self, key: str, options: ModelOptions, record: Record, stage: str, attempt: int, call: Call
    ) -> Completion:
        async with self._slots:
            if self._stopped is not None:
                raise _Stopped
            most = worst_cost(call.messages, options)
            try:
                await self._budget.reserve(most)
            except CapReached as reached:
                self.stop(str(reached))
                raise _Stopped from None
            if self._stopped is not None:
                self._budget.settle(most, None)
                raise _Stopped
            completion, cost = None, 0.0
            try:
                completion = await self._backend.complete(call.messages, options)
                cost = options.cost(completion.prompt_tokens, completion.completion_tokens)
                self._store.add_answer(key, completion, record.position, stage, call.key, attempt, cost)
            finally:
                self._budget.settle(most, completion, cost)
        self._streak = 0
        self._answered.add(stage)
        state = replace(
            self._progress,
            calls=self._progress.calls + 1,
            prompt_tokens=self._progress.prompt_tokens + completion.prompt_tokens,
            completion_tokens=self._progress.completion_tokens + completion.completion_tokens,
            cost=self._progress.cost + cost,
        )
        self._tell(state)
        return completion


class _Stopped(Exception):
    """No further call is begun."""


def _stage_of(record: Record, names: Sequence[str]) -> str:
    return next(name for name in names if name not in record.draft.done)


def _told(error: Exception) -> str:
    """An error with the places it came through, without paths of this machine."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_TOLD:]
    places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {error} ({places})"


@contextlib.contextmanager
def _signals(curation: Curation) -> Iterator[None]:
    """Lets SIGINT and SIGTERM end a run inside. Python hands them to the main thread only; one that is ignored stays
    ignored."""
    loop, heard = asyncio.get_running_loop(), []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            previous = signal.getsignal(number)
            try:
                loop.add_signal_handler(number, _receive, curation, number)
            except NotImplementedError:  # Windows
                continue
            heard.append((number, previous))
    try:
        yield
    finally:
        for number, previous in heard:
            loop.remove_signal_handler(number)
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def _receive(curation: Curation, number: signal.Signals) -> None:
    again = curation.stopping
    if not again:
        logger.warning("%s: waiting for open calls; once more stops at once.", number.name)
    curation.stop(number.name, now=again)
