"""What the curator's engine adds to the time of its models, and whether its memory grows with the input.

`python -m benchmarks.curator_overhead`. Stages, texts and answers have the sizes of a chain of s1K-1.1, and the engine
does with them all that it does: prompts hashed, answers and drafts stored, one transaction each. Reading and checking
of real answers is the stages' own, and a question by itself. Four questions:

- overhead: time per record with a model that answers at once, in this process;
- stages: the same with the curator's own stages and checks, on chains of several lengths that a good model curates;
- busy: open calls at a server of fixed latency, which runs in a process of its own, as a share of those allowed;
- memory: peak of a process that curates some records, and of one that curates ten times as many (on Linux alone).
"""

import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from multiverse.curator.budget import Limits
from multiverse.curator.checks import Checks, check_source
from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.models import Models
from multiverse.curator.pipeline import run
from multiverse.curator.records import BlockText, Call, Chain, Draft, Step
from multiverse.curator.sentences import split_sentences
from multiverse.curator.stages import make_stages
from multiverse.curator.store import Store
from rich.console import Console

from benchmarks.curated_chains import GoodModel, curated_chain
from benchmarks.measure import load_of_others, spread, store

#: Characters of a chain, of an answer, and calls of the last stage, of which there are two rounds.
CHAIN, ANSWER, BLOCKS = 24_000, 6_000, 2
CALLS = 4 + 2 * BLOCKS
#: Characters of the chains that the curator's own stages are timed on.
LENGTHS = (4_000, 15_000, 43_000)
_SENTENCE = "Then the second sum is taken in the same way, and it is 17. "
_PROCESSES = multiprocessing.get_context("spawn")


def chains(count: int) -> Iterator[Chain]:
    """Long chains, one after the other; no two are the same."""
    for number in range(count):
        yield Chain(f"c{number}", f"Question {number}?", (f"{number}. " + _SENTENCE * CHAIN)[:CHAIN], "17", "17")


class Stage:
    """One call about the whole chain; what is answered becomes a part of the draft."""

    version = "1"

    def __init__(self, name: str) -> None:
        self.name = name

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        return [self._call(chain, self.name)]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        (text,) = answers.values()
        steps = tuple(Step(str(number), text[:80]) for number in range(20))
        return replace(draft, steps=steps, texts={self.name: chain.trajectory}, done=(*draft.done, self.name))

    def _call(self, chain: Chain, key: str) -> Call:
        return Call(key, [{"role": "user", "content": f"{self.name} {key}\n{chain.trajectory}"}])


class Branches(Stage):
    """Two rounds of independent calls."""

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        first = len(draft.blocks)
        return [self._call(chain, str(number)) for number in range(first, first + BLOCKS)]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        blocks = {key: BlockText("", (), (text,), "") for key, text in answers.items()}
        draft = replace(draft, blocks={**draft.blocks, **blocks})
        return replace(draft, done=(*draft.done, self.name)) if len(draft.blocks) == 2 * BLOCKS else draft


STAGES = (*map(Stage, ("steps", "substeps", "groups", "refill")), Branches("branches"))


