"""Answers held-out problems with both arms of the demo and writes one table.

Every answer is stored as it comes, one JSON line each, so a run that was cut off goes on where it stopped.

`python -m multiverse.hub_card.evaluate --parallel runs/smollm2-parallel --sequential runs/smollm2-sequential`
"""

import json
import math
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse import BranchLayout, MultiverseForCausalLM
from multiverse.hub_card.checkpoint import ADAPTER, load_demo_model
from multiverse.trainer.synthetic import Problem, read_answer, train_and_test
from rich.console import Console
from rich.progress import track
from rich.table import Table


def main(
    parallel: Annotated[Path, typer.Option(help="Adapter of the Multiverse arm.")] = ADAPTER,
    sequential: Annotated[Path | None, typer.Option(help="Adapter of the sequential arm.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems per arm.")] = 200,
    seed: Annotated[int, typer.Option(help="Draws the problems; the demo shows those of seed 0.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/evaluation"),
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=16)] = 1200,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
) -> None:
    """Greedy decoding of the same held-out problems by each arm; prints and stores accuracy, steps and validity."""
    _, held_out = train_and_test(0, problems, seed)
    console = Console()
    arms = {"parallel": parallel} if sequential is None else {"parallel": parallel, "sequential": sequential}
    summary = {}
    for form, adapter in arms.items():
        path = output / f"{form}.jsonl"
        _answer_all(form, adapter, held_out, path, batch_size, max_new_tokens, base)
        summary[form] = summarise(_records(path, held_out))
    if "sequential" in summary:
        steps = summary["parallel"]["sequential_steps"] / summary["sequential"]["sequential_steps"]
        summary["steps_relative_to_sequential_arm"] = round(steps, 4)
    summary["machine"] = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(table(summary))


def summarise(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Shares and means over the answers of one arm, with a 95% Wilson interval for the accuracy."""
    records = list(records)
    count = len(records)
    right = sum(record["right"] for record in records)
    low, high = wilson_interval(right, count)
    degrees = [record["generated_tokens"] / record["sequential_steps"] for record in records]
    return {
        "problems": count,
        "right": right,
        "accuracy": round(right / count, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "valid_structure": round(sum(record["valid"] for record in records) / count, 4),
        "mean_degree_of_parallelism": round(sum(degrees) / count, 4),
        "generated_tokens": round(sum(record["generated_tokens"] for record in records) / count, 2),
        "sequential_steps": round(sum(record["sequential_steps"] for record in records) / count, 2),
    }


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a share (Wilson score)."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"`successes` must lie in [0, trials] with `trials` > 0, got {successes} of {trials}.")
    share, scale = successes / trials, 1 + z * z / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre - spread) / scale, (centre + spread) / scale


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


def _records(path: Path, problems: list[Problem]) -> list[dict[str, Any]]:
    """The answers that are stored already.

    Raises:
        ValueError: if they answer other problems.
    """
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [record for record in map(json.loads, lines) if record["problem"] < len(problems)]
    if any(problems[record["problem"]].question != record["question"] for record in records):
        raise ValueError(f"`output`: {path} holds answers to other problems. Name another folder, or remove it.")
    return records


def _answer_all(
    form: str,
    adapter: Path,
    problems: list[Problem],
    path: Path,
    batch_size: int,
    max_new_tokens: int,
    base: Path | None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {record["problem"] for record in _records(path, problems)}
    left = [number for number in range(len(problems)) if number not in done]
    if not left:
        return
    model, tokenizer = load_demo_model(adapter, base)
    tokenizer.padding_side = "left"
    # Batches of similar length: a batch runs as long as its longest answer.
    left.sort(key=lambda number: len(problems[number].question))
    batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    with path.open("a") as file:
        for batch in track(batches, description=f"{form} arm"):
            for record in _answer(
                form, model, tokenizer, [(number, problems[number]) for number in batch], max_new_tokens
            ):
                file.write(json.dumps(record) + "\n")
            file.flush()


def _answer(
    form: str, model: MultiverseForCausalLM, tokenizer: Any, batch: list[tuple[int, Problem]], max_new_tokens: int
) -> Iterable[dict[str, Any]]:
    prompts = tokenizer.apply_chat_template(
        [problem.messages(form)["prompt"] for _, problem in batch],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    start = time.perf_counter()
    output = model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True)
    seconds = time.perf_counter() - start
    length = prompts["input_ids"].shape[1]
    for row, (number, problem) in enumerate(batch):
        report = output.reports[row]
        made = output.sequences[row, length : length + report.generated_tokens]
        text = tokenizer.decode(made, skip_special_tokens=True)
        problems_found = BranchLayout.from_token_ids(made, model.config.multiverse_token_ids).problems
        answer = read_answer(text)
        yield {
            "problem": number,
            "question": problem.question,
            "answer": answer,
            "expected": problem.answer,
            "right": answer == problem.answer,
            "valid": not problems_found and report.finish_reason == "eos",
            "finish_reason": report.finish_reason,
            "generated_tokens": report.generated_tokens,
            "sequential_steps": report.sequential_steps,
            "paths": len(problem.sums),
            "nested": any(each.parts for each in problem.sums),
            "batch_seconds": round(seconds, 2),
            "text": text,
        }


if __name__ == "__main__":
    typer.run(main)
