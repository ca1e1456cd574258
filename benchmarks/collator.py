"""What a batch costs the training process before its first layer, with and without a layout from the collator.

`python -m benchmarks.collator`. The model has no layers: what is left of a forward pass is reading the tags (or taking
over the layout), the mask, and the embedding, which is 16 numbers wide.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse import TAGS, MultiverseForCausalLM
from multiverse.trainer.collator import LayoutCollator
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from benchmarks.measure import load_of_others, paired, spread, store

TOKEN_IDS = {tag: number for number, tag in enumerate(TAGS)}
PLAIN = len(TAGS)


def sample(tokens: int, paths: int = 4, path_tokens: int = 40) -> list[int]:
    """Blocks one after the other, about as dense in tags as the synthetic problems: 24 tags in 230 tokens."""

    def words(count: int) -> list[int]:
        return [PLAIN] * count

    def within(tag: str, content: list[int]) -> list[int]:
        return [TOKEN_IDS[f"<{tag}>"], *content, TOKEN_IDS[f"</{tag}>"]]

    outlines = within("Goal", within("Outline", words(5)) * paths)
    block = within("Parallel", outlines + within("Path", words(path_tokens)) * paths + within("Conclusion", words(20)))
    text = (block + words(10)) * (tokens // len(block) + 1)
    return text[:tokens]


def model_without_layers(attention: str) -> MultiverseForCausalLM:
    """All of a model that a batch passes before its first layer."""
    config = LlamaConfig(
        vocab_size=PLAIN + 1,
        hidden_size=16,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=16,
        max_position_embeddings=1 << 16,
    )
    model = MultiverseForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    model.config.multiverse_token_ids = TOKEN_IDS
    return model


def main(
    rows: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=1)] = 2048,
    repeats: Annotated[int, typer.Option(min=1)] = 21,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """One padded batch under every attention implementation that has a mask to make."""
    console = Console()
    table = Table(title=f"{rows} rows of {tokens:,} tokens, CPU, {torch.get_num_threads()} threads; ms")
    for column in ("attention", "by itself", "with a layout", "saved", "made in the worker in"):
        table.add_column(column, justify="left" if column == "attention" else "right")
    ids = torch.tensor([sample(tokens)] * rows)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found, busy = [], []
    for attention in ("sdpa", "eager", "flex_attention", "multiverse"):
        model = model_without_layers(attention)
        collator = LayoutCollator(model.config, lambda features: dict(batch))
        prepared = collator([])

        def run(given: dict[str, Any], model: MultiverseForCausalLM = model) -> Callable[[], object]:
            return lambda: model.model(**given, use_cache=False)

        busy.append(load_of_others())
        with torch.no_grad():
            seconds = paired({"by itself": run(batch), "with a layout": run(prepared)}, repeats, warm_up=2)
        seconds["saved"] = [a - b for a, b in zip(*seconds.values(), strict=True)]
        seconds["worker"] = []
        for _ in range(repeats):
            start = time.perf_counter()
            collator([])
            seconds["worker"].append(time.perf_counter() - start)
        found.append({"attention": attention, "rows": rows, "tokens": tokens, "seconds": seconds})
        table.add_row(attention, *(spread([1e3 * each for each in values]) for values in seconds.values()))
    console.print(table)
    store("collator", found, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
