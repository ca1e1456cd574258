"""What the paper has published, word for word and digit for digit, to stand beside a checkpoint's own values.

Yang et al., *Multiverse: Your Language Models Secretly Decide How to Parallelize and Merge Generation*, arXiv
2506.09991. The same Table 2 is at multiverse4fm.github.io. Curves of the figures were published as pictures only, so
nothing is drawn from them here.
"""

from typing import NamedTuple

SOURCE = "arXiv 2506.09991, Table 2, as also published at multiverse4fm.github.io"

#: Names of the paper's benchmarks, by the names of the tasks here.
BENCHMARKS = {"aime24": "AIME24", "aime25": "AIME25", "math500": "MATH500", "gpqa_diamond": "GPQA-Diamond"}


class Published(NamedTuple):
    """One cell of Table 2.

    Attributes:
        pass_at_1 (`float`): in percent.
        parallelism (`float`): "# parallel", generated tokens per sequential step.
    """

    pass_at_1: float
    parallelism: float


def _row(*pass_at_1: float, parallelism: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> dict[str, Published]:
    return {
        task: Published(*cell) for task, cell in zip(BENCHMARKS, zip(pass_at_1, parallelism, strict=True), strict=True)
    }


#: Table 2: models, and their values by task.
TABLE_2: dict[str, dict[str, Published]] = {
    "s1-32B": _row(35.4, 25.8, 88.6, 48.0),
    "s1.1-32B": _row(52.9, 41.7, 93.4, 62.6),
    "Qwen2.5-32B-Instruct": _row(15.8, 10.4, 80.4, 47.0),
    "Autoregressive-32B": _row(54.6, 45.0, 92.8, 61.6),
    # Prompted without "in parallel".
    "Multiverse-32B-zero": _row(52.1, 44.2, 92.4, 63.6, parallelism=(1.04, 1.05, 1.12, 1.17)),
    "Multiverse-32B": _row(53.8, 45.8, 91.8, 60.7, parallelism=(1.18, 1.15, 1.15, 1.17)),
}

FIGURE_7 = (
    "Published (arXiv 2506.09991, Figure 7): with context lengths from 1K to 4K, Multiverse-32B is better than "
    "autoregressive models by 1.87% on average at equal context length."
)
FIGURE_8 = (
    "Published (arXiv 2506.09991, Figure 8): Multiverse-32B is up to 2 times as fast, with batch sizes from 1 to 128."
)
