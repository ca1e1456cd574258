"""How much sooner a trained model's own answer is there: two adapters answer the same problems, one at a time.

Nothing is forced: each writes what it was trained to write, greedily, and ends by itself. The first is also held to
one path at a time, which shows what branching alone brings on real texts.

```bash
python -m benchmarks.answers runs/transfer_fresh/multiverse-0 runs/transfer_fresh/sequential-0
```
"""

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse.hub_card.checkpoint import load_demo_model
from multiverse.trainer.synthetic import train_and_test
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.measure import load_of_others, ratio, store

ARMS = {
    "parallel": ("multiverse", {}),
    "one path at a time": ("multiverse", {"parallel": False}),
    "sequential": ("sequential", {}),
}


def main(
    multiverse: Annotated[Path, typer.Argument(help="Adapter that answers in parallel.")],
    sequential: Annotated[Path, typer.Argument(help="Adapter that answers in one line of thought.")],
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 24,
    seed: Annotated[int, typer.Option(help="Draws the problems.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=16)] = 1200,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Wall clock of a whole call, prompt included, by problem."""
    console = Console()
    speakers = {"multiverse": load_demo_model(multiverse), "sequential": load_demo_model(sequential)}
    _, held_out = train_and_test(0, problems, seed)
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    steps: dict[str, list[int]] = {name: [] for name in ARMS}
    tokens: dict[str, list[int]] = {name: [] for name in ARMS}

    def run(name: str, number: int) -> Any:
        speaker, options = ARMS[name]
        model, tokenizer = speakers[speaker]
        form = "parallel" if speaker == "multiverse" else "sequential"
        prompt = tokenizer.apply_chat_template(
            held_out[number].messages(form)["prompt"],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        return model.generate(
            **prompt, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **options
        )

    for name in ARMS:
        run(name, 0)
    busy = [load_of_others()]
    for number in track(range(problems), description="answers"):
        # In turns, so that a slow stretch of the machine hits all of them.
        for name in ARMS:
            start = time.perf_counter()
            report = run(name, number).reports[0]
            seconds[name].append(time.perf_counter() - start)
            steps[name].append(report.sequential_steps)
            tokens[name].append(report.generated_tokens)
    busy.append(load_of_others())
    table = Table(title=f"{problems} answers, float32, {torch.get_num_threads()} threads, batch 1")
    for column in ("", "tokens", "steps", "s an answer", "tokens/s", "times faster (median of pairs)"):
        table.add_column(column, justify="right" if column else "left")
    for name in ARMS:
        table.add_row(
            name,
            f"{statistics.mean(tokens[name]):.1f}",
            f"{statistics.mean(steps[name]):.1f}",
            f"{statistics.mean(seconds[name]):.2f}",
            f"{sum(tokens[name]) / sum(seconds[name]):.1f}",
            "" if name == "parallel" else f"{ratio(seconds, name, 'parallel'):.2f}",
        )
    console.print(table)
    rows = [
        {
            "problems": problems,
            "adapters": [str(multiverse), str(sequential)],
            "seconds": seconds,
            "sequential_steps": steps,
            "generated_tokens": tokens,
            "times_faster_than_sequential": ratio(seconds, "sequential", "parallel"),
            "times_faster_than_one_path_at_a_time": ratio(seconds, "one path at a time", "parallel"),
        }
    ]
    store("answers", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
