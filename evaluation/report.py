"""Writes the report of a run: a page, a Markdown file, and metadata for the Hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from multiverse.evaluation.paper import BENCHMARKS
from multiverse.evaluation.report_page import render_markdown, render_page
from multiverse.evaluation.report_tables import arm
from multiverse.evaluation.run_folder import SCHEMA_VERSION, write_atomically
from multiverse.hub_card.model_card import hub_id

PAGE, MARKDOWN, MODEL_INDEX = "report.html", "report.md", "model_index.yaml"


def write_report(
    folder: str | Path,
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    published_prompts: Mapping[str, Mapping[str, Any]],
) -> list[Path]:
    """Writes `report.html`, `report.md` and `model_index.yaml`, each as a whole or not at all.

    The same input gives the same bytes; what is measured in seconds stands apart, see `report_page.without_times`.

    Args:
        folder (`str` or `Path`): where they go; it must exist.
        summary (`Mapping`): of the run, as in `summary.json`.
        records (sequence of `Mapping`): all generations, in the order of the run.
        tasks (`Mapping`): facts of every task by its name, as in `tasks.json`. A task may have `texts`, its questions
            by id, which are then shown with the generations; leave them out where they must not be published.
        published_prompts (`Mapping`): by task and form, `messages` and `text`, see `prompts.published_prompts`.

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError: if the summary is of another version, or has no conditions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` ({folder}) is no folder. Name that of a run.")
    version = summary.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"`summary` has the schema version {version!r}, but this program reads {SCHEMA_VERSION}. Make it anew."
        )
    if not summary.get("conditions"):
        raise ValueError("`summary` has no conditions. Make it of a run with at least one generation.")
    texts = {
        PAGE: render_page(summary, records, tasks, published_prompts),
        MARKDOWN: render_markdown(summary, tasks, published_prompts),
        MODEL_INDEX: model_index(summary, tasks),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def model_index(summary: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as YAML for the head of a model card, where the Hub reads them (`model-index`).

    Args:
        summary (`Mapping`): of the run.
        tasks (`Mapping`): facts of every task by its name; a `source` that begins with an id of the Hub names the
            dataset.
    """
    results = [
        EvalResult(task_type="text-generation", **_dataset(row["task"], tasks.get(row["task"], {})), **metric)
        for row in summary["conditions"]
        if row["pass_at_1"] is not None
        for metric in _metrics(row)
    ]
    name = Path(str(summary["settings"].get("model") or "checkpoint")).name
    if not results:
        return ""
    return ModelCardData(model_name=name, eval_results=results).to_yaml() + "\n"


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
