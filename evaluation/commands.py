"""`multiverse evaluate`: run, report and compare.

What a command needs beyond typer and rich is imported inside it: the main command lists all of them, and must not wait
for `datasets` and scipy, nor have them.
"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from multiverse import command_errors
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from multiverse.evaluation.run_folder import RunFolder

app = typer.Typer(no_args_is_help=True, help="Accuracy, parallelism and speed of a checkpoint, in one command.")

Folder = Annotated[Path, typer.Argument(help="Folder of the run.")]


#: Around whatever a command does.
plain_errors = partial(command_errors.plain_errors, "Evaluating", "evaluate")


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Folder of the run; the same command goes on in it.")],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a checkpoint, or of an adapter.")] = "demo",
    base: Annotated[str | None, typer.Option(help="Of an adapter, in the place of the one it names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a checkpoint on the Hub.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights; auto is the checkpoint's.")] = "auto",
    device: Annotated[str | None, typer.Option(help="By default a GPU if there is one.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="Of the prefill.")] = None,
    decode_attention: Annotated[str, typer.Option(help="Of the decode steps.")] = "auto",
    tasks: Annotated[
        str, typer.Option(help="Of aime24, aime25, math500, gpqa_diamond, sums, trees, or named by --data.")
    ] = "sums",
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=PATH", help="File or Hub id that a task is read from, with options: a=b,c=d."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of every task.")] = None,
    prompts: Annotated[str, typer.Option(help="Think in parallel, sequential, or both.")] = "parallel",
    modes: Annotated[
        str, typer.Option(help="Decode parallel, sequential (one path at a time), or both.")
    ] = "parallel",
    budgets: Annotated[str, typer.Option(help="Limits of sequential steps, such as none,1024,2048.")] = "none",
    samples: Annotated[int | None, typer.Option(min=1, help="Generations per question, with --sample.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; greedy otherwise.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="With --sample; 0 is no limit.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens of all branches.")] = 1200,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered side by side.")] = 8,
    batch_sizes: Annotated[str, typer.Option(help="Batches to time, such as 1,2,4,8.")] = "",
    lengths: Annotated[str, typer.Option(help="Longest answers to time them with.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 5,
    instructions: Annotated[
        Path | None, typer.Option(help="YAML file with system messages: parallel and sequential.")
    ] = None,
) -> None:
    """Generate and judge answers, or go on with it; then write report.html and report.md.

    In several processes, each with a share: `torchrun --nproc-per-node 8 -m multiverse evaluate run FOLDER ...`, or
    `accelerate launch`. Whoever finishes last writes the report.
    """
    with plain_errors():
        from multiverse.evaluation.runner import run as run_evaluation
        from multiverse.evaluation.settings import EvaluationSettings

        settings = EvaluationSettings(
            model=model,
            base=base,
            revision=revision,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
            decode_attention=decode_attention,
            tasks=tuple(_listed(tasks)),
            data=_data(data or []),
            limit=limit,
            prompts=tuple(_listed(prompts)),  # type: ignore[arg-type]  # checked by the settings
            modes=tuple(_listed(modes)),  # type: ignore[arg-type]
            budgets=tuple(None if each == "none" else _whole("budgets", each) for each in _listed(budgets)),
            samples=samples,
            seed=seed,
            do_sample=sample,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            batch_sizes=tuple(_whole("batch_sizes", each) for each in _listed(batch_sizes)),
            lengths=tuple(_whole("lengths", each) for each in _listed(lengths)),
            repeats=repeats,
            instructions={} if instructions is None else _instructions(instructions),
        )
        run_folder = run_evaluation(settings, folder)
        if run_folder.missing() == 0:
            _report(run_folder)


@app.command()
def report(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Write report.html, report.md and summary.json anew from what a run has generated so far."""
    with plain_errors():
        from multiverse.evaluation.run_folder import RunFolder

        summary = _report(RunFolder(folder), show=not as_json)
        if as_json:
            print(json.dumps(summary, indent=1, ensure_ascii=False))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path | None, typer.Argument(help="Of another; by default the same, for its conditions.")] = None,
    select_first: Annotated[
        str, typer.Option(help="Conditions of the first that count, such as mode=parallel,prompt=parallel.")
    ] = "",
    select_second: Annotated[str, typer.Option(help="And of the second.")] = "",
    allow_different_settings: Annotated[
        bool, typer.Option("--allow-different-settings", help="Compare although answers depend on what differs.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Compare the questions that both have answered in full.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say with a paired test whether two checkpoints, modes or prompts differ, in accuracy and in steps."""
    with plain_errors():
        from multiverse.evaluation.compare_runs import Run, compare_runs
        from multiverse.evaluation.run_folder import RunFolder

        one = Run.of(RunFolder(first))
        other = one if second is None else Run.of(RunFolder(second))
        result = compare_runs(
            one, other, allow_different_settings, allow_missing, _selection(select_first), _selection(select_second)
        )
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        _print_comparison(result, Console(highlight=False, soft_wrap=True))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def harness(context: typer.Context) -> None:
    """lm-evaluation-harness with Multiverse checkpoints as `--model multiverse`; takes the options of `lm_eval run`.

    Its own help: `multiverse evaluate harness -- --help`.
    """
    with plain_errors():
        from multiverse.evaluation.lm_eval_model import main

        main(context.args)


def _print_comparison(result: dict[str, Any], console: Console) -> None:
    from multiverse.evaluation.settings import Condition

    for each in result["comparisons"]:
        labels = [Condition.of(each[name]).label() for name in ("first", "second")]
        right, steps = each["pass_at_1"], each["sequential_steps"]
        (low, high), (least, most) = right["interval_95"], steps["interval_95"]
        console.print(f"[bold]{labels[0]}[/] against [bold]{labels[1]}[/], {each['questions']} questions")
        console.print(
            f"  pass@1 {right['first']:.1%} and {right['second']:.1%}, difference {100 * right['difference']:+.1f} "
            f"points ({100 * low:+.1f} to {100 * high:+.1f}), p = {right['p_value']:.3g} "
            f"({right['test']}): {each['verdict']}"
        )
        console.print(
            f"  sequential steps {steps['first']:.1f} and {steps['second']:.1f}, ratio {steps['ratio']:.3f} "
            f"({least:.3f} to {most:.3f}), p = {steps['p_value']:.3g}: {steps['verdict']}"
        )
    for each in result["different_settings"]:
        console.print(f"Different: {each['setting']} is {each['first']!r} and {each['second']!r}", markup=False)
    for name, labels in result["unpaired"].items():
        if labels:
            console.print(f"Without a counterpart, {name}: {'; '.join(labels)}", markup=False)


def _report(folder: "RunFolder", show: bool = True) -> dict[str, Any]:
    from multiverse.evaluation.report import write_report
    from multiverse.evaluation.run_folder import to_json, write_atomically
    from multiverse.evaluation.summary import summarise_run
    from multiverse.evaluation.tasks import UNPUBLISHED

    settings, tasks, records = folder.settings().to_dict(), folder.fact("tasks"), folder.records()
    missing = folder.missing()
    if not records:
        raise ValueError(f"`folder`: {folder.path} holds no generation yet. Go on with the run.")
    summary = summarise_run(settings, tasks, records, folder.speed(), folder.sessions(), missing)
    summary["checkpoint"] = folder.fact("checkpoint")
    write_atomically(folder.path / "summary.json", to_json(summary))
    shown = [record for record in records if record["task"] not in UNPUBLISHED]
    written = write_report(folder.path, summary, shown, tasks, folder.fact("prompts"))
    if show:
        # Wide enough for the table even where nobody looks on, as in a log.
        console = Console(width=max(Console().width, 110))
        console.print(_table(summary))
        for path in written:
            console.print(str(path), markup=False)
        if missing:
            console.print(f"[yellow]{missing} generations are missing; the same run command goes on.[/]")
    return summary


def _table(summary: dict[str, Any]) -> Table:
    table = Table()
    for column in ("task", "prompt", "mode", "budget"):
        table.add_column(column)
    for column in ("right", "pass@1 (95%)", "tokens", "steps", "degree", "valid"):
        table.add_column(column, justify="right")
    for row in summary["conditions"]:
        low, high = row["pass_at_1_interval_95"]
        table.add_row(
            row["task"],
            row["prompt"],
            row["mode"],
            "none" if row["budget"] is None else str(row["budget"]),
            f"{row['right']}/{row['generations']}",
            f"{row['pass_at_1']:.1%} ({low:.1%} to {high:.1%})",
            f"{row['generated_tokens']:.1f}",
            f"{row['sequential_steps']:.1f}",
            f"{row['degree_of_parallelism']:.2f}",
            f"{row['valid_structure']:.1%}",
        )
    return table


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"`{name}` must hold whole numbers, got {text!r}.") from error


def _selection(text: str) -> dict[str, Any]:
    selected: dict[str, Any] = {}
    for each in _listed(text):
        name, sign, value = each.partition("=")
        if not sign or name not in ("task", "prompt", "mode", "budget"):
            raise ValueError(f"A selection must name task, prompt, mode or budget, as in mode=parallel, got {each!r}.")
        selected[name] = value
        if name == "budget":
            selected[name] = None if value == "none" else _whole("budget", value)
    return selected


def _data(given: list[str]) -> dict[str, dict[str, Any]] | None:
    """`aime24=aime.jsonl`, or `own=data.parquet,question=prompt,choices=A|B|C,shuffle=true`, by the task's name."""
    data: dict[str, dict[str, Any]] = {}
    for each in given:
        name, sign, rest = each.partition("=")
        path, *options = rest.split(",")
        if not sign or not path or not all("=" in option for option in options):
            raise ValueError(f"`data` must look like TASK=PATH or TASK=PATH,column=name, got {each!r}.")
        values: dict[str, Any] = dict(option.split("=", 1) for option in options)
        if "|" in values.get("choices", ""):
            values["choices"] = values["choices"].split("|")
        if "shuffle" in values:
            values["shuffle"] = values["shuffle"] == "true"
        data[name] = {"path": path, **values}
    return data or None


def _instructions(path: Path) -> dict[str, str]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not all(isinstance(each, str) for each in values.values()):
        raise ValueError(f"`instructions`: {path} must hold texts under `parallel` and `sequential`.")
    return values