class Instant:
    """Answers at once."""

    async def complete(self, messages: Any, options: ModelOptions) -> Completion:
        return Completion("x" * ANSWER, "stop", CHAIN // 4, ANSWER // 4, options.model)

    async def aclose(self) -> None:
        pass


def curate(count: int, backend: Any, options: ModelOptions, concurrency: int) -> float:
    """Seconds of a run over a new store."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "store.sqlite") as new:
        start = time.perf_counter()
        limits = Limits(concurrency=concurrency)
        summary = run(
            chains(count), STAGES, lambda chain, draft, stage: draft, backend, new, StageOptions(options), limits
        )
        assert summary.progress.finished == count
        return time.perf_counter() - start


def curate_really(count: int, characters: int, first: int) -> tuple[float, float, float]:
    """Seconds of processor time of a run with the curator's own stages and checks over a new store; characters of its
    chains, and calls, both by record."""
    curated = [curated_chain(number, characters) for number in range(first, first + count)]
    # Chains have been divided when they were written, which no other does for a run.
    split_sentences.cache_clear()
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "store.sqlite") as new:
        start = time.process_time()
        summary = run(
            (each.chain for each in curated),
            make_stages(),
            Checks(),
            GoodModel(curated),
            new,
            StageOptions(ModelOptions("good")),
            Limits(concurrency=8),
            intake=check_source,
        )
        seconds = time.process_time() - start
    assert summary.progress.finished == count
    written = sum(len(each.chain.trajectory) for each in curated) / count
    return seconds, written, summary.progress.calls / count


def peak_memory(count: int, found: Any) -> None:
    """Puts the memory of this process before a run, and its peak during it, in bytes into a queue."""
    curate(1, Instant(), ModelOptions("instant"), 8)
    # Sets the peak back to what is in use: the imports' own would hide that of a run.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    curate(count, Instant(), ModelOptions("instant"), 8)
    found.put((before, _status("VmHWM")))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class FixedLatency:
    """A server whose every answer takes as long, and which integrates how many calls are open."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.open, self.most, self.calls = 0, 0, 0
        self.first = self.last = self.changed = self.integral = 0.0
        text = {"role": "assistant", "content": "x" * ANSWER}
        usage = {"prompt_tokens": CHAIN // 4, "completion_tokens": ANSWER // 4}
        choice = {"index": 0, "finish_reason": "stop", "message": text}
        self.answer = json.dumps({"model": "fixed", "choices": [choice], "usage": usage}).encode()

    def _count(self, change: int) -> None:
        now = time.perf_counter()
        self.first = self.first or now
        self.integral += self.open * (now - (self.changed or now))
        self.open, self.changed, self.last = self.open + change, now, now
        self.most = max(self.most, self.open)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers the requests of a connection; a GET asks for the counts."""
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                await reader.readexactly(int(headers.get(b"content-length", 0)))
                body = json.dumps(vars(self) | {"answer": None}).encode()
                if head.startswith(b"POST"):
                    self._count(1)
                    self.calls += 1
                    await asyncio.sleep(self.latency)
                    self._count(-1)
                    body = self.answer
                lines = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(lines.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def serve(latency: float, port: Any) -> None:
    """Runs the server until the process is ended."""

    async def main() -> None:
        server = await asyncio.start_server(FixedLatency(latency).serve, "127.0.0.1", 0, limit=1 << 20, backlog=256)
        port.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def busy(count: int, concurrency: int, latency: float) -> dict[str, Any]:
    """Runs against a server of its own; how much of what it could take it was given."""
    queue = _PROCESSES.Queue()
    process = _PROCESSES.Process(target=serve, args=(latency, queue), daemon=True)
    process.start()
    port = queue.get(timeout=120)
    try:
        options = ModelOptions("fixed", base_url=f"http://127.0.0.1:{port}/v1")
        seconds = curate(count, Models(), options, concurrency)
        counts = asyncio.run(_counts(port))
    finally:
        process.terminate()
        process.join()
    span = counts["last"] - counts["first"]
    assert counts["calls"] == count * CALLS
    return {
        "seconds": seconds,
        "calls": counts["calls"],
        "most_open": counts["most"],
        "mean_open": counts["integral"] / span,
        "busy": counts["integral"] / (span * concurrency),
    }


async def _counts(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    counts = json.loads(await reader.readexactly(length))
    writer.close()
    return counts


def in_process(function: Callable[..., None], *arguments: Any) -> Any:
    """What a function puts into a queue, run in a new process."""
    queue = _PROCESSES.Queue()
    process = _PROCESSES.Process(target=function, args=(*arguments, queue))
    process.start()
    found = queue.get()
    process.join()
    return found


def main(
    records: Annotated[int, typer.Option(min=10)] = 1000,
    in_flight: Annotated[int, typer.Option(min=1)] = 64,
    latency: Annotated[float, typer.Option(min=0.0)] = 1.0,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """All four questions; a tenth of the records for the first two, which are repeated."""
    console, found, load = Console(), [], [load_of_others()]
    few = records // 10
    overhead = [1e3 * curate(few, Instant(), ModelOptions("instant"), 8) / few for _ in range(repeats)]
    console.print(f"overhead: {spread(overhead)} ms a record of {CALLS} calls")
    found.append({"question": "overhead", "records": few, "calls": CALLS, "milliseconds_per_record": overhead})
    load.append(load_of_others())
    curate_really(1, min(LENGTHS), 0)  # imports what the first check needs
    for characters in LENGTHS:
        runs = [curate_really(few, characters, 1 + repeat * few) for repeat in range(repeats)]
        stages = [1e3 * seconds / few for seconds, _, _ in runs]
        _, written, calls = runs[0]
        console.print(
            f"stages: {spread(stages)} ms of processor time a record of {written:,.0f} characters and {calls:g} calls"
        )
        row = {"records": few, "characters": written, "calls": calls, "processor_milliseconds_per_record": stages}
        found.append({"question": "stages", **row})
    load.append(load_of_others())
    result = busy(records, in_flight, latency)
    console.print(
        f"busy: {result['busy']:.1%} of {in_flight} calls of {latency:g} s over {records:,} records, "
        f"{result['most_open']} at most"
    )
    found.append({"question": "busy", "records": records, "in_flight": in_flight, "latency": latency, **result})
    load.append(load_of_others())
    for count in (few, records):
        before, after = in_process(peak_memory, count)
        console.print(
            f"memory: {count:,} records take {(after - before) / 1e6:.1f} MB more than {before / 1e6:.0f} MB"
        )
        found.append({"question": "memory", "records": count, "before": before, "peak": after})
    store("curator_overhead", found, output, load, console)


if __name__ == "__main__":
    typer.run(main)
