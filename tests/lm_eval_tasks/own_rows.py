"""Questions that our own runner has been asked too, as it has asked them, judged by the same judge."""

import json
from pathlib import Path
from typing import Any

import datasets
from multiverse.evaluation.judge import judge


def load(prompts: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The rows.

    Args:
        prompts (`str`): JSON file with a list of `prompt` and `answer`.
    """
    return {"test": datasets.Dataset.from_list(json.loads(Path(prompts).read_text()))}


def judged(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether the answer is right."""
    return {"acc": judge(results[0], doc["answer"], "number").right}
