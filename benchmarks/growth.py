"""How the cost of decoding grows: with the prompt, the branches, the depth of nesting and the batch.

`python -m benchmarks.growth`. Every point is measured in every round, so that a slow stretch of the machine hits all
of them; the medians of the rounds are fitted by a power law, and its exponent stands beside what is expected.
"""

import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from multiverse.cache_argument import CACHE_ARGUMENT
from multiverse.generation import attention
from multiverse.generation.engine import Engine
from multiverse.trainer.expression_trees import TreeOptions
from multiverse.trainer.synthetic import generate_problems
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import linregress
from transformers.cache_utils import DynamicCache

from benchmarks.depth_steps import dictate
from benchmarks.growth_picture import draw
from benchmarks.measure import load_of_others, store
from benchmarks.workloads import Pair, tokens_of_paths

#: Points of the largest sizes that are also fitted by themselves: where a growth begins is not yet where it leads.
TAIL = 3


@dataclass(frozen=True)
class PowerLaw:
    """cost = factor * size ** exponent, by least squares on the logarithms.

    Attributes:
        exponent, factor (`float`): of the law.
        standard_error (`float`): of the exponent, from how far the points lie from the line. It does not know the
            scatter of single runs, and says little about a curve that is not a power law.
    """

    exponent: float
    standard_error: float
    factor: float


def fit_power_law(sizes: Sequence[float], costs: Sequence[float]) -> PowerLaw:
    """Fits a power law.

    Raises:
        ValueError: for fewer than three points, or if a value is not positive.
    """
    if len(sizes) != len(costs) or len(sizes) < 3:
        raise ValueError(
            f"`sizes` and `costs` must be three points or more, got {len(sizes)} and {len(costs)} values."
        )
    if min(*sizes, *costs) <= 0:
        raise ValueError(f"`sizes` and `costs` must be positive, got {list(sizes)} and {list(costs)}.")
    fit = linregress(np.log(sizes), np.log(costs))
    # scipy gives NaN where all costs are equal, and they lie on a line.
    return PowerLaw(float(fit.slope), float(np.nan_to_num(fit.stderr)), math.exp(fit.intercept))


@dataclass
class StepTimes:
    """What every decode step took, in order.

    Attributes:
        whole, attention (`list[float]`): seconds of the step, and of attention in all its layers.
        slots (`list[int]`): cache slots of all live requests, the step's own included.
    """

    whole: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def medians(self, first: int, last: int) -> dict[str, float]:
        """Milliseconds of a median step of `[first:last]`, of its attention and of all else in it."""
        parts = {
            "step": self.whole[first:last],
            "attention": self.attention[first:last],
            "all else": [a - b for a, b in zip(self.whole[first:last], self.attention[first:last], strict=True)],
        }
        return {name: 1000 * statistics.median(seconds) for name, seconds in parts.items()}


@contextmanager
def step_clock() -> Iterator[StepTimes]:
    """Times the decode steps of every engine that runs inside, and their attention on a CPU."""
    times, step, attend = StepTimes(), Engine._step, attention.folded_attention
    inside = 0.0

    def timed_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal inside
        start = time.perf_counter()
        output = attend(*args, **kwargs)
        inside += time.perf_counter() - start
        return output

    def timed_step(engine: Engine, live: list[int]) -> None:
        nonlocal inside
        inside, start = 0.0, time.perf_counter()
        step(engine, live)
        times.whole.append(time.perf_counter() - start)
        times.attention.append(inside)
        times.slots.append(sum(engine.requests[number].kv_slots for number in live))

    Engine._step = timed_step  # type: ignore[method-assign]
    attention.folded_attention = timed_attention
    try:
        yield times
    finally:
        Engine._step = step  # type: ignore[method-assign]
        attention.folded_attention = attend


#: What a case gives: for every series the size that it is set against, and the cost.
Costs = dict[str, tuple[float, float]]


def forked_steps(pair: Pair, ids: torch.Tensor, paths: int, steps: int, **options: Any) -> tuple[StepTimes, int, int]:
    """Step times of a call whose rows all fork into `paths`, and the range of steps in which every path is live."""
    # A label of two digits takes a token of its path.
    limit, _ = tokens_of_paths(paths, steps + 3)
    with step_clock() as times:
        pair.run_ours(ids, paths * (limit + 2) + 8, max_path_tokens=limit, **options)
    # The first step runs the headers as well.
    return times, 2, steps + 2


