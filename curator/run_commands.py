"""`multiverse curate run`, `status` and `export`: a folder holds a run's store, and the dataset that it comes to."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from multiverse.curator.commands import app, plain_errors
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from multiverse.curator.model_options import StageOptions
    from multiverse.curator.store import Store

#: Of a run's folder: its store, and what is exported from it.
STORE_FILE, DATASET_FOLDER = "run.sqlite", "dataset"
#: Records that `status` names one by one.
_SHOWN = 10

Folder = Annotated[Path, typer.Argument(help="Folder of the run.")]


@app.command()
def run(
    source: Annotated[str, typer.Argument(help="Chains of thought: Hub id, or .parquet, .jsonl, .json, .csv file.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the run; the same command goes on in it.")],
    options: Annotated[
        Path | None, typer.Option(help="YAML file: `default` and stages, each with a model and how it is asked.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="In the place of a file: one model for all stages.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Of --model: an OpenAI-compatible endpoint.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Run --model in this process.")] = False,
    question: Annotated[str, typer.Option(help="Name of a column.")] = "question",
    trajectory: Annotated[str, typer.Option(help="Likewise.")] = "deepseek_thinking_trajectory",
    attempt: Annotated[str, typer.Option(help="Likewise.")] = "deepseek_attempt",
    answer: Annotated[str, typer.Option(help="Likewise; empty where there is none.")] = "solution",
    id_column: Annotated[str | None, typer.Option("--id", help="Likewise; by default rows are numbered.")] = None,
    split: Annotated[str, typer.Option(help="Of the source.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Most chains to take.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls at a time.")] = 8,
    max_attempts: Annotated[int, typer.Option(min=1, help="Of a stage, per record.")] = 3,
    max_cost: Annotated[float | None, typer.Option(help="Most to spend, in the currency of the prices.")] = None,
    max_calls: Annotated[int | None, typer.Option(help="Most calls.")] = None,
    path_bound: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Most of a path's words that may be rewritten; 0.5.")
    ] = None,
) -> None:
    """Take chains of thought through the five stages, or go on with it; then write the dataset.

    Keys come from the environment: HF_TOKEN, OPENAI_API_KEY, or the variable that the options name.
    """
    with plain_errors():
        from multiverse.curator.budget import Limits
        from multiverse.curator.checks import PATH_BOUND, Checks, check_source
        from multiverse.curator.completion import ModelError
        from multiverse.curator.models import Models
        from multiverse.curator.pipeline import run as curate
        from multiverse.curator.progress import progress_bar
        from multiverse.curator.sources import ColumnMap, read_chains
        from multiverse.curator.stages import make_stages
        from multiverse.curator.store import Store

        asked = _options(options, model, base_url, local)
        limits = Limits(concurrency, max_attempts=max_attempts, max_cost=max_cost, max_calls=max_calls)
        chains = read_chains(source, ColumnMap(question, trajectory, attempt, answer or None, id_column), limit, split)
        checks = Checks(PATH_BOUND if path_bound is None else path_bound)
        folder.mkdir(parents=True, exist_ok=True)
        with Store(folder / STORE_FILE) as store:
            try:
                with progress_bar() as show:
                    summary = curate(
                        chains, make_stages(), checks, Models(), store, asked, limits, show, intake=check_source
                    )
            except ModelError as error:
                raise typer.BadParameter(f"{error} What was answered is stored; the same command goes on.") from error
            _print_status(store)
            if summary.stopped is not None:
                Console(stderr=True).print(f"Stopped: {summary.stopped} The same command goes on.", markup=False)
                raise typer.Exit(1)
            _export(store, folder / DATASET_FOLDER, None)


@app.command()
def status(folder: Folder) -> None:
    """Say how far a run is, what it has used, and what its records failed for; also while it runs."""
    with plain_errors(), _opened(folder) as store:
        _print_status(store)


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path | None, typer.Argument(help="Folder of the dataset; by default one in the run's.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id that counts tokens for the statistics; else words.")
    ] = None,
) -> None:
    """Write what is finished so far as a dataset in Multiverse-1K's columns, with its card, and the rejects."""
    with plain_errors(), _opened(folder) as store:
        _export(store, output or folder / DATASET_FOLDER, tokenizer)


