"""Sequential steps by the depth of an expression tree: counted by the engine, beside what was predicted.

`python -m benchmarks.depth_steps` dictates the reference answers to a small random model, which needs no training: how
many steps a text takes depends on the text alone. `--adapter` lets a trained model answer the same held-out problems
by itself, greedily; `--sequential-adapter` adds the arm that was trained on the sequential form.
"""

import hashlib
import importlib.util
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse import BranchLayout, MultiverseForCausalLM, add_multiverse_tokens
from multiverse.forced import HeaderTokens, forced_token_mask
from multiverse.generation.arguments import GENERATION_DEFAULTS
from multiverse.generation.output import MultiverseGenerateOutput
from multiverse.generation.report import RequestReport
from multiverse.hub_card.base_model import DEFAULT_FOLDER, prepare_base_model
from multiverse.hub_card.checkpoint import load_demo_model
from multiverse.trainer.expression_trees import TreeOptions, predicted_steps
from multiverse.trainer.synthetic import Problem, read_answer, train_and_test
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from benchmarks.measure import store

FORMS = ("parallel", "sequential")

Speaker = tuple[MultiverseForCausalLM, PreTrainedTokenizerBase]


class Dictation(LogitsProcessor):
    """Lets any model write one given text: in every branch the token that follows what the branch sees.

    Args:
        prompt (`Sequence[int]`): token ids.
        answer (`Sequence[int]`): what is to be written after it, the end of the sequence included.
        model (`MultiverseForCausalLM`): the model, which knows its tags.
    """

    def __init__(self, prompt: Sequence[int], answer: Sequence[int], model: MultiverseForCausalLM) -> None:
        config, first = model.config, len(prompt)
        ids = torch.tensor([*prompt, *answer])
        layout = BranchLayout.from_token_ids(ids, config.multiverse_token_ids)
        header = HeaderTokens(config.multiverse_separator_ids, config.multiverse_label_ids)
        forced = forced_token_mask(layout, ids.tolist(), header)
        seen = layout.attention_mask(first)
        self._next: dict[bytes, int] = {}
        for index in range(first, len(ids)):
            if not forced[index]:
                history = _digest(ids[:index][seen[index - first, :index]])
                assert history not in self._next, "what a branch sees says where it stands"
                self._next[history] = int(ids[index])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        answer = self._next[_digest(input_ids[0])]
        kept = torch.full_like(scores, -torch.inf)
        # What the engine bans stays banned: a text that it would not write is not written.
        kept[:, answer] = scores[:, answer]
        return kept


def _digest(ids: torch.Tensor) -> bytes:
    return hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=16).digest()


