"""Draws the loss curves of the demo's two arms and keeps their logs.

`python -m multiverse.hub_card.plot_training runs/smollm2-parallel runs/smollm2-sequential` (needs the extra `plots`).
"""

import json
from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path(__file__).resolve().parent / "results"


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders that the trainer wrote, checkpoints inside.")],
    output: Annotated[Path, typer.Option(help="Folder of the picture and the logs.")] = RESULTS,
) -> None:
    """Writes loss.svg and one `NAME_log.json` per run to `output`."""
    import matplotlib.pyplot as plt

    output.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for run in runs:
        log = read_log(run)
        (output / f"{run.name}_log.json").write_text(json.dumps(log, indent=1) + "\n")
        axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], label=run.name, marker=".")
    axes.set(xlabel="update (4 samples each)", ylabel="loss per trained token", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(output / "loss.svg", metadata={"Date": None})
    print(f"{output / 'loss.svg'}")


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
