"""Asking language models: any OpenAI-compatible endpoint or Inference Provider, with retries; or one in this process.

A key is read from the environment when a call is sent, and cut out of every text that comes back.
"""

import asyncio
import email.utils
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx2
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from multiverse.curator.completion import CallRefused, CallUnanswered, Completion, ModelError
from multiverse.curator.local_model import LocalModels
from multiverse.curator.model_options import ModelOptions

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, str]]

#: Seconds of the first pause at most, of any pause at most, and of the longest that an endpoint may ask for.
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_ASKED = 1.0, 60.0, 600.0
#: Of one client, whose pool keeps no more connections than this open.
_CALLS_PER_CLIENT = 16
#: What clients send where no key is needed. Without a value huggingface_hub would send the token of its login.
_NO_KEY = "not-needed"
_REMEDIES = {
    400: "Check `extra_body`, `max_tokens` and whether the text fits into the model's context.",
    401: "Check the key in the environment, and `api_key_variable` where it is in a variable of its own.",
    402: "The account has no credit left.",
    403: "The key does not allow this model. Check it, or choose another model.",
    404: "Check `model` and `base_url`.",
    413: "The text is too long for the endpoint. Choose a model with a longer context.",
}
#: Errors that no other call to the same model would escape.
_FOR_ALL = (401, 402, 403, 404, 405, 407)


class Backend(Protocol):
    """What the pipeline needs of a model."""

    async def complete(self, messages: Messages, options: ModelOptions) -> Completion: ...

    async def aclose(self) -> None: ...


