"""Answers held-out problems with both arms of the demo and writes one table.

Every answer is stored as it comes, one JSON line each, so a run that was cut off goes on where it stopped.

`python -m multiverse.hub_card.evaluate --parallel runs/smollm2-parallel --sequential runs/smollm2-sequential`
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from multiverse.hub_card.checkpoint import ADAPTER, load_demo_model
from multiverse.trainer.expression_trees import FAMILIES
from multiverse.trainer.held_out import answer_problems, machine, summarise
from multiverse.trainer.synthetic import train_and_test
from rich.console import Console
from rich.table import Table


def main(
    parallel: Annotated[Path, typer.Option(help="Adapter of the Multiverse arm.")] = ADAPTER,
    sequential: Annotated[Path | None, typer.Option(help="Adapter of the sequential arm.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems per arm.")] = 200,
    family: Annotated[Literal["sums", "trees"], typer.Option(help="Kind of the problems.")] = "sums",
    seed: Annotated[int, typer.Option(help="Draws the problems; the demo shows those of seed 0.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/evaluation"),
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=16)] = 1200,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
) -> None:
    """Greedy decoding of the same held-out problems by each arm; prints and stores accuracy, steps and validity."""
    _, held_out = train_and_test(0, problems, seed, test_options=FAMILIES[family]())
    console = Console()
    arms = {"parallel": parallel} if sequential is None else {"parallel": parallel, "sequential": sequential}
    summary = {}
    for form, adapter in arms.items():
        path = output / f"{form}.jsonl"
        load = partial(load_demo_model, adapter, base)
        summary[form] = summarise(
            answer_problems(held_out, form, path, load, batch_size, max_new_tokens, f"{form} arm")
        )
    if "sequential" in summary:
        steps = summary["parallel"]["sequential_steps"] / summary["sequential"]["sequential_steps"]
        summary["steps_relative_to_sequential_arm"] = round(steps, 4)
    summary["machine"] = machine()
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(table(summary))


def table(summary: dict[str, Any]) -> Table:
    """The summary for people."""
    result = Table(title="SmolLM2-135M, held-out problems, greedy decoding")
    for column in ("arm", "right", "accuracy (95%)", "valid", "tokens", "sequential steps", "degree"):
        result.add_column(column, justify="left" if column == "arm" else "right")
    for form in ("parallel", "sequential"):
        if form in summary:
            arm = summary[form]
            low, high = arm["interval_95"]
            result.add_row(
                form,
                f"{arm['right']}/{arm['problems']}",
                f"{arm['accuracy']:.1%} ({low:.1%} to {high:.1%})",
                f"{arm['valid_structure']:.1%}",
                f"{arm['generated_tokens']:.1f}",
                f"{arm['sequential_steps']:.1f}",
                f"{arm['mean_degree_of_parallelism']:.2f}",
            )
    if "steps_relative_to_sequential_arm" in summary:
        result.caption = f"parallel steps / sequential steps = {summary['steps_relative_to_sequential_arm']:.3f}"
    return result


if __name__ == "__main__":
    typer.run(main)
