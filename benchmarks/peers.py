"""Ways to make the same number of tokens, and how many forward passes each takes."""

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.batch_rows import BlockText, run_batch_rows
from benchmarks.workloads import Pair, tokens_of_paths

WORKER = Path(__file__).with_name("llama_worker.py")


@dataclass(frozen=True)
class Work:
    """A problem: a prompt, and how much is to be written.

    Attributes:
        prompt (`int`): tokens of the prompt, the goal of the block included.
        paths (`int`): paths of the block; with 1 there is no block, only as many tokens of plain text.
        path_tokens, conclusion_tokens (`int`): tokens of a path beyond its header, and after the block.
    """

    prompt: int = 200
    paths: int = 4
    path_tokens: int = 20
    conclusion_tokens: int = 16


@dataclass
class Way:
    """One way to do the work.

    Attributes:
        run (`Callable[[], Any]`): does it once.
        tokens, passes (`int`): what it makes, and forward passes it takes.
        weights (`dict[str, int]`): bytes of weights that a pass reads, by type.
        inside (`list[float]`, *optional*): where another process measures itself, the seconds of its runs so far.
    """

    run: Callable[[], Any]
    tokens: int
    passes: int
    weights: dict[str, int]
    inside: list[float] | None = None

    @property
    def bytes_per_pass(self) -> int:
        """Of all types together."""
        return sum(self.weights.values())


@contextmanager
def counted_passes(backbone: nn.Module) -> Iterator[list[int]]:
    """Collects the number of tokens of every forward pass that `backbone` makes inside."""
    passes: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        passes.append(ids.numel())

    handle = backbone.register_forward_hook(count, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def own_ways(pair: Pair, work: Work, weights: dict[str, int]) -> tuple[dict[str, Way], torch.Tensor]:
    """Ours and stock transformers', on the same weights in one process, each run once for its counts and as a warm-up.

    Stock `generate()` is not run: it takes a pass for every token.

    Args:
        weights (`dict[str, int]`): bytes of the weights, by type.

    Returns:
        The ways by name, and the prompt, shape `(1, prompt)`.

    Raises:
        RuntimeError: if two ways make different numbers of tokens.
    """
    limit, made = tokens_of_paths(work.paths, work.path_tokens)
    ids = pair.prompt(work.prompt, work.paths if work.paths > 1 else 0)
    ours = partial(pair.run_ours, ids, made + work.conclusion_tokens + 3, max_path_tokens=limit)
    ways: dict[str, Way] = {}
    outputs: dict[str, Any] = {}
    for name, parallel in (("parallel", True), ("sequential", False)):
        with counted_passes(pair.ours.model) as passes:
            outputs[name] = ours(parallel=parallel)
        run = partial(ours, parallel=parallel, return_dict_in_generate=False)
        ways[name] = Way(run, outputs[name].reports[0].generated_tokens, len(passes), weights)
    tokens = ways["parallel"].tokens
    ways["stock"] = Way(partial(pair.run_stock, ids, tokens), tokens, tokens, weights)
    if work.paths > 1:
        text = BlockText.read(outputs["parallel"], work.prompt)
        with counted_passes(pair.stock.model) as passes:
            rows = run_batch_rows(pair, text)
        ways["batch rows"] = Way(
            partial(run_batch_rows, pair, text), rows.shape[1] - work.prompt, len(passes), weights
        )
    for name, way in ways.items():
        if way.tokens != tokens:
            raise RuntimeError(f"{name} made {way.tokens} tokens where the parallel mode made {tokens}.")
    return ways, ids


class LlamaPeer:
    """llama.cpp in a process of its own, which waits while others run.

    Args:
        python (`str` or `Path`): an interpreter that has `llama_cpp`.
        model (`str` or `Path`): a GGUF file.
        threads (`int`): for prompts and single tokens alike.
        context (`int`): most tokens of prompt and answer.
        extra_buffers (`bool`): lets it lay quantised weights out anew for the processor, AMX among others.

    Attributes:
        seconds (`list[float]`): of every run so far, by its own clock.
        version (`str`): of llama-cpp-python.

    Raises:
        ValueError: if the process does not come up.
    """

    def __init__(
        self, python: str | Path, model: str | Path, threads: int, context: int = 2048, extra_buffers: bool = True
    ) -> None:
        command = [str(python), str(WORKER), str(model), str(threads), str(context), str(int(extra_buffers))]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise ValueError(
                f"`python` is {str(python)!r}, which does not run: {error}. Name an interpreter."
            ) from error
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if not first:
            raise ValueError(
                f"`python` is {str(python)!r}, but its llama.cpp did not load `model` {str(model)!r} (see above). "
                "Install llama-cpp-python there."
            )
        ready = json.loads(first)
        self.version, self._vocabulary = ready["version"], ready["vocabulary"]
        self.seconds: list[float] = []

    def run(self, ids: Sequence[int], tokens: int) -> dict[str, Any]:
        """Lets it make `tokens` tokens after a prompt; ids that its vocabulary lacks are replaced by the last it has.

        Returns:
            `dict[str, Any]`: `seconds`, `tokens` and `passes`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018
        last = self._vocabulary - 1
        request = {"ids": [min(token, last) for token in ids], "tokens": tokens}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"llama.cpp ended before it answered, with {self._process.wait()}; what it said stands above. "
                "Where it falls over in a layout of its own (-11, on a processor with AMX), run it with "
                "`extra_buffers=False`, --no-llama-extra-buffers."
            )
        answer = json.loads(line)
        self.seconds.append(answer["seconds"])
        return answer

    def way(self, ids: Sequence[int], tokens: int, weights: dict[str, int]) -> Way:
        """The same as one way among others; runs once for its count."""
        passes = self.run(ids, tokens)["passes"]
        self.seconds = []
        return Way(partial(self.run, ids, tokens), tokens, passes, weights, inside=self.seconds)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def float32_copy(python: str | Path, model: Path, folder: Path) -> Path:
    """The GGUF file `model` with all weights in float32, written to `folder` by llama.cpp unless it is there.

    Raises:
        ValueError: if llama.cpp cannot write it.
    """
    copy = folder / f"{model.stem}.float32.gguf"
    if not copy.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_suffix(".part")
        command = [str(python), str(WORKER), "--float32", str(model), str(unfinished)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise ValueError(
                f"`python` is {str(python)!r}, which does not run: {error}. Name an interpreter."
            ) from error
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2]
            raise ValueError(f"`python` is {str(python)!r}, whose llama.cpp cannot copy {model.name}: {said}")
        unfinished.rename(copy)
    return copy
