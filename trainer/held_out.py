"""Answers held-out problems by greedy decoding, keeps every answer as it comes, and sums the answers up."""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from multiverse import BranchLayout, MultiverseForCausalLM
from multiverse.evaluation.intervals import wilson_interval
from multiverse.trainer.synthetic import Problem, read_answer
from rich.progress import track
from transformers import PreTrainedTokenizerBase


def answer_problems(
    problems: list[Problem],
    form: str,
    path: Path,
    load: Callable[[], tuple[MultiverseForCausalLM, PreTrainedTokenizerBase]],
    batch_size: int = 8,
    max_new_tokens: int = 1200,
    description: str = "answers",
) -> list[dict[str, Any]]:
    """Answers what `path` does not hold yet, one JSON line each, so a run that was cut off goes on where it stopped.

    Args:
        problems (`list[Problem]`): what to answer; a record names them by number.
        form (`str`): whose prompt is used, `"parallel"` or `"sequential"`.
        path (`Path`): file of the records.
        load (`Callable`): makes model and tokenizer; not called where everything is answered.
        batch_size (`int`): problems answered side by side.
        max_new_tokens (`int`): longest answer, in tokens of all branches.
        description (`str`): of the progress bar.

    Returns:
        `list[dict]`: all records, in the order of the problems.

    Raises:
        ValueError: if `path` holds answers to other problems.
    """
    done = {record["problem"] for record in stored_answers(path, problems)}
    left = [number for number in range(len(problems)) if number not in done]
    if left:
        model, tokenizer = load()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Batches of similar length: a batch runs as long as its longest answer.
        left.sort(key=lambda number: len(problems[number].question))
        batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
        with path.open("a") as file:
            # A line that a kill has cut off would swallow the next one.
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            for batch in track(batches, description=description):
                numbered = [(number, problems[number]) for number in batch]
                for record in _answer(form, model, tokenizer, numbered, max_new_tokens):
                    file.write(json.dumps(record) + "\n")
                file.flush()
    return stored_answers(path, problems)


def stored_answers(path: Path, problems: list[Problem]) -> list[dict[str, Any]]:
    """The answers that are stored already, in the order of the problems.

    Raises:
        ValueError: if they answer other problems.
    """
    # What follows the last end of line was cut off.
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
    records = [record for record in map(json.loads, lines) if record["problem"] < len(problems)]
    if any(problems[record["problem"]].question != record["question"] for record in records):
        raise ValueError(f"`path`: {path} holds answers to other problems. Name another folder, or remove it.")
    return sorted(records, key=lambda record: record["problem"])


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


def _answer(
    form: str,
    model: MultiverseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[tuple[int, Problem]],
    max_new_tokens: int,
) -> Iterable[dict[str, Any]]:
    prompts: Any = tokenizer.apply_chat_template(
        [problem.messages(form)["prompt"] for _, problem in batch],
        add_generation_prompt=True,
        padding=True,
        # `padding_side` itself would be taken for a variable of the template, and ignored.
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )
    start = time.perf_counter()
    output: Any = model.generate(
        **prompts, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
    )
    seconds = time.perf_counter() - start
    length = prompts["input_ids"].shape[1]
    for row, (number, problem) in enumerate(batch):
        report = output.reports[row]
        made = output.sequences[row, length : length + report.generated_tokens]
        text = tokenizer.decode(made, skip_special_tokens=True)
        problems_found = BranchLayout.from_token_ids(made, model.config.multiverse_token_ids).problems
        answer = read_answer(text)  # type: ignore[arg-type]  # one row is one text
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
