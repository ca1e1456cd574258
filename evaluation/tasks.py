r"""The tasks of an evaluation: what is asked, and what is right.

Built in are the four benchmarks of the paper (arXiv 2506.09991, section 6.1), read from the Hub or from a file with
the same columns, and this project's own families of problems, which need neither. Any other dataset with a question
and an answer in each row is a task too:

```python
>>> from multiverse.evaluation.tasks import TaskData, load_task
>>> load_task("sums", limit=50)
>>> load_task("aime24", TaskData("aime24.jsonl"))
>>> load_task("gsm8k", TaskData("openai/gsm8k", config="main", answer_format="hashes"))
>>> load_task("mmlu", TaskData("cais/mmlu", config="college_physics", choices="choices"))
```

No question of a benchmark is kept here: some ask not to be published, and all would end up in training data.
"""

import hashlib
import json
from dataclasses import astuple, dataclass

from multiverse.evaluation.task_rows import Question, TaskData
from multiverse.evaluation.task_sources import DatasetRows, ProblemFamily, TaskSource


@dataclass(frozen=True)
class Task:
    """Questions, and where they are from.

    Attributes:
        name (`str`): by which settings and tables call it.
        questions (`tuple[Question, ...]`): in a fixed order.
        source (`str`): a Hub id with its revision, a file with its hash, or a family with its seed.
        samples (`int`): generations per question that are usual with sampling.
    """

    name: str
    questions: tuple[Question, ...]
    source: str
    samples: int = 1

    @property
    def sha256(self) -> str:
        """Of the questions in their order, with everything that they consist of."""
        content = json.dumps([astuple(question) for question in self.questions], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


#: The built-in tasks. AIME is sampled 8 times, as 30 questions answered once say little. Its answers are whole numbers
#: from 0 to 999; leading zeros and a degree sign, which some copies have, are taken off. GPQA is gated. Its right
#: option has a column of its own, so the options are shuffled.
TASKS: dict[str, TaskSource] = {
    "aime24": DatasetRows(
        TaskData("HuggingFaceH4/aime_2024", question="problem", answer_format="integer", split="train"), samples=8
    ),
    "aime25": DatasetRows(
        TaskData("yentinglin/aime_2025", question="problem", answer_format="integer", split="train", config="default"),
        samples=8,
    ),
    "math500": DatasetRows(TaskData("HuggingFaceH4/MATH-500", question="problem", id="unique_id")),
    "gpqa_diamond": DatasetRows(
        TaskData(
            "Idavidrein/gpqa",
            question="Question",
            answer="Correct Answer",
            choices=("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            shuffle=True,
            id="Record ID",
            split="train",
            config="gpqa_diamond",
        )
    ),
    "sums": ProblemFamily("sums"),
    "trees": ProblemFamily("trees"),
}


#: Tasks whose makers ask not to publish their questions; a generation may repeat one.
UNPUBLISHED = frozenset({"gpqa_diamond"})


def load_task(name: str, data: TaskData | None = None, limit: int | None = None, seed: int = 1) -> Task:
    """Reads or draws the questions of a task.

    Args:
        name (`str`): one of `TASKS`, or the name of a dataset of your own.
        data (`TaskData`, *optional*): the dataset; for a built-in task whatever is to differ, such as a local file.
        limit (`int`, *optional*): only the first questions. They are the same whatever the limit.
        seed (`int`): draws the problems of a family, and orders options that are shuffled.

    Raises:
        ValueError: if there is no such task, or its questions cannot be read.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}. Give a positive number, or None for all questions.")
    if name not in TASKS and data is None:
        raise ValueError(
            f"`name`: there is no task {name!r}. There are {', '.join(TASKS)}; for a dataset of your own, pass `data`."
        )
    source = TASKS.get(name, DatasetRows())
    questions, origin = source.read(name, data, limit, seed)
    return Task(name, questions, origin, source.samples)
