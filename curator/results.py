"""What a store's records come to: rows of the dataset, and rejects with their story."""

from collections.abc import Iterator
from typing import Any

from multiverse.curator.checks import CONTENT_BOUND, PATH_BOUND
from multiverse.curator.output import FinishedRecord, RejectedRecord
from multiverse.curator.rendering import render, sequential_twin
from multiverse.curator.store import Record, Store
from multiverse.version import __version__


def finished_records(store: Store) -> Iterator[FinishedRecord]:
    """The finished records in input order, each with its text and where it comes from.

    Args:
        store (`Store`): open, for reading at least.
    """
    settings = store.settings()
    for record in store.records("finished"):
        parallel = render(record.draft)
        provenance = _provenance(record, settings)
        yield FinishedRecord(record.chain, parallel, sequential_twin(parallel), provenance, record.draft)


def rejected_records(store: Store) -> Iterator[RejectedRecord]:
    """The rejected records in input order, with every failure and what the model had answered before it.

    Args:
        store (`Store`): open, for reading at least.
    """
    for record in store.records("rejected"):
        last: dict[str, Any] = dict(record.history[-1]) if record.history else {}
        answers: dict[tuple[str, int], list[str]] = {}
        for answer in store.answers_of(record.position):
            answers.setdefault((answer["stage"], answer["attempt"]), []).append(answer["text"])
        story = [
            {**event, "answers": answers.get((str(event["stage"]), int(event["attempt"])), [])}
            for event in record.history
        ]
        parallel = render(record.draft) if "branches" in record.draft.done else None
        yield RejectedRecord(
            record.chain, str(record.stage), str(last.get("reason", "")), story, record.draft, parallel
        )


def _provenance(record: Record, settings: dict[str, Any]) -> dict[str, Any]:
    stages = list(settings["order"])
    asked = {stage: settings[f"stages.{stage}.model"] for stage in stages if stage != "structure"}
    bounds = {"content_distance": CONTENT_BOUND, "path_distance": settings.get("checks.path_bound", PATH_BOUND)}
    return {
        "curator": __version__,
        "models": asked,
        "prompts": {stage: settings[f"stages.{stage}.version"] for stage in asked},
        "attempts": dict(record.attempts),
        "measures": dict(record.draft.measures),
        "bounds": bounds,
        "kinds": [block.kind for node in record.draft.structure for block in node.blocks()],
    }
