"""How long whole batches take, in parallel and one path at a time (paper, section 6.3 and figure 8)."""

import time
from collections.abc import Iterable, Mapping
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

from multiverse.evaluation.peak_memory import PeakMemory
from multiverse.evaluation.prompts import chat_messages
from multiverse.evaluation.settings import EvaluationSettings
from multiverse.evaluation.tasks import Task

if TYPE_CHECKING:
    from multiverse.evaluation.answering import Answerer


class SpeedCase(NamedTuple):
    """Calls that are timed one after the other, one in each mode.

    Attributes:
        task, prompt (`str`): whose questions are asked, and for which form.
        modes (`tuple[str, ...]`): in the order in which they are run.
        batch_size (`int`): rows of a call, the first questions of the task; again from the first where it has fewer.
        length (`int`, *optional*): `max_new_tokens`; `None` for the run's.
        repeat (`int`): number of the repetition.
    """

    task: str
    prompt: str
    modes: tuple[str, ...]
    batch_size: int
    length: int | None
    repeat: int


def make_speed_cases(settings: EvaluationSettings, done: Iterable[Mapping[str, Any]]) -> list[SpeedCase]:
    """The timed calls that are asked for and not `done` (records of the run); odd repetitions turn the modes round, so
    that neither is always the first."""
    known = {tuple(record[name] for name in ("task", "prompt", "batch_size", "length", "repeat")) for record in done}
    lengths: tuple[int | None, ...] = settings.lengths or (None,)
    sizes = settings.batch_sizes or ((1,) if settings.lengths else ())
    return [
        SpeedCase(task, prompt, settings.modes[:: -1 if repeat % 2 else 1], size, length, repeat)
        for task in settings.tasks
        for prompt in settings.prompts
        for size in sizes
        for length in lengths
        for repeat in range(settings.repeats)
        if (task, prompt, size, length, repeat) not in known
    ]


def measure_speed(answerer: "Answerer", task: Task, case: SpeedCase) -> list[dict[str, Any]]:
    """Greedy decoding of the case's batch in each mode, timed.

    Returns:
        `list[dict]`: a record for each mode.
    """
    questions = islice(cycle(task.questions), case.batch_size)
    messages = [chat_messages(question, case.prompt, answerer.settings.instructions) for question in questions]
    prompts = answerer.prompts(messages)
    if case.repeat == 0:
        # What is set up by the first call of its shape is not what is measured.
        answerer.generate(prompts, case.modes[0], max_new_tokens=16)
    records = []
    for mode in case.modes:
        with PeakMemory(answerer.model.device) as peak:
            start = time.perf_counter()
            output = answerer.generate(prompts, mode, max_new_tokens=case.length)
            seconds = time.perf_counter() - start
        made = [answerer.counts(output, row, prompts) for row in range(case.batch_size)]
        tokens, steps = (sum(each) for each in zip(*made, strict=True))
        records.append(
            {
                "task": case.task,
                "prompt": case.prompt,
                "mode": mode,
                "batch_size": case.batch_size,
                "length": case.length,
                "repeat": case.repeat,
                "generated_tokens": tokens,
                "sequential_steps": max(row[1] for row in made),
                "degree_of_parallelism": round(tokens / max(steps, 1), 6),
                "seconds": round(seconds, 6),
                "prefill_seconds": _prefill(output),
                "peak_memory_bytes": peak.bytes,
            }
        )
    return records


def _prefill(output: Any) -> float | None:
    reports = getattr(output, "reports", None)
    return None if reports is None else round(max(report.seconds["prefill"] for report in reports), 6)
