"""The argument in which transformers hands on a KV cache: `cache` since 5.24, `past_key_values` before.

A backbone that reads one name while transformers uses the other sees no cache, takes a continuation for the beginning
of a text, and computes it without its branches. So everything that takes or passes a cache asks here, and a cache that
arrives under any other name is an error.
"""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, LlamaModel, Qwen2Model, Qwen3Model, __version__
from transformers.cache_utils import Cache

#: Newest first. transformers takes a name that it has replaced for the new one; newer ones it passes on unread.
_NAMES = ("cache", "past_key_values")


def cache_argument(*functions: Callable[..., Any]) -> str:
    """The name under which every one of `functions` takes a cache.

    Raises:
        ValueError: if no name that is known here serves all of them.
    """
    taken = [set(inspect.signature(function).parameters) for function in functions]
    for name in _NAMES:
        if all(name in parameters for parameters in taken):
            return name
    names = ", ".join(function.__qualname__ for function in functions)
    raise ValueError(
        f"transformers {__version__} is not supported: {names} take no KV cache as {' or '.join(map(repr, _NAMES))}, "
        "without which decoding would lose its branches. Install an older transformers."
    )


#: What transformers calls it: in the models, in `generate()` and in their outputs.
CACHE_ARGUMENT = cache_argument(
    LlamaModel.forward, Qwen2Model.forward, Qwen3Model.forward, GenerationMixin.prepare_inputs_for_generation
)

_ACCEPTED = _NAMES[_NAMES.index(CACHE_ARGUMENT) :]


def take_cache(kwargs: dict[str, Any], past_key_values: Cache | None = None) -> Cache | None:
    """Takes the cache out of the keyword arguments of a call.

    Args:
        kwargs (`dict[str, Any]`): changed in place.
        past_key_values (`Cache`, *optional*): the one that has come by an argument of its own.

    Returns:
        `Cache`, *optional*: the only one there is.

    Raises:
        ValueError: for a cache under a name that transformers would ignore, two of them, or something else than a
            `Cache`.
    """
    found = [past_key_values, *(kwargs.pop(name, None) for name in _ACCEPTED)]
    given = [each for each in found if each is not None]
    if len(given) > 1:
        raise ValueError(f"A KV cache is given twice, as {' and as '.join(map(repr, _ACCEPTED))}. Pass one of them.")
    for name, value in kwargs.items():
        if isinstance(value, Cache) or (name in _NAMES and value is not None):
            raise ValueError(
                f"`{name}` is a {type(value).__name__}, but transformers {__version__} takes a KV cache as "
                f"`{CACHE_ARGUMENT}` and would compute without this one. Pass it as `{CACHE_ARGUMENT}`."
            )
    if given and not isinstance(given[0], Cache):
        raise ValueError(
            f"`past_key_values` is a {type(given[0]).__name__}, which keeps no record of branches. Pass a `Cache` of "
            "transformers, such as `DynamicCache`."
        )
    return given[0] if given else None
