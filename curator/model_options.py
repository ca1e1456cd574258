"""Which model a stage asks, and how: options that may be written in a YAML file. Keys never stand in them."""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from multiverse.curator.records import STAGES

#: The entry of an options file that holds for every stage.
DEFAULT = "default"
_NUMBERS = ("temperature", "max_tokens", "seed", "timeout", "tries", "prompt_price", "completion_price")
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
#: Fields of a request that the curator writes itself, or relies on.
_OWN_FIELDS = ("model", "messages", "stream", "n", "temperature", "seed", *_TOKEN_LIMITS)
_SECRET_NAME = re.compile(r"(api[-_]?key|authorization|secret|password|access[-_]?token)$", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
#: Whose key is sent to which hosts without being asked for.
_KEY_OF_HOST = {"huggingface.co": "HF_TOKEN", "huggingface.cloud": "HF_TOKEN", "openai.com": "OPENAI_API_KEY"}


@dataclass(frozen=True)
class ModelOptions:
    """A model and how it is asked.

    Args:
        model (`str`): its id as the endpoint knows it; with `local`, a folder or an id on the Hub.
        base_url (`str`, *optional*): an OpenAI-compatible endpoint, such as `"http://localhost:8000/v1"`.
        provider (`str`, *optional*): the Inference Provider where there is no `base_url`; chosen by Hugging Face
            where it is not given.
        local (`bool`): whether the model is loaded and run in this process, by transformers.
        api_key_variable (`str`, *optional*): NAME of the environment variable that holds the key. Without it,
            Hugging Face's hosts and Inference Providers are sent `HF_TOKEN`, OpenAI's hosts `OPENAI_API_KEY`, and all
            others no key at all.
        temperature (`float`, *optional*): 0 takes the likeliest token; `None` leaves it to the endpoint.
        max_tokens (`int`): of an answer; the spending cap reckons with as many.
        token_limit_field (`str`): what `max_tokens` is called in the request, `"max_tokens"` or
            `"max_completion_tokens"`.
        seed (`int`, *optional*): of the first attempt at a stage; each further one adds 1.
        timeout (`float`): seconds that one try may take.
        tries (`int`): how often a call is sent before it counts as unanswered.
        extra_body (`Mapping`): further fields of the request, or arguments of `generate()` with `local`.
        prompt_price (`float`): of a million tokens, in any currency.
        completion_price (`float`): likewise.

    Raises:
        ValueError: if a value cannot be used, or could hold a secret.
    """

    model: str
    base_url: str | None = None
    provider: str | None = None
    local: bool = False
    api_key_variable: str | None = None
    temperature: float | None = 0.0
    max_tokens: int = 8192
    token_limit_field: str = "max_tokens"
    seed: int | None = None
    timeout: float = 600.0
    tries: int = 6
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    prompt_price: float = 0.0
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"`model` must be the name of a model, got {self.model!r}.")
        if (self.base_url is not None) + (self.provider is not None) + bool(self.local) > 1:
            raise ValueError("`base_url`, `provider` and `local` exclude one another. Give at most one of them.")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is None and name in ("temperature", "seed"):
                continue
            whole = name in ("max_tokens", "seed", "tries")
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ValueError(f"`{name}` must be a{' whole' if whole else ''} number, got {value!r}.")
            if not math.isfinite(value) or value < 0 or (value == 0 and name in ("max_tokens", "timeout", "tries")):
                raise ValueError(f"`{name}` is out of range, got {value!r}. Give a positive number.")
        if self.token_limit_field not in _TOKEN_LIMITS:
            raise ValueError(f"`token_limit_field` must be one of {_TOKEN_LIMITS}, got {self.token_limit_field!r}.")
        self._refuse_secrets()
        if taken := sorted(set(self.extra_body) & set(_OWN_FIELDS)):
            raise ValueError(
                f"`extra_body` holds {taken[0]!r}, which is an option of its own or fixed. Remove it there."
            )
        try:
            json.dumps(dict(self.extra_body))
        except (TypeError, ValueError):
            raise ValueError("`extra_body` must hold what JSON can hold: text, numbers, lists, mappings.") from None

    def _refuse_secrets(self) -> None:
        """What is given here is stored and logged, so these messages repeat no value."""
        if self.api_key_variable is not None and not _VARIABLE.fullmatch(self.api_key_variable):
            raise ValueError(
                "`api_key_variable` must be the NAME of an environment variable, in capitals, such as "
                "'MY_PROVIDER_KEY'. Put the key itself into that variable."
            )
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("`base_url` must start with http:// or https:// and a host.")
            if parts.username or parts.password or parts.query:
                raise ValueError(
                    "`base_url` may hold neither a user name nor a password nor a query. Name the environment "
                    "variable of the key in `api_key_variable`."
                )
        if not isinstance(self.extra_body, Mapping) or not all(isinstance(name, str) for name in self.extra_body):
            raise ValueError("`extra_body` must be a mapping from names to values.")
        if secret := _secret_names(self.extra_body):
            raise ValueError(
                f"`extra_body` has the field {secret[0]!r}, and everything in it is stored. Keys come from the "
                "environment alone: name the variable in `api_key_variable`."
            )

    @property
    def endpoint(self) -> str:
        """Where calls go, in words."""
        if self.local:
            return "this process"
        return self.base_url or f"Inference Provider {self.provider or 'auto'}"

    def identity(self) -> dict[str, Any]:
        """The options that an answer depends on. Where the model runs, how long it may take and what it costs do not
        count."""
        names = ("model", "temperature", "max_tokens", "seed", "extra_body")
        return {name: dict(value) if isinstance(value := getattr(self, name), Mapping) else value for name in names}

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of a call."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6

    def find_api_key(self) -> str | None:
        """The key from the environment; `None` where none is to be sent.

        Raises:
            ValueError: if a variable is needed and not set. The message names it.
        """
        if self.local:
            return None
        name = self.api_key_variable
        if name is None and self.base_url is None:
            name = "HF_TOKEN"
        if name is None:
            host = urlsplit(self.base_url or "").hostname or ""
            owners = (key for suffix, key in _KEY_OF_HOST.items() if host == suffix or host.endswith(f".{suffix}"))
            name = next(owners, None)
        if name is None:
            return None
        if not (key := os.environ.get(name, "").strip()):
            raise ValueError(
                f"The environment variable {name} is not set, and {self.model!r} at {self.endpoint} needs a key. "
                "Set it, or name another in `api_key_variable`."
            )
        return key