class Models:
    """Asks whichever model the options name. Clients are made at the first call and shared by all later ones.

    Args:
        sleep (`Callable[[float], Awaitable]`): waits between tries.
        draw (`Callable[[], float]`): a random number from 0 to 1, for the jitter.
        now (`Callable[[], float]`): the time of day in seconds, for a Retry-After that is a date.
    """

    def __init__(
        self,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._sleep, self._draw, self._now = sleep, draw, now
        self._clients: dict[tuple[str | None, str | None, str], list[_Client]] = {}
        self._local = LocalModels()

    async def __aenter__(self) -> "Models":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes all connections; a later call opens new ones."""
        clients, self._clients = self._clients, {}
        for client in (each for several in clients.values() for each in several):
            await client.client.close()

    async def complete(self, messages: Messages, options: ModelOptions) -> Completion:
        """Asks once, and again after a pause where the endpoint is overloaded, broken or silent.

        Pauses grow exponentially with full jitter, and are never shorter than a Retry-After.

        Args:
            messages (`Sequence[Mapping[str, str]]`): chat messages.
            options (`ModelOptions`): the model.

        Raises:
            CallRefused: if the endpoint refuses the call, which it would do again.
            CallUnanswered: if no try was answered.
        """
        if options.local:
            return _clean(await self._local.complete(messages, options), None)
        try:
            key = options.find_api_key()
        except ValueError as error:
            missing = CallRefused(options.model, str(error), for_all=True)
        else:
            return await self._complete_over_http(messages, options, key)
        raise missing

    async def _complete_over_http(self, messages: Messages, options: ModelOptions, key: str | None) -> Completion:
        for number in range(options.tries):
            # Raised outside of `except`, or Python would chain the client's error, whose request holds the key.
            outcome = await self._try(messages, options, key)
            if isinstance(outcome, Completion):
                return outcome
            if isinstance(outcome, ModelError):
                raise outcome
            if outcome.pause > LONGEST_ASKED or number + 1 == options.tries:
                break
            pause = outcome.pause + self._draw() * min(LONGEST_PAUSE, FIRST_PAUSE * 2**number)
            logger.info("%s: %s; asking again in %.1f s.", options.model, outcome.reason, pause)
            await self._sleep(pause)
        asked = (
            f", and the endpoint asks for a pause of {outcome.pause:.0f} s" if outcome.pause > LONGEST_ASKED else ""
        )
        raise CallUnanswered(
            options.model,
            f"{options.model!r} at {options.endpoint} did not answer in {number + 1} tries; the last: {outcome.reason}"
            f"{asked}. Check that it runs, lower `concurrency`, or raise `timeout`.",
        )

    async def _try(
        self, messages: Messages, options: ModelOptions, key: str | None
    ) -> "Completion | ModelError | _Again":
        client = self._client(options, key)
        client.active += 1
        try:
            # The client's own limit is one for every read, which a body that trickles in never meets.
            output = await asyncio.wait_for(
                client.client.chat_completion(**_request(messages, options)), options.timeout
            )
            return _clean(_read(output, options), key)
        except (asyncio.TimeoutError, TimeoutError, httpx2.TimeoutException):
            return _Again(f"no answer within {options.timeout:g} s")
        except HfHubHTTPError as error:
            status, said = error.response.status_code, _hide(_server_message(error), key)
            if status in (408, 429) or status >= 500:
                return _Again(f"HTTP {status}{said}", self._retry_after(error.response.headers))
            remedy = _REMEDIES.get(status, _REMEDIES[400])
            text = f"{options.model!r} at {options.endpoint} refused a call with HTTP {status}{said}. {remedy}"
            return CallRefused(options.model, text, for_all=status in _FOR_ALL)
        except (httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError) as error:
            return _Again(f"the connection failed ({type(error).__name__})")
        except (_Unreadable, json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
            return _Again("the answer is not a chat completion")
        except (OfflineModeIsEnabled, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            if isinstance(error, ValueError) and options.base_url is not None:
                # Of the body: huggingface_hub checks nothing else before a call to an address.
                return _Again("the answer is not a chat completion")
            text = _hide(f"{type(error).__name__}: {error}", key)
            text = f"{options.model!r} at {options.endpoint} cannot be asked: {text}"
            return CallRefused(options.model, text, for_all=True)
        finally:
            client.active -= 1

    def _client(self, options: ModelOptions, key: str | None) -> "_Client":
        several = self._clients.setdefault((options.base_url, options.provider, key or ""), [])
        for client in several:
            if client.active < _CALLS_PER_CLIENT:
                return client
        place = {"base_url": options.base_url} if options.base_url else {"provider": options.provider or "auto"}
        several.append(_Client(AsyncInferenceClient(api_key=key or _NO_KEY, **place)))  # type: ignore[arg-type]
        return several[-1]

    def _retry_after(self, headers: Mapping[str, str]) -> float:
        """Seconds, from a number or a date; 0 where there is none."""
        value = headers.get("retry-after", "").strip()
        if value.replace(".", "", 1).isdecimal():
            return float(value)
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - self._now())
        except (TypeError, ValueError):
            return 0.0


class _Unreadable(Exception):
    """The body is JSON, but no chat completion."""


@dataclass
class _Client:
    client: AsyncInferenceClient
    active: int = 0


@dataclass(frozen=True)
class _Again:
    """A try that is worth another one, after `pause` seconds at least."""

    reason: str
    pause: float = 0.0


def _request(messages: Messages, options: ModelOptions) -> dict[str, Any]:
    extra = dict(options.extra_body)
    limit = {"max_tokens": options.max_tokens}
    if options.token_limit_field != "max_tokens":
        extra[options.token_limit_field], limit = options.max_tokens, {}
    return {
        "messages": [dict(message) for message in messages],
        "model": options.model,
        "temperature": options.temperature,
        "seed": options.seed,
        "extra_body": extra or None,
        **limit,
    }


def _read(output: Any, options: ModelOptions) -> Completion:
    try:
        choice, usage = output.choices[0], output.get("usage") or {}
        text, reason = choice.message.content or "", choice.finish_reason or "stop"
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        if not isinstance(text, str):
            raise _Unreadable
        return Completion(text, str(reason), *counts, str(output.get("model") or options.model))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise _Unreadable from None


def _clean(completion: Completion, key: str | None) -> Completion:
    """Without the key, and without halves of surrogate pairs, which no file can hold."""
    text = _hide(completion.text, key).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Completion(
        text,
        _hide(completion.finish_reason, key),
        completion.prompt_tokens,
        completion.completion_tokens,
        _hide(completion.model, key),
    )


def _hide(text: str, key: str | None) -> str:
    return text.replace(key, "[key]") if key else text


def _server_message(error: HfHubHTTPError) -> str:
    """What the endpoint says of an error, in one line."""
    try:
        said = error.response.text
    except httpx2.HTTPError:  # a body of unknown length has not been read
        return ""
    said = " ".join((error.server_message or said).split())
    return f" ({said[:300]})" if said else ""
