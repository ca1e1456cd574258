"""What a model answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text (`str`): what the model wrote; empty where it wrote nothing.
        finish_reason (`str`): `"stop"`, or `"length"` for an answer cut off at `max_tokens`; or what else is said.
        prompt_tokens (`int`), completion_tokens (`int`): as counted by the endpoint.
        model (`str`): as named by the endpoint.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    model: str


class ModelError(Exception):
    """A call that has no answer. No message holds a key.

    Args:
        model (`str`): the model that was asked.
        message (`str`): what happened, with the remedy.
    """

    def __init__(self, model: str, message: str) -> None:
        super().__init__(message)
        self.model = model


class CallRefused(ModelError):
    """A call that would be refused again.

    Args:
        model (`str`): the model that was asked.
        message (`str`): what happened, with the remedy.
        for_all (`bool`): whether every other call to the model would be refused as well.
    """

    def __init__(self, model: str, message: str, for_all: bool = False) -> None:
        super().__init__(model, message)
        self.for_all = for_all


class CallUnanswered(ModelError):
    """A call that may well be answered later."""