def _options(path: Path | None, model: str | None, base_url: str | None, local: bool) -> "StageOptions":
    from multiverse.curator.model_options import ModelOptions, StageOptions

    if (path is None) == (model is None):
        raise ValueError("Give either `--options` with a YAML file or `--model`.")
    if path is not None:
        if base_url is not None or local:
            raise ValueError("`--base-url` and `--local` go with `--model`. Write them into the file of `--options`.")
        return StageOptions.load(path)
    return StageOptions(ModelOptions(str(model), base_url=base_url, local=local))


def _opened(folder: Path) -> "Store":
    from multiverse.curator.store import Store

    if not (folder / STORE_FILE).is_file():
        raise ValueError(f"`folder` ({folder}) holds no {STORE_FILE}. Name the folder of a `multiverse curate run`.")
    return Store(folder / STORE_FILE, read_only=True)


def _export(store: "Store", output: Path, tokenizer: str | None) -> None:
    from multiverse.curator.output import write_output
    from multiverse.curator.results import finished_records, rejected_records

    counted = None
    if tokenizer is not None:
        from transformers import AutoTokenizer

        counted = AutoTokenizer.from_pretrained(tokenizer)
    statistics = write_output(output, finished_records(store), rejected_records(store), tokenizer=counted)
    Console(soft_wrap=True).print(
        f"{output}: {len(statistics.texts):,} rows, possible speed-up {statistics.speed_up:.2f}",
        markup=False,
        highlight=False,
    )


def _print_status(store: "Store") -> None:
    from multiverse.curator.checks import CONTENT_BOUND
    from multiverse.curator.dataset_card import describe

    console, counts = Console(soft_wrap=True), store.counts()
    console.print(", ".join(f"{number:,} {name}" for name, number in counts.items()), highlight=False)
    usage = store.usage()
    if usage:
        table = Table("stage", "model", "calls", "cut off", "prompt tokens", "completion tokens", "cost")
        for each in usage:
            table.add_row(
                *(each.stage, each.model, f"{each.calls:,}", f"{each.cut:,}", f"{each.prompt_tokens:,}"),
                *(f"{each.completion_tokens:,}", f"{each.cost:.2f}"),
            )
        console.print(table)
    failures: Counter[tuple[str, str]] = Counter()
    held: list[tuple[str, str]] = []
    measures: dict[str, list[float]] = {}
    for record in store.records():
        failures.update((str(event["stage"]), str(event["back_to"] or "rejected")) for event in record.history)
        if record.status == "set aside":
            held.append((record.chain.id, str(record.held)))
        elif record.status == "finished":
            for name, value in record.draft.measures.items():
                measures.setdefault(name, []).append(value)
    bound = store.settings().get("checks.path_bound")
    bounds = {"path_distance": [] if bound is None else [bound], "content_distance": [CONTENT_BOUND]}
    for (stage, back), number in sorted(failures.items()):
        told = f"failed in {stage}, rejected" if back == "rejected" else f"failed in {stage}, back to {back}"
        console.print(f"{told}: {number:,}", highlight=False)
    for name, values in sorted(measures.items()):
        console.print(f"{name} of finished records: {describe(values, bounds.get(name, ()))}", highlight=False)
    if held:
        console.print(f"set aside for want of an answer, for the next run: {len(held):,}", highlight=False)
    for name, reason in held[:_SHOWN]:
        console.print(f"  {name}: {reason}", markup=False, highlight=False)
    if len(held) > _SHOWN:
        console.print(f"  and {len(held) - _SHOWN:,} more", highlight=False)
