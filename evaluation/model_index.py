"""The results of a run as the Hub reads them from the head of a model card (`model-index`)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from multiverse.evaluation.paper import BENCHMARKS
from multiverse.evaluation.report_tables import arm


def model_index(summary: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as YAML; empty where there are none.

    Args:
        summary, tasks: see `eval_results`.
    """
    results = eval_results(summary, tasks)
    name = Path(str(summary["settings"].get("model") or "checkpoint")).name
    return ModelCardData(model_name=name, eval_results=results).to_yaml() + "\n" if results else ""


def eval_results(summary: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> list[EvalResult]:
    """pass@1 and degree of parallelism of every condition.

    Args:
        summary (`Mapping`): of the run, as in `summary.json`.
        tasks (`Mapping`): facts of every task by its name; a `source` that begins with an id of the Hub names the
            dataset.
    """
    return [
        EvalResult(task_type="text-generation", **_dataset(row["task"], tasks.get(row["task"], {})), **metric)
        for row in summary["conditions"]
        if row["pass_at_1"] is not None
        for metric in _metrics(row)
    ]


def hub_id(name: str | None) -> str:
    """`name` if it can be a repository of the Hub and is no folder."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return ""
    return name if name and "/" in name and not Path(name).exists() else ""


def _metrics(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """pass@1 and degree of parallelism, named by the condition."""
    values = {"pass@1": row["pass_at_1"], "degree_of_parallelism": row["degree_of_parallelism"]}
    return [
        {"metric_type": kind, "metric_name": f"{kind.replace('_', ' ')} ({arm(row)})", "metric_value": round(value, 4)}
        for kind, value in values.items()
        if value is not None
    ]


def _dataset(task: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    parts = str(facts.get("source", "")).split(", ")
    named = dict(part.split(" ", 1) for part in parts[1:] if part.startswith(("split ", "revision ")))
    on_hub = hub_id(parts[0])
    found = {"dataset_type": on_hub or re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-") or "questions"}
    found["dataset_name"] = BENCHMARKS.get(task, task)
    if on_hub:
        found |= {f"dataset_{name}": value for name, value in named.items()}
    return found
