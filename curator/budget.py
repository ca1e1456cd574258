"""What a run may use, what it has spent, and whether the next call still fits."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions

#: Tokens that a chat template adds to a message at most.
_TEMPLATE_TOKENS = 32


@dataclass(frozen=True)
class Limits:
    """What a run may use.

    Args:
        concurrency (`int`): calls at a time, their pauses between tries included.
        in_flight (`int`, *optional*): records at a time, which is what is held in memory; by default twice
            `concurrency`, so that records between two calls leave no gap.
        max_attempts (`int`): of a stage, per record.
        max_failures (`int`): of all stages together, per record.
        max_cost (`float`, *optional*): most that all answers in the store may cost, over all runs.
        max_calls (`int`, *optional*): most answers in the store.
        grace (`float`): seconds that open calls get to end after a first signal.

    Raises:
        ValueError: if a number is out of range.
    """

    concurrency: int = 8
    in_flight: int | None = None
    max_attempts: int = 3
    max_failures: int = 8
    max_cost: float | None = None
    max_calls: int | None = None
    grace: float = 10.0

    def __post_init__(self) -> None:
        for name in ("concurrency", "in_flight", "max_attempts", "max_failures"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        for name in ("max_cost", "max_calls", "grace"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value!r}.")


class CapReached(Exception):
    """The next call could pass a cap."""


def worst_cost(messages: Sequence[Mapping[str, str]], options: ModelOptions) -> float:
    """The most that a call can cost: every byte of the messages a token, and an answer of `max_tokens`."""
    prompt = sum(len(message["content"].encode("utf-8", "replace")) + _TEMPLATE_TOKENS for message in messages)
    return options.cost(prompt, options.max_tokens)


def cost_of(completion: Completion, messages: Sequence[Mapping[str, str]], options: ModelOptions) -> float:
    """The price of an answer. Where the endpoint has counted no tokens, they are taken to be as many as can be: no cap
    would ever be reached otherwise."""
    if completion.prompt_tokens or completion.completion_tokens:
        return options.cost(completion.prompt_tokens, completion.completion_tokens)
    return worst_cost(messages, options)


class Budget:
    """Lets calls begin only while the caps hold whatever they turn out to cost.

    Args:
        max_cost (`float`, *optional*): most that all answers in the store together may cost.
        max_calls (`int`, *optional*): most answers in the store.
        cost (`float`), calls (`int`): what the store holds already.
    """

    def __init__(self, max_cost: float | None, max_calls: int | None, cost: float, calls: int) -> None:
        self.max_cost, self.max_calls = max_cost, max_calls
        self.cost, self.calls = cost, calls
        self._held: list[float] = []
        self._settled = asyncio.Event()

    @staticmethod
    def check(max_cost: float | None, options: Iterable[ModelOptions]) -> None:
        """Raises a `ValueError` where a cap on costs could not be kept."""
        for each in options if max_cost is not None else ():
            if not each.prompt_price and not each.completion_price:
                raise ValueError(
                    f"`max_cost` is {max_cost!r}, but {each.model!r} has no prices. Give `prompt_price` and "
                    "`completion_price` per million tokens, or use `max_calls`."
                )

    async def reserve(self, most: float) -> None:
        """Holds room for a call that costs `most` at most; waits for others to settle where that may make room.

        Raises:
            CapReached: if it does not fit though no other call is open.
        """
        while (reason := self._exceeded(most)) is not None:
            if not self._held:
                raise CapReached(reason)
            self._settled.clear()
            await self._settled.wait()
        self._held.append(most)

    def settle(self, most: float, completion: Completion | None, cost: float = 0.0) -> None:
        """Gives the room of a call back, and counts what it did cost."""
        self._held.remove(most)
        if completion is not None:
            self.cost += cost
            self.calls += 1
        self._settled.set()

    def _exceeded(self, most: float) -> str | None:
        if self.max_calls is not None and self.calls + len(self._held) + 1 > self.max_calls:
            return f"`max_calls` of {self.max_calls} is reached"
        if self.max_cost is not None and self.cost + sum(self._held) + most > self.max_cost:
            return f"`max_cost` of {self.max_cost:g} could be passed: {self.cost:.4g} is spent"
        return None
