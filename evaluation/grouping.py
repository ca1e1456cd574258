"""Records by condition and question, as all statistics take them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from multiverse.evaluation.settings import Condition, EvaluationSettings

Record = Mapping[str, Any]
#: Records by question, those of a question by sample.
Questions = Mapping[str, Sequence[Record]]


def by_condition(records: Iterable[Record]) -> dict[Condition, Questions]:
    """Records by condition and question; questions and samples are sorted, whatever the order of `records`."""
    groups: dict[Condition, dict[str, list[Record]]] = {}
    for record in records:
        groups.setdefault(Condition.of(record), {}).setdefault(record["question"], []).append(record)
    return {
        condition: {
            question: sorted(questions[question], key=lambda record: record["sample"])
            for question in sorted(questions)
        }
        for condition, questions in groups.items()
    }


def asked_conditions(settings: Mapping[str, Any]) -> list[Condition]:
    """The conditions of a run in their order, from its settings as they stand in settings.json."""
    values = {name: value for name, value in settings.items() if name != "schema_version"}
    return EvaluationSettings.from_dict(values).conditions()
