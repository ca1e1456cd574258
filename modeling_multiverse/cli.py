"""The command `multiverse`."""

import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:
    sys.exit("The command needs typer and rich: pip install 'multiverse-transformers[cli]'")

import torch
from multiverse.configuration_multiverse import MultiverseConfig
from multiverse.curator.run_commands import app as curate
from multiverse.evaluation.commands import app as evaluate
from multiverse.kernels.availability import backend_report
from multiverse.kernels.dispatch import DECODE_ATTENTION, SUPPORTED_ATTENTION

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.add_typer(curate, name="curate")
app.add_typer(evaluate, name="evaluate")


@app.callback()
def main() -> None:
    """Multiverse for Transformers."""


@app.command()
def kernels(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint whose configuration counts; a 64-dim head in float32 by default.")
    ] = None,
    attn_implementation: Annotated[str, typer.Option(help=f"One of {', '.join(SUPPORTED_ATTENTION)}.")] = "sdpa",
    decode_attention: Annotated[str, typer.Option(help=f"One of {', '.join(DECODE_ATTENTION)}.")] = "auto",
    device: Annotated[str | None, typer.Option(help="By default the GPU if there is one, else the CPU.")] = None,
    dtype: Annotated[str | None, typer.Option(help="By default the checkpoint's.")] = None,
) -> None:
    """Which attention backend would run for a model on this machine, and why."""
    if decode_attention not in DECODE_ATTENTION:
        raise typer.BadParameter(f"--decode-attention must be one of {DECODE_ATTENTION}, got {decode_attention!r}.")
    head_dim, weights, sliding = 64, torch.float32, False
    if model is not None:
        config = MultiverseConfig.from_pretrained(model)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weights = config.dtype or weights
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if dtype is not None:
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise typer.BadParameter(f"--dtype must name a dtype such as bfloat16, got {dtype!r}.")
        weights = named
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        report = backend_report(attn_implementation, decode_attention, place, weights, head_dim, sliding)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    name = str(weights).removeprefix("torch.")
    table = Table(title=f"{model or 'any model'}: {name}, head dim {head_dim}, on {place}", title_justify="left")
    for column in ("used", "for", "backend", "runs here", "why"):
        table.add_column(column)
    for status in report:
        table.add_row(
            "→" if status.chosen else "",
            {"forward": "training, prefill", "decode": "decode steps"}[status.purpose],
            status.name,
            "[green]yes[/]" if status.runs else "[red]no[/]",
            status.why,
        )
    Console().print(table)
    if any(status.chosen and not status.runs for status in report):
        Console(stderr=True).print("[red]What was asked for does not run here; nothing takes its place in silence.[/]")
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    plan: Annotated[
        bool, typer.Option("--plan", help="Train nothing; print what a rank needs in memory. No weights are loaded.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --plan: as JSON.")] = False,
    ranks: Annotated[int | None, typer.Option(help="With --plan: processes; 1 by default.")] = None,
    sharding: Annotated[str | None, typer.Option(help="With --plan: none, ddp, zero1, zero2, zero3 or fsdp2.")] = None,
    accelerate_config: Annotated[
        str | None,
        typer.Option("--accelerate_config", help="With --plan: both from a file for `accelerate launch`."),
    ] = None,
) -> None:
    """Fine-tune with TRL's SFTTrainer: takes every option of `python -m multiverse.trainer.sft`, `--config` too.

    On several GPUs: `accelerate launch --config_file ... -m multiverse train --config ...`. All other options:
    `multiverse train -- --help`.
    """
    try:
        # Here, so that the other commands need not wait for TRL, nor have it.
        from multiverse.trainer import train_command
    except ImportError as error:
        sys.exit(f"Training needs more packages ({error}): pip install 'multiverse-transformers[cli,train]'")
    if not plan:
        if json or ranks is not None or sharding is not None or accelerate_config is not None:
            raise typer.BadParameter("--json, --ranks, --sharding and --accelerate_config go with --plan.")
        train_command.run(context.args)
        return
    try:
        train_command.plan(context.args, ranks, sharding, accelerate_config, json)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint (folder or Hub id), or the folder of a LoRA adapter.")],
    folder: Annotated[str, typer.Argument(help="Where to write it; must not hold anything yet.")],
    base: Annotated[str | None, typer.Option(help="The adapter's base, in the place of the one it names.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights; by default the checkpoint's.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.")] = "5GB",
    card: Annotated[
        str | None, typer.Option(help="YAML file of facts for the model card; by default the checkpoint's card.yaml.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model in its card; by default the folder's.")] = None,
) -> None:
    """Write a checkpoint that loads with torch and transformers alone, and its card; an adapter is merged."""
    # Here, because it imports the model classes.
    from multiverse.hub_card.export import export as export_checkpoint

    try:
        written = export_checkpoint(checkpoint, folder, base, dtype, max_shard_size, card, name)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    files = sorted(written.iterdir())
    size = sum(file.stat().st_size for file in files) / 1e6
    code = sum(file.suffix == ".py" for file in files)
    Console().print(f"{written}: {len(files)} files, {code} of them code, {size:,.1f} MB")


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="What `multiverse export` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="Such as me/my-model; made when it is not there.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="By default as it is.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made when it is not there.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Upload an exported checkpoint to the Hub, once it is clear that others can load it."""
    # Here, because it imports the model classes.
    from multiverse.hub_card.push import push as push_folder
    from multiverse.hub_card.push import pushed_files

    try:
        commit = push_folder(folder, repo_id, private, revision, commit_message, create_pr)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        sys.exit(str(error))
    files = pushed_files(folder)
    size = sum(file.stat().st_size for file in files) / 1e6
    place = commit.pr_url or f"{commit.repo_url}/tree/{revision or 'main'}"
    Console(soft_wrap=True).print(f"{place}: {len(files)} files, {size:,.1f} MB")


@app.command()
def view(
    source: Annotated[
        str, typer.Argument(help="File with a text, .jsonl/.json/.parquet file of rows, or checkpoint folder.")
    ],
    output: Annotated[str, typer.Option(help="Page to write; one that is there is replaced.")] = "page.html",
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id; without one, words are counted.")] = None,
    column: Annotated[str | None, typer.Option(help="Of the rows: text or messages.")] = None,
    row: Annotated[int | None, typer.Option(help="Number of the row, from 0.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the checkpoint is asked.")] = None,
    system: Annotated[str | None, typer.Option(help="Its system message; by default one that asks for paths.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer of the checkpoint; 512.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Draw a text: when each branch was written, the tree of blocks and paths, and the attention mask."""
    # Here, because it imports the tokenizers.
    from multiverse.hub_card.view import view as write_page

    options = {"tokenizer": tokenizer, "column": column, "row": row, "prompt": prompt, "system": system}
    try:
        text = write_page(source, output, **options, max_new_tokens=max_new_tokens)
    except (ValueError, OSError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error
    figures = ", ".join(f"{value} {name}" for name, value in text.figures().items())
    Console(soft_wrap=True).print(f"{output}: {figures}", markup=False, highlight=False)
    if open_page:
        typer.launch(Path(output).resolve().as_uri())


if __name__ == "__main__":
    app()