@dataclass(frozen=True)
class StageOptions:
    """The options of every stage.

    Args:
        default (`ModelOptions`): for the stages that have none of their own.
        stages (`Mapping[str, ModelOptions]`): by name of the stage.
    """

    default: ModelOptions
    stages: Mapping[str, ModelOptions] = field(default_factory=dict)

    def of(self, stage: str) -> ModelOptions:
        """The options of a stage."""
        return self.stages.get(stage, self.default)

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> "StageOptions":
        """Reads options by stage.

        Args:
            source (`str`, `Path` or `Mapping`): a YAML file or its content: `default`, and names of stages, each with
                options of `ModelOptions`. A stage takes from `default` what it does not set itself.

        Raises:
            ValueError: if there is no `default`, or a stage, an option or a value is unknown.
        """
        where = "the options"
        if not isinstance(source, Mapping):
            where = str(source)
            try:
                content = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                mark = getattr(error, "problem_mark", None)
                place = f" in line {mark.line + 1}" if mark is not None else ""
                # Not the error's own text: it quotes the file.
                raise ValueError(f"{where} is not YAML{place}.") from None
            source = content if isinstance(content, Mapping) else {}
        if not isinstance(source.get(DEFAULT), Mapping):
            raise ValueError(f"{where} must have an entry `default` with at least `model`.")
        known = [each.name for each in fields(ModelOptions)]
        found = {}
        for stage, given in source.items():
            if stage not in (DEFAULT, *STAGES):
                raise ValueError(f"{where}: {stage!r} is no stage. There are `default`, {', '.join(STAGES)}.")
            if not isinstance(given, Mapping):
                raise ValueError(f"{where}: `{stage}` must be a mapping of options.")
            for name in given:
                if name not in known:
                    close = difflib.get_close_matches(str(name), known, 1)
                    hint = f" Did you mean `{close[0]}`?" if close else f" There are {', '.join(known)}."
                    raise ValueError(f"{where}: `{stage}` has no option {name!r}.{hint}")
            try:
                found[stage] = ModelOptions(**{**source[DEFAULT], **given})
            except TypeError:
                raise ValueError(f"{where}: `{stage}` lacks `model`.") from None
            except ValueError as error:
                raise ValueError(f"{where}, `{stage}`: {error}") from None
        return cls(found.pop(DEFAULT), found)


def _secret_names(value: Any) -> list[str]:
    """Names in `value`, at any depth, that a secret would have."""
    if isinstance(value, Mapping):
        own = [str(name) for name in value if _SECRET_NAME.search(str(name))]
        return own + [name for each in value.values() for name in _secret_names(each)]
    return [name for each in value for name in _secret_names(each)] if isinstance(value, (list, tuple)) else []
