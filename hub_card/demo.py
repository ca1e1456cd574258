"""The main job: answers held-out problems in parallel with the shipped adapter, and one path at a time beside it.

`make demo`, or `python -m multiverse.hub_card.demo --problems 4`.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from multiverse import BranchLayout
from multiverse.generation.output import MultiverseGenerateOutput
from multiverse.hub_card.checkpoint import ADAPTER, load_demo_model
from multiverse.hub_card.live_view import LiveBranches, timeline
from multiverse.trainer.synthetic import Problem, read_answer, train_and_test
from rich.console import Console
from rich.panel import Panel
from rich.table import Table


def main(
    problems: Annotated[int, typer.Option(min=1, max=256, help="How many held-out problems to answer.")] = 4,
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")] = ADAPTER,
    base: Annotated[Path | None, typer.Option(help="Folder of the base model; made when missing.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=16, help="Tokens per answer, all branches together.")] = 1200,
    first: Annotated[int, typer.Option(min=0, max=255, help="First held-out problem.")] = 0,
) -> None:
    """Answers held-out problems with all paths side by side, then the same prompts one path at a time."""
    console = Console()
    with console.status("Loading SmolLM2-135M-Instruct and the adapter (the first run converts the weights)"):
        model, tokenizer = load_demo_model(adapter, base)
    _, held_out = train_and_test(0, 256)
    chosen = held_out[first : first + problems]
    rows = []
    for number, problem in enumerate(chosen, start=first + 1):
        console.print(Panel(problem.question, title=f"problem {number}", expand=False))
        prompt = tokenizer.apply_chat_template(
            problem.messages("parallel")["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        view = LiveBranches(tokenizer, console)
        try:
            parallel, seconds = _timed(model, prompt, max_new_tokens, parallel=True, streamer=view)
        finally:
            view.end()
        if view.widest is not None:
            console.print(view.widest)
        sequential, twin_seconds = _timed(model, prompt, max_new_tokens, parallel=False)
        rows.append((problem, parallel, seconds, sequential, twin_seconds))
        _report(console, model, tokenizer, problem, parallel, seconds, twin_seconds)
    console.print(_summary(tokenizer, rows))


def _timed(
    model, prompt, max_new_tokens: int, parallel: bool, streamer=None
) -> tuple[MultiverseGenerateOutput, float]:
    start = time.perf_counter()
    output = model.generate(
        **prompt,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        parallel=parallel,
        return_dict_in_generate=True,
        streamer=streamer,
    )
    return output, time.perf_counter() - start


def _answer(tokenizer, output: MultiverseGenerateOutput) -> int | None:
    return read_answer(tokenizer.decode(output.sequences[0], skip_special_tokens=True))


def _report(console: Console, model, tokenizer, problem: Problem, output, seconds: float, twin: float) -> None:
    report = output.reports[0]
    layout = BranchLayout.from_token_ids(output.sequences[0], model.config.multiverse_token_ids)
    answer = _answer(tokenizer, output)
    verdict = "[green]right[/]" if answer == problem.answer else f"[red]wrong, it is {problem.answer}[/]"
    console.print(
        f"answer [bold]{answer}[/] ({verdict}); structure {'valid' if not layout.problems else layout.problems}"
    )
    spans = [(branch.label, branch.first_step, branch.last_step) for branch in report.branches]
    console.print(timeline(spans, report.sequential_steps))
    console.print(
        f"{report.generated_tokens} tokens in {report.sequential_steps} sequential steps, degree of parallelism "
        f"{report.degree_of_parallelism:.2f}; {seconds:.1f} s in parallel, {twin:.1f} s one path at a time\n"
    )


def _summary(tokenizer, rows) -> Table:
    table = Table(title="held-out problems, greedy decoding")
    for column in ("", "right", "tokens", "steps", "degree", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    for name, number, clock in (("parallel", 1, 2), ("one path at a time", 3, 4)):
        outputs = [row[number] for row in rows]
        reports = [output.reports[0] for output in outputs]
        right = sum(_answer(tokenizer, output) == row[0].answer for row, output in zip(rows, outputs, strict=True))
        tokens = sum(report.generated_tokens for report in reports)
        steps = sum(report.sequential_steps for report in reports)
        seconds = sum(row[clock] for row in rows)
        table.add_row(name, f"{right}/{len(rows)}", str(tokens), str(steps), f"{tokens / steps:.2f}", f"{seconds:.1f}")
    same = sum(torch.equal(row[1].sequences, row[3].sequences) for row in rows)
    speed_up = sum(row[4] for row in rows) / sum(row[2] for row in rows)
    table.caption = f"{same}/{len(rows)} answers token for token the same; speed-up {speed_up:.2f}"
    return table


if __name__ == "__main__":
    typer.run(main)
