"""Draws the loss curves of the demo's two arms and keeps their logs.

`python -m multiverse.hub_card.plot_training parallel sequential` (needs the extra `plots`).
"""

import json
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path(__file__).resolve().parent / "results"


def main(
    arms: Annotated[list[str], typer.Argument(help="Arms to draw, such as `parallel`.")],
    runs: Annotated[Path, typer.Option(help="Folder of the runs, `smollm2-ARM`, `smollm2-ARM-2`, ...")] = Path("runs"),
    output: Annotated[Path, typer.Option(help="Folder of the picture and the logs.")] = RESULTS,
) -> None:
    """Writes loss.svg, with the phases of an arm one after the other, and one log per run to `output`."""
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for arm in arms:
        steps, losses = [], []
        done = 0
        for run in phases(runs, arm):
            log = read_log(run)
            (output / f"{run.name}_log.json").write_text(json.dumps(log, indent=1) + "\n")
            steps += [done + entry["step"] for entry in log]
            losses += [entry["loss"] for entry in log]
            done = int(steps[-1])
            axes.axvline(done, color="lightgrey", linewidth=0.8, zorder=0)
        axes.plot(steps, losses, label=f"{arm} arm", linewidth=1)
    axes.set(xlabel="update (4 problems each)", ylabel="loss per trained token", yscale="log")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(output / "loss.svg", metadata={"Date": None})
    print(f"{output / 'loss.svg'}")


def phases(runs: Path, arm: str) -> list[Path]:
    """Folders of the phases of an arm, in order.

    Raises:
        ValueError: if there are none.
    """
    found = [runs / f"smollm2-{arm}", *sorted(runs.glob(f"smollm2-{arm}-[0-9]"))]
    if not found[0].is_dir():
        raise ValueError(f"`arms`: {found[0]} does not exist. Train with `make train-demo`, or name the arms trained.")
    return found


def read_log(run: Path) -> list[dict[str, float]]:
    """Step, loss, learning rate and tokens of every logged update, from the newest checkpoint of a run.

    Raises:
        ValueError: if the run has no checkpoint.
    """
    states = sorted(run.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    if not states:
        raise ValueError(f"`runs`: {run} holds no checkpoint with a trainer_state.json.")
    history = json.loads(states[-1].read_text())["log_history"]
    return [
        {name: entry[name] for name in ("step", "loss", "learning_rate", "num_tokens")}
        for entry in history
        if "loss" in entry
    ]


if __name__ == "__main__":
    typer.run(main)
