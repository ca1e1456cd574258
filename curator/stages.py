"""The stages in their order, and what one is."""

from collections.abc import Mapping
from typing import Protocol

from multiverse.curator.outline_stages import Groups, Steps, Structure, Substeps
from multiverse.curator.records import Call, Chain, Draft
from multiverse.curator.text_stages import Branches, Refill


class StageProtocol(Protocol):
    """A stage: what it asks, and what it makes of the answers.

    Attributes:
        name (`str`): one of `STAGES`.
        version (`str`): of its prompt.
    """

    name: str
    version: str

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        """What is to be asked now; the calls are independent of each other.

        Args:
            chain (`Chain`): the source.
            draft (`Draft`): after all earlier stages.
            complaint (`str`, *optional*): why the last answers could not be used; it is shown to the model.
        """

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        """The draft with what the answers bring. Its `done` has the stage's name once nothing is left to ask.

        Args:
            chain (`Chain`): the source.
            draft (`Draft`): the one that `calls` was given.
            answers (`Mapping[str, str]`): by the key of each call; empty where there was none.

        Raises:
            StageFailure: if an answer cannot be used.
        """


def make_stages() -> tuple[StageProtocol, ...]:
    """All stages, in the order of `STAGES`."""
    return (Steps(), Substeps(), Groups(), Structure(), Refill(), Branches())
