"""Gets the answers that a round needs: from the store, from a call that is open already, or from the model.

Each is in the store before anything is made of it. No call begins that could pass a cap, however many are open.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from multiverse.curator.budget import Budget, CapReached, Limits, cost_of, worst_cost
from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions
from multiverse.curator.models import Backend
from multiverse.curator.records import Call
from multiverse.curator.store import Store, answer_key


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


class Stopped(Exception):
    """The run ends, and no further call is begun."""


class Asking:
    """The calls of a run; made within its event loop.

    Args:
        backend (`Backend`): answers calls.
        store (`Store`): open for writing.
        options (`Mapping[str, ModelOptions]`): by stage.
        limits (`Limits`): what the run may use.
        stopping (`Callable[[], bool]`): whether the run ends.
        stop (`Callable[[str], None]`): ends it, for the reason given.
        report (`Callable[[Completion, float], None]`): told of every answer that was called for, with its price.

    Attributes:
        answered (`set[str]`): stages that any run over the store has had an answer for.
        silent (`int`): calls in a row that have come to nothing; whoever is told of one counts it.
        heard (`bool`): whether this run has had an answer.
    """

    def __init__(
        self,
        backend: Backend,
        store: Store,
        options: Mapping[str, ModelOptions],
        limits: Limits,
        stopping: Callable[[], bool],
        stop: Callable[[str], None],
        report: Callable[[Completion, float], None],
    ) -> None:
        self._backend, self._store, self._options = backend, store, options
        self._stopping, self._stop, self._report = stopping, stop, report
        self._slots = asyncio.Semaphore(limits.concurrency)
        usage = store.usage()
        spent, calls = sum(each.cost for each in usage), sum(each.calls for each in usage)
        self._budget = Budget(limits.max_cost, limits.max_calls, spent, calls)
        self._open: dict[str, asyncio.Task[Completion]] = {}
        self.answered = {each.stage for each in usage}
        self.silent, self.heard = 0, False

    def cancel(self) -> list[asyncio.Task[Completion]]:
        """Gives all open calls up; they are to be waited for."""
        tasks = list(self._open.values())
        for task in tasks:
            task.cancel()
        return tasks

    async def ask(self, position: int, stage: str, attempt: int, calls: Sequence[Call]) -> dict[str, str]:
        """The answers of a round by key; its calls go out together, and all of them end before one's error is told.

        Args:
            position (`int`): of the record that asks.
            stage (`str`), attempt (`int`): what it asks for.
            calls (`Sequence[Call]`): independent of each other.

        Raises:
            ModelError: if a call has come to nothing.
            Stopped: if the run ends before a call began.
        """
        keys = [call.key for call in calls]
        if len(set(keys)) != len(keys):
            raise RuntimeError(f"Stage {stage!r} asks two calls of one key: {keys}.")
        found = await asyncio.gather(
            *(self._answer(position, stage, attempt, call) for call in calls), return_exceptions=True
        )
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return {key: Answer.of(each) for key, each in zip(keys, found, strict=True) if isinstance(each, Completion)}

    async def _answer(self, position: int, stage: str, attempt: int, call: Call) -> Completion:
        options = self._options[stage]
        key = answer_key(options, call.messages, attempt)
        stored = self._store.answer(key)
        if stored is not None:
            return stored
        if (task := self._open.get(key)) is None:
            if options.seed is not None:
                options = replace(options, seed=options.seed + attempt - 1)
            task = asyncio.create_task(self._call(key, options, position, stage, attempt, call))
            self._open[key] = task
            task.add_done_callback(lambda done: self._open.pop(key, None))
        return await task

    async def _call(
        self, key: str, options: ModelOptions, position: int, stage: str, attempt: int, call: Call
    ) -> Completion:
        async with self._slots:
            if self._stopping():
                raise Stopped
            most = worst_cost(call.messages, options)
            try:
                await self._budget.reserve(most)
            except CapReached as reached:
                self._stop(str(reached))
                raise Stopped from None
            if self._stopping():
                self._budget.settle(most, None)
                raise Stopped
            completion, cost = None, 0.0
            try:
                completion = await self._backend.complete(call.messages, options)
                cost = cost_of(completion, call.messages, options)
                self._store.add_answer(key, completion, position, stage, call.key, attempt, cost)
            finally:
                self._budget.settle(most, completion, cost)
        self.silent, self.heard = 0, True
        self.answered.add(stage)
        self._report(completion, cost)
        return completion
