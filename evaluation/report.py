"""Writes the report of a run: a page, a Markdown file, and metadata for the Hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multiverse.evaluation.model_index import model_index
from multiverse.evaluation.report_page import render_markdown, render_page
from multiverse.evaluation.run_folder import check_summary, write_atomically

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
    check_summary(summary, "summary")
    texts = {
        PAGE: render_page(summary, records, tasks, published_prompts),
        MARKDOWN: render_markdown(summary, tasks, published_prompts),
        MODEL_INDEX: model_index(summary, tasks),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]
