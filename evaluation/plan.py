"""Which questions are answered side by side, and by which process."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from multiverse.evaluation.settings import Condition
from multiverse.evaluation.tasks import Task


class Row(NamedTuple):
    """One generation that is wanted.

    Attributes:
        question (`int`): number of the question in its task.
        sample (`int`): number of the generation among those of its question.
    """

    question: int
    sample: int


class Batch(NamedTuple):
    """What one call of `generate()` answers.

    Attributes:
        condition (`Condition`): of all its rows.
        number (`int`): among the batches of the condition.
        rows (`tuple[Row, ...]`): what is answered.
    """

    condition: Condition
    number: int
    rows: tuple[Row, ...]


def make_batches(
    conditions: Sequence[Condition], tasks: Mapping[str, Task], samples: Mapping[str, int], batch_size: int
) -> list[Batch]:
    """All batches of a run, a function of its settings and tasks alone: whatever is interrupted, and however many
    processes share them, a generation always stands in the same batch.

    Args:
        conditions (sequence of `Condition`): in order.
        tasks (`Mapping[str, Task]`): by name.
        samples (`Mapping[str, int]`): generations per question, by task.
        batch_size (`int`): most rows of a batch.
    """
    batches = []
    for condition in conditions:
        questions = tasks[condition.task].questions
        # Of similar length: a batch runs as long as its longest answer.
        order = sorted(range(len(questions)), key=lambda number: (len(questions[number].text), number))
        rows = [Row(number, sample) for number in order for sample in range(samples[condition.task])]
        batches += [
            Batch(condition, start // batch_size, tuple(rows[start : start + batch_size]))
            for start in range(0, len(rows), batch_size)
        ]
    return batches


def seed_of(seed: int, task: str, question: str, sample: int) -> int:
    """What a generation draws from: the same in every mode, prompt and budget, so that they are compared in pairs.

    Args:
        seed (`int`): of the run.
        task, question (`str`): name and id.
        sample (`int`): number of the generation.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{question}/{sample}".encode()).digest()[:6], "big")
