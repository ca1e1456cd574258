"""What a model does where the form is left to it: answers to held-out problems, and the curves of a run.

```bash
python -m multiverse.trainer.choice_results answer runs/smollm2-choice runs/choice-before.json
python -m multiverse.trainer.choice_results draw runs/smollm2-grpo runs/grpo.svg
```
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse.hub_card.checkpoint import load_demo_model
from multiverse.layout import BranchLayout
from multiverse.trainer.choice import CHOICE_PROBLEMS, free_messages
from multiverse.trainer.held_out import summarise, wilson_interval
from multiverse.trainer.synthetic import Problem, read_answer, train_and_test

app = typer.Typer(help=__doc__, no_args_is_help=True)

#: Entries of the trainer's log that are drawn, with their labels.
CURVES = {
    "fork_share": "share of completions that fork",
    "sequential_steps": "sequential steps",
    "degree_of_parallelism": "degree of parallelism",
    "rewards/answer/mean": "share of right answers",
}


@app.command()
def answer(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Argument(help="File of the results.")],
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 240,
    seed: Annotated[int, typer.Option(help="Draws the problems, as in training, and what is sampled.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=16)] = 600,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model.")] = None,
) -> None:
    """Answers held-out problems twice, greedily and by sampling, and writes accuracy, steps and share of forks."""
    _, held_out = train_and_test(0, problems, seed, test_options=CHOICE_PROBLEMS)
    model, tokenizer = load_demo_model(adapter, base)
    # Batches of similar length: a batch runs as long as its longest answer.
    held_out.sort(key=lambda problem: len(problem.question))
    results = {}
    for name, sampled in (("greedy", False), ("sampled", True)):
        records: list[dict[str, Any]] = []
        for start in range(0, problems, batch_size):
            options = {"do_sample": sampled, "seed": seed + start, "max_new_tokens": max_new_tokens}
            options |= {"top_k": 0} if sampled else {}
            records += answers(model, tokenizer, held_out[start : start + batch_size], **options)
        results[name] = {**summarise(records), **by_form(records)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"adapter": str(adapter), "threads": torch.get_num_threads(), **results}, indent=2))
    print(json.dumps(results, indent=2))


def answers(model: Any, tokenizer: Any, problems: list[Problem], **options: Any) -> Iterator[dict[str, Any]]:
    """One record per problem, with its completion under the prompt that asks for no form."""
    prompts = tokenizer.apply_chat_template(
        [free_messages(problem, "sequential")["prompt"] for problem in problems],
        add_generation_prompt=True,
        padding=True,
        # `padding_side` itself would be taken for a variable of the template, and ignored.
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompts, return_dict_in_generate=True, **options)
    length = prompts["input_ids"].shape[1]
    for row, (problem, report) in enumerate(zip(problems, output.reports, strict=True)):
        made = output.sequences[row, length : length + report.generated_tokens]
        found = BranchLayout.from_token_ids(made, model.config.multiverse_token_ids).problems
        yield {
            "right": read_answer(tokenizer.decode(made, skip_special_tokens=True)) == problem.answer,
            "valid": not found and report.finish_reason == "eos",
            "forked": len(report.branches) > 1,
            "generated_tokens": report.generated_tokens,
            "sequential_steps": report.sequential_steps,
        }


def by_form(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of forks, and accuracy with its interval among answers that forked and among those that did not."""
    summary: dict[str, Any] = {"fork_share": round(sum(record["forked"] for record in records) / len(records), 4)}
    for name, forked in (("forked", True), ("sequential", False)):
        right = [record["right"] for record in records if record["forked"] == forked]
        if right:
            low, high = wilson_interval(sum(right), len(right))
            summary[name] = {"right": sum(right), "of": len(right), "interval_95": [round(low, 4), round(high, 4)]}
    return summary


def run_log(run: Path) -> list[dict[str, float]]:
    """Step and curves of every logged update, from the newest checkpoint of a run.

    Raises:
        ValueError: if the run has no checkpoint.
    """
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        raise ValueError(f"`run` ({run}) holds no checkpoint with a trainer_state.json.")
    history = json.loads(states[-1].read_text())["log_history"]
    return [{name: entry[name] for name in ("step", *CURVES)} for entry in history if "fork_share" in entry]


@app.command()
def draw(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `multiverse.trainer.grpo`.")],
    output: Annotated[Path, typer.Argument(help="Picture; the log is written beside it.")],
) -> None:
    """Draws the curves of a run (needs the extra `plots`) and keeps its log."""
    import matplotlib.pyplot as plt

    log = run_log(run)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")
    figure, axes = plt.subplots(2, 2, figsize=(8, 5), layout="constrained", sharex=True)
    for axis, (name, label) in zip(axes.flat, CURVES.items(), strict=True):
        axis.plot([entry["step"] for entry in log], [entry[name] for entry in log], linewidth=1)
        axis.set(title=label)
        axis.grid(visible=True, alpha=0.3)
    for axis in axes[1]:
        axis.set(xlabel="update")
    figure.savefig(output, metadata={"Date": None})
    print(output)


if __name__ == "__main__":
    app()
