"""Takes every chain through the stages, many at a time, and stores each step before the next.

A record's way depends on its own answers alone, and an answer on what was asked. So the same input and the same
answers give the same drafts: whatever was in flight, in whatever order answers came, however often the run stopped.
"""

import asyncio
import logging
import signal
import sqlite3
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiverse.curator.asking import Asking, Stopped
from multiverse.curator.budget import Budget, Limits
from multiverse.curator.completion import CallRefused, CallUnanswered, Completion, ModelError
from multiverse.curator.model_options import StageOptions
from multiverse.curator.models import Backend
from multiverse.curator.progress import Progress
from multiverse.curator.records import SOURCE, Chain, Draft, StageFailure
from multiverse.curator.signals import ended_by_signals
from multiverse.curator.store import Record, Store

if TYPE_CHECKING:
    from multiverse.curator.stages import StageProtocol

logger = logging.getLogger(__name__)

Check = Callable[[Chain, Draft, str], Draft]
Intake = Callable[[Chain], None]
#: Calls in a row that may come to nothing before the fault is taken to be the endpoint's.
_STREAK = 3
_FRAMES_TOLD = 4


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        progress (`Progress`): the last state.
        stopped (`str`, *optional*): why it ended before its input did, such as `"SIGTERM"` or a cap.
        set_aside (`Mapping[str, str]`): records that the next run tries again, by id: what became of their call.
    """

    progress: Progress
    stopped: str | None
    set_aside: Mapping[str, str]


def run(
    chains: Iterable[Chain],
    stages: Sequence["StageProtocol"],
    check: Check,
    backend: Backend,
    store: Store,
    options: StageOptions,
    limits: Limits | None = None,
    progress: Callable[[Progress], None] | None = None,
    intake: Intake | None = None,
) -> Summary:
    """Curates all chains, or goes on with it.

    The first Ctrl-C (SIGINT) or SIGTERM lets open calls end for `grace` seconds and begins no others; the second stops
    at once. In either case everything is stored, and the same call goes on.

    Args:
        chains (`Iterable[Chain]`): the input, read once.
        stages (`Sequence[StageProtocol]`): in their order.
        check (`Callable`): `check(chain, draft, stage_name)` after each finished stage; returns the draft with its
            measures or raises a `StageFailure`. What its `settings()` give, if it has any, is part of the store.
        backend (`Backend`): answers calls; closed at the end.
        store (`Store`): open for writing.
        options (`StageOptions`): the models.
        limits (`Limits`, *optional*): what the run may use.
        progress (`Callable[[Progress], None]`, *optional*): told the state at every answer and every ended record.
        intake (`Callable`, *optional*): `intake(chain)` before anything is asked about a chain; a `StageFailure`
            rejects it at once.

    Returns:
        `Summary`: how it ended.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with everything stored.
        SystemExit: likewise with code 143 for SIGTERM.
        ModelError: if a model cannot be used at all, with everything stored.
        ValueError: if an argument cannot be used, or the store was made for other input or options.
    """
    curation = Curation(chains, stages, check, backend, store, options, limits, progress, intake)

    async def listening() -> Summary:
        with ended_by_signals(curation):
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
        intake: Intake | None = None,
    ) -> None:
        self._limits = limits or Limits()
        self._stages, self._check, self._backend, self._store = tuple(stages), check, backend, store
        self._intake = intake or (lambda chain: None)
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
        self._stopped: str | None = None
        self._error: Exception | None = None
        self._set_aside: dict[str, str] = {}
        self._workers: list[asyncio.Task[None]] = []
        self._all_begun = False

    def _settings(self) -> dict[str, Any]:
        """What the results depend on."""
        stages = {
            stage.name: {"version": stage.version, **self._options[stage.name].identity()} for stage in self._stages
        }
        limits = {"max_attempts": self._limits.max_attempts, "max_failures": self._limits.max_failures}
        checks: Mapping[str, Any] = getattr(self._check, "settings", dict)()
        return {"stages": stages, "order": self._names, **limits, "checks": checks}

    async def run(self) -> Summary:
        """Works until the input is done or something stops it."""
        self._asking = Asking(
            self._backend,
            self._store,
            self._options,
            self._limits,
            stopping=lambda: self.stopping,
            stop=self.stop,
            report=self._count_call,
        )
        self._positions = self._store.unfinished()
        self._tell(self._progress)
        in_flight = self._limits.in_flight or 2 * self._limits.concurrency
        self._workers = [asyncio.create_task(self._work()) for _ in range(in_flight)]
        try:
            await asyncio.gather(*self._workers, return_exceptions=True)
        finally:
            await asyncio.gather(*self._give_up(), return_exceptions=True)
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

    def _give_up(self) -> "list[asyncio.Task[Any]]":
        for task in self._workers:
            task.cancel()
        return [*self._workers, *self._asking.cancel()]

    async def _work(self) -> None:
        """Takes records one after the other; as many of these run as records may be in memory."""
        while self._stopped is None:
            position = next(self._positions, None)
            if position is None:
                self._all_begun = True
                return
            try:
                record = self._take_in(self._store.load(position))
                while record.status == "running":
                    record = await self._advance(record)
            except Stopped:
                return
            except Exception as error:  # of the store
                self._fail(error)

    def _take_in(self, record: Record) -> Record:
        """A record at the beginning of its work in this run."""
        if record.status == "waiting":
            try:
                self._intake(record.chain)
            except StageFailure as failure:
                return self._reject(record, SOURCE, 1, failure.reason)
            except Exception as error:
                logger.warning("Record %r is rejected for an error at intake.", record.chain.id, exc_info=True)
                return self._reject(record, SOURCE, 1, _told(error))
        return replace(record, status="running", held=None)

    async def _advance(self, record: Record) -> Record:
        """One round: the stage's calls, what it makes of the answers, and the checks; stored."""
        stage = next((stage for stage in self._stages if stage.name not in record.draft.done), None)
        if stage is None:
            return self._end(replace(record, status="finished"))
        attempt = record.attempts.get(stage.name, 1)
        record = replace(record, status="running", stage=stage.name, attempts={**record.attempts, stage.name: attempt})
        try:
            calls = stage.calls(record.chain, record.draft, record.complaint)
            answers = await self._asking.ask(record.position, stage.name, attempt, calls)
            draft = stage.accept(record.chain, record.draft, answers)
            finished = stage.name in draft.done
            if finished:
                draft = self._check(record.chain, draft, stage.name)
            elif draft == record.draft:
                raise RuntimeError(f"Stage {stage.name!r} is not done and has changed nothing.")
        except StageFailure as failure:
            return self._go_back(record, failure)
        except (CallUnanswered, CallRefused) as error:
            return self._without_answer(record, error)
        except (Stopped, ModelError, sqlite3.Error):
            raise
        except Exception as error:
            logger.warning("Record %r is rejected for an error in %s.", record.chain.id, stage.name, exc_info=True)
            return self._reject(record, stage.name, attempt, _told(error))
        record = replace(record, draft=draft, complaint=None if finished else record.complaint)
        if finished and set(self._names) <= set(draft.done):
            return self._end(replace(record, status="finished"))
        return self._store.save(record)

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

    def _without_answer(self, record: Record, error: CallUnanswered | CallRefused) -> Record:
        """A call has come to nothing: is it the record's fault, the endpoint's, or bad luck?"""
        stage, refused = str(record.stage), isinstance(error, CallRefused)
        if isinstance(error, CallRefused) and error.for_all:
            self._fail(error)
            raise Stopped
        if refused and stage in self._asking.answered:
            return self._reject(record, stage, record.attempts[stage], str(error))
        # Nothing is held against the record: the next run takes it up where it stands.
        logger.warning("Record %r is set aside: %s", record.chain.id, error)
        record = self._store.save(replace(record, status="set aside", held=str(error)))
        self._set_aside[record.chain.id] = str(error)
        self._tell(replace(self._progress, set_aside=len(self._set_aside)))
        self._asking.silent += 1
        # With no other record to be spared, and an endpoint that does answer, there is no reason to stop.
        if self._asking.silent >= _STREAK and not (self._all_begun and self._asking.heard):
            self._fail(error)
        return record

    def _count_call(self, completion: Completion, cost: float) -> None:
        state = self._progress
        state = replace(
            state,
            calls=state.calls + 1,
            prompt_tokens=state.prompt_tokens + completion.prompt_tokens,
            completion_tokens=state.completion_tokens + completion.completion_tokens,
            cost=state.cost + cost,
        )
        self._tell(state)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self.stop(str(error))

    def _tell(self, state: Progress) -> None:
        self._progress = state
        try:
            self._report(state)
        except Exception as error:  # the caller's, and no record's fault
            self._fail(error)


def _told(error: Exception) -> str:
    """An error with the places it came through, without paths of this machine."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_TOLD:]
    places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {error} ({places})"
