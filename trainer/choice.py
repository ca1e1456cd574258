"""Problems whose form is left to the model: what reinforcement learning has something to choose from.

The system message says nothing about parallel or sequential. A model that has seen both forms under it
(`write_mixture`) sometimes forks and sometimes does not, and rewards can tell it which to prefer.

```bash
# what a supervised warm start is trained on, for `multiverse.trainer.sft --dataset_name runs/choice-data`
python -m multiverse.trainer.choice runs/choice-data
```
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer
from multiverse.trainer.synthetic import Problem, ProblemOptions, train_and_test
from transformers import PreTrainedTokenizerBase

FREE_PROMPT = "Think it through."

#: Long enough that a fork saves half of the steps, short enough for a processor.
CHOICE_PROBLEMS = ProblemOptions(paths=(3, 5), terms=(5, 8), nested=0.0)


def free_messages(problem: Problem, form: str) -> dict[str, list[dict[str, str]]]:
    """A row of a prompt-completion dataset with one form of the answer, under the prompt that asks for neither.

    Args:
        problem (`Problem`): question and solutions.
        form (`str`): `"parallel"` or `"sequential"`.
    """
    row = problem.messages(form)
    row["prompt"][0]["content"] = FREE_PROMPT
    return row


def rollout_row(problem: Problem, prompt: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row for `GRPOTrainer` with what the rewards need.

    Args:
        problem (`Problem`): question and solutions.
        prompt (`str`): `"free"`, or the form that is asked for, `"parallel"` or `"sequential"`.
        tokenizer (`PreTrainedTokenizerBase`): counts the tokens of the sequential solution.

    Returns:
        `dict`: `prompt`, `answer`, `reference_steps` (tokens of the sequential solution and its end of sequence) and,
        where a form is asked for, `wants_block`.

    Raises:
        ValueError: if there is no such prompt.
    """
    if prompt not in ("free", "parallel", "sequential"):
        raise ValueError(f"`prompt` must be 'free', 'parallel' or 'sequential', got {prompt!r}.")
    solution = tokenizer.encode(problem.sequential(), add_special_tokens=False)
    row: dict[str, Any] = {"answer": problem.answer, "reference_steps": len(solution) + 1}
    if prompt == "free":
        return {"prompt": free_messages(problem, "sequential")["prompt"], **row}
    return {"prompt": problem.messages(prompt)["prompt"], **row, "wants_block": prompt == "parallel"}


def mixture(problems: list[Problem], parallel_share: float, seed: int = 0) -> list[dict[str, Any]]:
    """Both forms under one prompt: `parallel_share` of the problems, drawn by `seed`, in the Multiverse form.

    Raises:
        ValueError: if the share lies outside [0, 1].
    """
    if not 0 <= parallel_share <= 1:
        raise ValueError(f"`parallel_share` is a share between 0 and 1, got {parallel_share}.")
    count = round(parallel_share * len(problems))
    chosen = set(random.Random(seed).sample(range(len(problems)), count))
    return [
        free_messages(problem, "parallel" if number in chosen else "sequential")
        for number, problem in enumerate(problems)
    ]


def write_mixture(
    folder: Annotated[Path, typer.Argument(help="Folder of the dataset, for `--dataset_name`.")],
    samples: Annotated[int, typer.Option(min=1, help="Problems.")] = 640,
    parallel_share: Annotated[float, typer.Option(help="Share of them in the Multiverse form.")] = 0.5,
    held_out: Annotated[int, typer.Option(min=1, help="Problems kept out, those of the evaluation.")] = 240,
    seed: Annotated[int, typer.Option(help="Draws the problems and their forms.")] = 0,
) -> None:
    """Writes `train.jsonl` with a mixture of both forms; no problem of the evaluation is in it."""
    problems, _ = train_and_test(samples, held_out, seed, CHOICE_PROBLEMS, CHOICE_PROBLEMS)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in mixture(problems, parallel_share, seed)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{samples} problems, {parallel_share:.0%} in the Multiverse form, in {folder}")


if __name__ == "__main__":
    typer.run(write_mixture)