def prompt_case(pair: Pair, length: int, paths: int, steps: int) -> Costs:
    """A prompt of plain text, and then steps of `paths` paths behind it; set against tokens and cache slots."""
    ids = pair.prompt(length, paths)
    start = ids[0].tolist().index(pair.tokenizer.convert_tokens_to_ids("<Parallel>"))
    cache = {CACHE_ARGUMENT: DynamicCache()}
    report = pair.run_ours(ids[:, :start], 1, **cache).reports[0]
    times, first, last = forked_steps(pair, ids, paths, steps, **cache)
    slots = statistics.mean(times.slots[first:last])
    costs = {name: (slots, cost) for name, cost in times.medians(first, last).items()}
    return {"prompt": (start, 1000 * report.seconds["prefill"]), **costs}


def branch_case(pair: Pair, paths: int, prompt: int, steps: int) -> Costs:
    """Steps of `paths` live branches."""
    times, first, last = forked_steps(pair, pair.prompt(prompt, paths), paths, steps)
    return {name: (paths, cost) for name, cost in times.medians(first, last).items()}


def batch_case(pair: Pair, requests: int, paths: int, prompt: int, steps: int) -> Costs:
    """Steps of a batch of `requests` that fork into `paths` each."""
    times, first, last = forked_steps(pair, pair.prompt(prompt, paths).repeat(requests, 1), paths, steps)
    return {name: (requests, cost) for name, cost in times.medians(first, last).items()}


def depth_case(pair: Pair, depth: int) -> Costs:
    """A dictated answer to an expression of `depth` levels of two parts: 2 ** depth leaves."""
    (problem,) = generate_problems(1, 0, TreeOptions(depth=(depth, depth), branching=(2, 2), terms=(2, 2)))
    with step_clock() as times:
        report = dictate((pair.ours, pair.tokenizer), problem, "parallel")
    costs = {
        "call": 1000 * sum(report.seconds.values()),
        "steps": float(report.sequential_steps),
        "tokens": float(report.generated_tokens),
        "step": 1000 * statistics.median(times.whole),
    }
    return {name: (depth, cost) for name, cost in costs.items()}


@dataclass(frozen=True)
class Axis:
    """One direction of growth.

    Attributes:
        name, label (`str`): of the axis, and what its sizes are.
        sizes (`list[int]`): of the points.
        case (`Callable[[Pair, int], Costs]`): measures one.
        expected (`dict[str, tuple[float, float, str]]`): by series the least and the greatest exponent, and why.
    """

    name: str
    label: str
    sizes: list[int]
    case: Callable[[Pair, int], Costs]
    expected: dict[str, tuple[float, float, str]]


STEP_OF_ROWS = (0, 1, "reading the weights does not depend on the rows, arithmetic is proportional to them")


