"""What Multiverse Attention adds to a training step on a CPU: forward and backward of tagged against untagged text.

`python -m benchmarks.train_step --batches row`. SmolLM2-135M-Instruct, `sdpa`, float32 weights. Untagged text is the
tagged one with another token in the place of every tag, so both sides have equally many tokens, and the model runs it
as the base model would: by the causal rule alone where there is neither padding nor packing. No optimiser step.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse import TAGS, MultiverseForCausalLM, add_multiverse_tokens
from multiverse.hub_card.base_model import DEFAULT_FOLDER, prepare_base_model
from multiverse.kernels.dense import DenseMask
from multiverse.masking_multiverse import CachedStructure, branch_causal_mask, read_tokens
from multiverse.trainer.synthetic import generate_problems
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.measure import load_of_others, paired, ratio, spread, store
from benchmarks.workloads import WORDS

Batch = dict[str, torch.Tensor]

#: The fused kernels in PyTorch's profile, without what prepares their arguments.
ATTENTION_EVENTS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)


def problems(tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int = 0) -> list[int]:
    """Synthetic problems and their solutions, one after the other: many short paths."""
    ids: list[int] = []
    for problem in generate_problems(tokens // 100, seed):
        ids += tokenizer.encode(f"{problem.question}\n{problem.parallel()}\n")
    return ids[:tokens]


def long_paths(tokenizer: PreTrainedTokenizerBase, tokens: int, paths: int = 4) -> list[int]:
    """One block whose paths take four fifths of the text."""
    words = tokenizer.encode(WORDS * (tokens // 8))
    outlines = "".join(f"<Outline>\n{number}: look\n</Outline>\n" for number in range(1, paths + 1))
    ids = words[: tokens // 10] + tokenizer.encode(f"<Parallel>\n<Goal>\n{outlines}</Goal>\n")
    for number in range(1, paths + 1):
        start, end = tokenizer.encode(f"<Path>\n{number}: "), tokenizer.encode("</Path>\n")
        ids += start + words[: tokens * 4 // 5 // paths - len(start) - len(end)] + end
    ids += tokenizer.encode("<Conclusion>\ndone\n</Conclusion>\n</Parallel>\n")
    return ids + words[: tokens - len(ids)]


def row(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Batch:
    """One row of one document."""
    return {"input_ids": torch.tensor([problems(tokenizer, tokens)])}


def paths(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Batch:
    """One row with a few long paths."""
    return {"input_ids": torch.tensor([long_paths(tokenizer, tokens)])}


def packed(tokenizer: PreTrainedTokenizerBase, tokens: int, documents: int = 4) -> Batch:
    """One row of several documents of equal length, told apart by their positions."""
    texts = (problems(tokenizer, tokens // documents, seed) for seed in range(documents))
    positions = torch.arange(tokens // documents).repeat(1, documents)
    return {"input_ids": torch.tensor([[*itertools.chain(*texts)]]), "position_ids": positions}


def padded(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Batch:
    """Two rows, the second a quarter shorter and filled up."""
    real = torch.ones(2, tokens, dtype=torch.long)
    real[1, tokens * 3 // 4 :] = 0
    ids = torch.tensor([problems(tokenizer, tokens, seed) for seed in range(2)])
    return {"input_ids": ids.masked_fill(real == 0, 0), "attention_mask": real}


BATCHES: dict[str, Callable[[PreTrainedTokenizerBase, int], Batch]] = {
    each.__name__: each for each in (row, paths, packed, padded)
}


def without_tags(batch: Batch, token_ids: dict[str, int], plain: int) -> Batch:
    """`batch` with the token `plain` in the place of every tag."""
    ids = batch["input_ids"]
    tags = torch.isin(ids, torch.tensor([token_ids[tag] for tag in TAGS]))
    return {**batch, "input_ids": ids.masked_fill(tags, plain)}


def step(model: MultiverseForCausalLM, batch: Batch, autocast: bool) -> None:
    """Forward and backward, every token but padding a label."""
    model.zero_grad()
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()


def attention_seconds(run: Callable[[], None]) -> float:
    """What the kernels of attention take of a run, backward included, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    return 1e-6 * sum(event.cpu_time_total for event in found.key_averages() if event.key in ATTENTION_EVENTS)


