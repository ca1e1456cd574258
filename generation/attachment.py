"""What the engine changes on a model while it decodes, and puts back afterwards."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .attention import PATH_ATTENTION
from .packed_linear import packed_forwards


@dataclass
class _Attachment:
    """One model in use: its own attention, its packed layers, and how many calls run on it."""

    implementation: str
    packed: list[nn.Linear]
    users: int = 0


_lock = threading.Lock()
_attached: dict[int, _Attachment] = {}


@contextmanager
def attached(model: PreTrainedModel, pack: bool) -> Iterator[str]:
    """Routes the model's attention through `path_attention_forward`, and its linear layers through packed weights.

    Calls may overlap in several threads; the model is itself again when the last one leaves.

    Args:
        model (`PreTrainedModel`): a Multiverse causal LM.
        pack (`bool`): whether to pack the linear layers; a call that finds the model attached takes it as it is.

    Yields:
        `str`: the model's own attention implementation.
    """
    key = id(model)
    with _lock:
        if key not in _attached:
            forwards = packed_forwards(model) if pack else {}
            _attached[key] = _Attachment(model.config._attn_implementation, list(forwards))
            for module, forward in forwards.items():
                module.forward = forward  # type: ignore[method-assign, assignment]
            model.config._attn_implementation = PATH_ATTENTION
        attachment = _attached[key]
        attachment.users += 1
    try:
        yield attachment.implementation
    finally:
        with _lock:
            attachment.users -= 1
            if not attachment.users:
                del _attached[key]
                model.config._attn_implementation = attachment.implementation
                for module in attachment.packed:
                    del module.forward