def all_axes(prompts: str, branches: str, depths: str, batches: str, steps: int) -> list[Axis]:
    """The four axes, from sizes separated by commas."""

    def sizes(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    return [
        Axis(
            "prompt",
            "tokens of the prompt; 4 paths",
            sizes(prompts),
            lambda pair, size: prompt_case(pair, size, 4, steps),
            {
                "prompt": (1, 2, "linear layers are linear in its tokens, attention is quadratic"),
                "step": (0, 1, "weights are constant, attention is linear"),
                "attention": (1, 1, "every slot is read once"),
                "all else": (0, 0, "the same weights whatever the prompt, and the mask of the step, which is small"),
            },
        ),
        Axis(
            "branches",
            "paths of the block; prompt of 1,024",
            sizes(branches),
            lambda pair, size: branch_case(pair, size, 1024, steps),
            {
                "step": STEP_OF_ROWS,
                "attention": (0, 1, "keys and values are read once for all branches, arithmetic is per branch"),
                "all else": STEP_OF_ROWS,
            },
        ),
        Axis(
            "depth",
            "levels of blocks; 2 parts each, 2 ** depth leaves",
            sizes(depths),
            depth_case,
            {
                "call": (1, 1.5, "as the steps, and more, as a step of more leaves costs more"),
                "steps": (1, 1, "every level adds a goal and a conclusion, with labels a little longer than above"),
                "tokens": (1, 2, "twice the leaves with every level: no power law, steeper where it is deeper"),
                "step": (0, 0.5, "the weights are constant, and few branches are live in the median step"),
            },
        ),
        Axis(
            "batch",
            "requests; 4 paths each, prompts of 200",
            sizes(batches),
            lambda pair, size: batch_case(pair, size, 4, 200, steps),
            {
                "step": STEP_OF_ROWS,
                "attention": (1, 1, "every request reads its own slots"),
                "all else": STEP_OF_ROWS,
            },
        ),
    ]


def summarise(axis: Axis, rounds: Sequence[dict[int, Costs]]) -> dict[str, Any]:
    """The row of an axis in the results, from the points that have been measured so far."""
    series: dict[str, Any] = {}
    measured = [size for size in axis.sizes if any(size in costs for costs in rounds)]
    for name, (low, high, why) in axis.expected.items():
        points = [[costs[size][name] for costs in rounds if size in costs] for size in measured]
        against = [statistics.median(size for size, _ in each) for each in points]
        values = [[cost for _, cost in each] for each in points]
        medians = [statistics.median(each) for each in values]
        found = {"sizes": against, "values": values, "medians": medians}
        if len(measured) >= TAIL:
            found["fit"] = asdict(fit_power_law(against, medians))
            found["fit_of_largest"] = asdict(fit_power_law(against[-TAIL:], medians[-TAIL:]))
        series[name] = {**found, "expected": [low, high], "why": why}
    return {"axis": axis.name, "label": axis.label, "sizes": measured, "series": series}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Exponents for people."""
    result = Table(title=f"exponents of the growth, float32, {torch.get_num_threads()} threads")
    for column in ("axis", "cost", "from, to", "exponent", f"of the largest {TAIL}", "expected", "as"):
        result.add_column(column)
    for row in rows:
        for name, found in row["series"].items():
            low, high = found["expected"]
            fits = [f"{found[fit]['exponent']:.2f} ± {found[fit]['standard_error']:.2f}" if fit in found else ""
                    for fit in ("fit", "fit_of_largest")]  # fmt: skip
            unit = "" if name in ("steps", "tokens") else " ms"
            span = f"{found['medians'][0]:.1f}, {found['medians'][-1]:.1f}{unit}"
            result.add_row(
                row["axis"], name, span, *fits, f"{low}" if low == high else f"{low} to {high}", found["why"]
            )
    return result


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over the points of an axis.")] = 5,
    steps: Annotated[int, typer.Option(min=3, help="Steps of a call that its median is taken of.")] = 12,
    prompts: Annotated[
        str, typer.Option(help="Lengths; empty to leave the axis out.")
    ] = "256,512,1024,2048,4096,8192",
    branches: Annotated[str, typer.Option()] = "1,2,4,8,16,32,64",
    depths: Annotated[str, typer.Option()] = "1,2,3,4",
    batches: Annotated[str, typer.Option(help="Requests.")] = "1,2,4,8,16,32",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Writes `growth.json` after every point, and `growth.svg` of all four axes at the end."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('The picture needs matplotlib. Run `pip install -e ".[plots]"`.')
    console = Console()
    axes = [axis for axis in all_axes(prompts, branches, depths, batches, steps) if axis.sizes]
    pair = Pair.load()
    # Packs the weights, which is no part of a step.
    branch_case(pair, 2, 200, 3)
    rows: list[dict[str, Any]] = []
    busy: list[float | None] = []
    with Progress(console=console) as progress:
        for axis in axes:
            task = progress.add_task(axis.name, total=repeats * len(axis.sizes))
            rounds: list[dict[int, Costs]] = []
            rows.append({})
            for _ in range(repeats):
                busy.append(load_of_others())
                rounds.append({})
                for size in axis.sizes:
                    rounds[-1][size] = axis.case(pair, size)
                    rows[-1] = summarise(axis, rounds)
                    store("growth", rows, output, busy, Console(quiet=True))
                    progress.advance(task)
    console.print(table(rows))
    draw(rows, output / "growth.svg")
    store("growth", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