def preparation_seconds(model: MultiverseForCausalLM, batch: Batch, autocast: bool, repeats: int) -> dict[str, float]:
    """What comes before the first layer: reading the tags, and the mask in the form that the layers take."""
    dtype = torch.bfloat16 if autocast else torch.float32
    given = batch.get("attention_mask"), batch.get("position_ids")
    seconds: dict[str, list[float]] = {"structure": [], "mask": []}
    for _ in range(repeats):
        state = CachedStructure()
        start = time.perf_counter()
        read_tokens(model.config.multiverse_token_ids, state, batch["input_ids"], *given, None)
        read = time.perf_counter()
        mask: Any = branch_causal_mask(model.config, state, batch["input_ids"], given[0], None, torch.float32)
        dense = DenseMask(mask[:, 0])
        _ = dense.spans, dense.additive(dtype)
        seconds["structure"].append(read - start)
        seconds["mask"].append(time.perf_counter() - read)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(model: MultiverseForCausalLM, sides: dict[str, Batch], precision: str, repeats: int) -> dict[str, Any]:
    """Seconds of a step by side, and what of the median goes where."""
    autocast = precision == "bfloat16"
    runs = {side: partial(step, model, batch, autocast) for side, batch in sides.items()}
    # Profiled first, which warms up.
    parts = {side: {"attention": attention_seconds(run)} for side, run in runs.items()}
    seconds = paired(runs, repeats)
    parts["tagged"] |= preparation_seconds(model, sides["tagged"], autocast, repeats)
    for side, known in parts.items():
        known["rest"] = statistics.median(seconds[side]) - sum(known.values())
    return {"precision": precision, "seconds": seconds, "ratio": ratio(seconds, "tagged", "untagged"), **parts}


def main(
    batches: Annotated[str, typer.Option(help=f"Parts of {','.join(BATCHES)}")] = ",".join(BATCHES),
    precisions: Annotated[str, typer.Option(help="Parts of float32,bfloat16; the latter is autocast")] = (
        "float32,bfloat16"
    ),
    tokens: Annotated[int, typer.Option(min=512)] = 2048,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """A step on tagged text over one on untagged text, and where the time goes (tagged / untagged)."""
    console = Console()
    prepare_base_model(DEFAULT_FOLDER)
    model = MultiverseForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_FOLDER)
    add_multiverse_tokens(model, tokenizer)
    model.train()
    table = Table(title=f"training step of {tokens:,} tokens a row, {torch.get_num_threads()} threads; seconds")
    for column in ("batch", "precision", "tagged", "untagged", "ratio", "structure", "mask", "attention", "rest"):
        table.add_column(column, justify="left" if column in ("batch", "precision") else "right")
    for name, precision in itertools.product(batches.split(","), precisions.split(",")):
        tagged = BATCHES[name](tokenizer, tokens)
        plain = without_tags(tagged, model.config.multiverse_token_ids, tokenizer.encode("\n")[0])
        busy = [load_of_others()]
        found = measure(model, {"tagged": tagged, "untagged": plain}, precision, repeats)
        table.add_row(
            name,
            precision,
            *(spread(found["seconds"][side]) for side in ("tagged", "untagged")),
            f"{found['ratio']:.3f}",
            *(f"{found['tagged'][part]:.4f}" for part in ("structure", "mask")),
            *(f"{found['tagged'][part]:.2f} / {found['untagged'][part]:.2f}" for part in ("attention", "rest")),
        )
        row_found = {"batch": name, "shape": list(tagged["input_ids"].shape), **found}
        store(f"train_step_{name}_{precision}", [row_found], output, busy, console)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