def random_model(tokenizer: PreTrainedTokenizerBase) -> MultiverseForCausalLM:
    """A small model with random weights that speaks with `tokenizer`, which is given the tags."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2**20,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MultiverseForCausalLM(config).eval()
    add_multiverse_tokens(model, tokenizer)
    return model


def dictate(speaker: Speaker, problem: Problem, form: str, **options: Any) -> RequestReport:
    """Lets the engine write the reference answer of a problem and returns its report.

    Args:
        speaker (`Speaker`): any model with its tags, and its tokenizer.
        problem (`Problem`): what to answer.
        form (`str`): `"parallel"` or `"sequential"`.
        options: passed to `generate()`, such as `max_paths`.

    Raises:
        RuntimeError: if the engine wrote anything else.
    """
    model, tokenizer = speaker
    prompt = _prompt(tokenizer, problem, form)
    answer = [*tokenizer.encode(_reference(problem, form), add_special_tokens=False), tokenizer.eos_token_id]
    dictation = LogitsProcessorList([Dictation(prompt[0].tolist(), answer, model)])
    # A multiple of its length: near the end of its share of the budget, a path is offered no block.
    output = _generate(model, prompt, max_new_tokens=4 * len(answer), logits_processor=dictation, **options)
    if output.sequences[0, prompt.shape[1] :].tolist() != answer:
        raise RuntimeError(f"The engine wrote another text than the reference answer to {problem.question!r}.")
    return output.reports[0]


def answer_greedily(speaker: Speaker, problem: Problem, form: str, **options: Any) -> dict[str, Any]:
    """Steps, correctness and structure of a trained model's own answer.

    Args: as `dictate`; `options` hold `max_new_tokens`.
    """
    model, tokenizer = speaker
    prompt = _prompt(tokenizer, problem, form)
    output = _generate(model, prompt, **options)
    report, made = output.reports[0], output.sequences[0, prompt.shape[1] :]
    text = tokenizer.decode(made, skip_special_tokens=True)
    problems = BranchLayout.from_token_ids(made, model.config.multiverse_token_ids).problems
    return {
        "measured": report.sequential_steps,
        "tokens": report.generated_tokens,
        "right": read_answer(text) == problem.answer,
        "valid": not problems and report.finish_reason == "eos",
        "as_reference": text == _reference(problem, form),
    }


def _prompt(tokenizer: Any, problem: Problem, form: str) -> torch.Tensor:
    """Shape `(1, length)`."""
    encoded = tokenizer.apply_chat_template(
        problem.messages(form)["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"]


def _reference(problem: Problem, form: str) -> str:
    return problem.parallel() if form == "parallel" else problem.sequential()


def _generate(model: MultiverseForCausalLM, prompt: torch.Tensor, **options: Any) -> MultiverseGenerateOutput:
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, do_sample=False, return_dict_in_generate=True, **options)


def main(
    branching: Annotated[str, typer.Option(help="Parts of an inner node, one pair of curves each.")] = "2,3,4",
    depths: Annotated[str, typer.Option(help="Depths of the trees.")] = "1,2,3",
    terms: Annotated[tuple[int, int], typer.Option(help="Fewest and most terms of a leaf.")] = TreeOptions.terms,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems per point.")] = 4,
    seed: Annotated[int, typer.Option(help="Draws the problems.")] = 1,
    adapter: Annotated[Path | None, typer.Option(help="Trained on the parallel form: measure its answers.")] = None,
    sequential_adapter: Annotated[Path | None, typer.Option(help="The same for the sequential form.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=16, help="Of an answer of the adapters.")] = 4096,
    base: Annotated[Path, typer.Option(help="Folder of the base model; made when missing.")] = Path(DEFAULT_FOLDER),
    picture: Annotated[bool, typer.Option(help="Draw the curves (needs the extra `plots`).")] = True,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Writes `depth_steps.json` and `.svg` to `output`, or `depth_steps_greedy` for trained models."""
    if sequential_adapter is not None and adapter is None:
        raise ValueError(f"`sequential_adapter` is {sequential_adapter}, but `adapter` is missing. Give both.")
    if picture and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('`picture` needs matplotlib. Run `pip install -e ".[plots]"`, or pass `--no-picture`.')
    points = [
        TreeOptions(terms=terms, depth=(depth, depth), branching=(parts, parts))
        for parts in map(int, branching.split(","))
        for depth in map(int, depths.split(","))
    ]
    speakers: dict[str, Speaker]
    if adapter is None:
        tokenizer = AutoTokenizer.from_pretrained(prepare_base_model(base))
        speakers = dict.fromkeys(FORMS, (random_model(tokenizer), tokenizer))
    else:
        speakers = {"parallel": load_demo_model(adapter, base)}
        if sequential_adapter is not None:
            speakers["sequential"] = load_demo_model(sequential_adapter, base)
    console = Console()
    rows = []
    for options in points:
        parts, depth = options.branching[0], options.depth[0]
        _, held_out = train_and_test(0, problems, seed, test_options=options)
        row: dict[str, Any] = {"branching": parts, "depth": depth, "leaves": parts**depth, "terms": terms}
        began = time.perf_counter()
        row |= count_steps(speakers, held_out, None if adapter is None else max_new_tokens)
        row["seconds"] = round(time.perf_counter() - began, 1)
        console.print(f"{parts} parts, depth {depth}: {row['seconds']:.0f} s")
        rows.append(row)
    console.print(table(rows))
    name = "depth_steps" if adapter is None else "depth_steps_greedy"
    store(name, rows, output, [], console)
    if picture:
        draw(rows, output / f"{name}.svg")


