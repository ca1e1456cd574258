"""The commands of `multiverse curate`.

A command is a function with `@app.command()`. What it needs beyond typer and rich is imported inside it, within
`plain_errors()`: the main command lists all of them, and must not wait for `datasets` and matplotlib, nor have them.
"""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from multiverse import command_errors
from rich.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

app = typer.Typer(no_args_is_help=True, help="Turn chains of thought into Multiverse data, and look at such data.")


#: Around whatever a command does.
plain_errors = partial(command_errors.plain_errors, "Curating", "curate")


@app.command()
def stats(
    sources: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Texts, folders of them, files of rows, or Hub ids.")
    ],
    column: Annotated[str | None, typer.Option(help="Of the rows: text or messages.")] = None,
    split: Annotated[str, typer.Option(help="Of the rows.")] = "train",
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id; without one, words are counted.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most texts of each source.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw them as well, such as statistics.svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="With --json: every text, too.")] = False,
) -> None:
    """Blocks, branches, depth, lengths, possible speed-up and malformed texts of any tagged corpus."""
    if texts and not as_json:
        raise typer.BadParameter("--texts goes with --json.")
    with plain_errors():
        from multiverse.curator.corpus import measure_corpus
        from multiverse.curator.statistics import table, united

        counted = _tokenizer(tokenizer)
        corpora = [
            measure_corpus(source, column=column, split=split, tokenizer=counted, limit=limit) for source in sources
        ]
        whole = corpora[0] if len(corpora) == 1 else united(corpora)
        if picture is not None:
            from multiverse.curator.statistics_picture import draw, save

            save(draw(whole), picture)
    if as_json:
        found = [corpus.to_dict(texts) for corpus in corpora]
        print(json.dumps({"corpora": found, "all": whole.to_dict()}, indent=2))
    else:
        Console().print(table(*corpora) if len(corpora) == 1 else table(*corpora, whole))


@app.command()
def synthetic(
    folder: Annotated[Path, typer.Argument(help="Folder of the dataset, for `multiverse train --dataset_name`.")],
    rows: Annotated[int, typer.Option(min=1, help="Problems.")] = 1000,
    seed: Annotated[int, typer.Option(help="Same seed, same problems.")] = 0,
    family: Annotated[list[str] | None, typer.Option(help="sums or trees; both by default, in turn.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Counts tokens for the card; without one, words.")] = None,
) -> None:
    """Write verifiable problems with both forms of their solutions as a dataset; no language model is asked."""
    with plain_errors():
        from multiverse.curator.synthetic_data import TRAINED, write_synthetic

        statistics = write_synthetic(folder, rows, seed, family or list(TRAINED), _tokenizer(tokenizer))
    Console(soft_wrap=True).print(
        f"{folder}: {len(statistics.texts):,} problems, {statistics.branches.total():,} blocks, possible speed-up "
        f"{statistics.speed_up:.2f}",
        markup=False,
        highlight=False,
    )


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(help="Output folder of the curator, or its .parquet or rejects file.")],
    output: Annotated[Path, typer.Option(help="Page to write; one that is there is replaced.")] = Path("records.html"),
    limit: Annotated[int, typer.Option(min=1, help="Most finished, and most rejected, records to show.")] = 50,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Read records beside their source: what became of every sentence, the structure, and what failed."""
    with plain_errors():
        from multiverse.curator.inspect_page import inspect as write_page

        finished, rejected = write_page(source, output, limit)
    size = output.stat().st_size / 1e6
    Console(soft_wrap=True).print(
        f"{output}: {finished:,} finished and {rejected:,} rejected records, {size:,.1f} MB",
        markup=False,
        highlight=False,
    )
    if open_page:
        typer.launch(output.resolve().as_uri())


def _tokenizer(name: str | None) -> "PreTrainedTokenizerBase | None":
    if name is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