def count_steps(
    speakers: Mapping[str, Speaker], problems: Sequence[Problem], max_new_tokens: int | None
) -> dict[str, dict[str, list[Any]]]:
    """Predicted and measured steps of both forms, one value per problem.

    Args:
        speakers (`Mapping[str, Speaker]`): for each form who writes it; `"parallel"` must be there. The steps of a
            form that nobody writes are predicted only.
        problems (`Sequence[Problem]`): what to answer.
        max_new_tokens (`int`, *optional*): of an answer the model makes by itself; `None` to dictate the reference.
    """
    model, tokenizer = speakers["parallel"]
    # As many as there can be: then no path waits for another.
    wide = {"max_paths": max(GENERATION_DEFAULTS["max_paths"], *(len(problem.parallel()) for problem in problems))}
    counts: dict[str, dict[str, list[Any]]] = {}
    for form in FORMS:
        texts = [_reference(problem, form) for problem in problems]
        counts[form] = {"predicted": [predicted_steps(text, tokenizer, model.config, **wide) for text in texts]}
        if form in speakers and max_new_tokens is None:
            reports = [dictate(speakers[form], problem, form, pack_linears=False, **wide) for problem in problems]
            counts[form]["measured"] = [report.sequential_steps for report in reports]
            counts[form]["tokens"] = [report.generated_tokens for report in reports]
        elif form in speakers:
            limits = {"max_new_tokens": max_new_tokens, **wide}
            answers = [answer_greedily(speakers[form], problem, form, **limits) for problem in problems]
            counts[form] |= {name: [answer[name] for answer in answers] for name in answers[0]}
    return counts


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Means for people."""
    result = Table(title="sequential steps, means")
    for column in ("parts", "depth", "leaves", *(f"{form}, {kind}" for form in FORMS for kind in _SHOWN)):
        result.add_column(column, justify="right")
    for row in rows:
        cells = [str(row[name]) for name in ("branching", "depth", "leaves")]
        for form in FORMS:
            cells += [f"{_mean(row, form, kind):.{places}f}" for kind, places in _SHOWN.items() if kind in row[form]]
            cells += [""] * sum(kind not in row[form] for kind in _SHOWN)
        result.add_row(*cells)
    return result


#: Columns of the table for each form, with their decimal places.
_SHOWN = {"predicted": 1, "measured": 1, "right": 2}


def _mean(row: Mapping[str, Any], form: str, kind: str) -> float:
    return statistics.mean(row[form][kind])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Steps over depth on a logarithmic axis: lines for what was predicted, marks for what was measured."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, parts in enumerate(sorted({row["branching"] for row in rows})):
        own = sorted((row for row in rows if row["branching"] == parts), key=lambda row: row["depth"])
        for form, style, mark in (("parallel", "-", "o"), ("sequential", "--", "s")):
            for kind, look in (("predicted", style), ("measured", mark)):
                if all(kind in row[form] for row in own):
                    axes.plot(
                        [row["depth"] for row in own],
                        [_mean(row, form, kind) for row in own],
                        look,
                        color=f"C{number}",
                        linewidth=1,
                        markersize=4,
                        label=f"{form}, {parts} parts, {kind}",
                    )
    axes.set(xlabel="depth of the tree", ylabel="sequential steps", yscale="log")
    axes.set_xticks(sorted({row["depth"] for row in rows}))
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    typer.run(main)
