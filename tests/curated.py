"""Toy stages for the curator's engine: they ask, read and fail like the real ones, with answers that can be computed.

`steps` asks for the words of a trajectory, `substeps` for the words backwards, and `branches` twice: first about every
word, then about all of them. Nothing here takes long to import, since processes of their own run it too.
"""

import asyncio
import json
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from multiverse.curator.budget import Limits
from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions, StageOptions
from multiverse.curator.models import Models
from multiverse.curator.pipeline import Summary, run
from multiverse.curator.records import BlockText, Call, Chain, Draft, StageFailure, Step
from multiverse.curator.store import Record, Store

OPTIONS = StageOptions(ModelOptions("toy", prompt_price=1.0, completion_price=2.0, max_tokens=50))


def toy_chains(count: int) -> list[Chain]:
    """Chains of two to five words."""
    words = ("alpha", "beta", "gamma", "delta", "epsilon")
    return [
        Chain(f"c{number}", f"question {number}", " ".join(words[: 2 + number % 4]) + f" {number}", "done")
        for number in range(count)
    ]


def asked(stage: str, task: str, text: str, complaint: str | None = None) -> list[dict[str, str]]:
    """The messages of a call; `toy_answer` reads them."""
    body = {"stage": stage, "task": task, "text": text, "complaint": complaint}
    return [{"role": "system", "content": "Answer."}, {"role": "user", "content": json.dumps(body)}]


def toy_answer(messages: list[dict[str, str]]) -> str:
    """What a good model says."""
    body = json.loads(messages[-1]["content"])
    words = body["text"].split()
    answers = {"words": words, "backwards": words[::-1], "upper": body["text"].upper(), "count": len(words)}
    return json.dumps({"answer": answers[body["task"]]})


def read(stage: str, text: str) -> Any:
    """The answer in a text that may be spoilt."""
    try:
        return json.loads(text)["answer"]
    except (ValueError, TypeError, KeyError):
        raise StageFailure(stage, f"no JSON: {text[:20]!r}") from None


class Steps:
    name, version = "steps", "1"

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        return [Call("words", asked(self.name, "words", chain.trajectory, complaint))]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        words = read(self.name, answers["words"])
        if words != chain.trajectory.split():
            raise StageFailure(self.name, f"words are missing: {len(words)}")
        steps = tuple(Step(str(number), word) for number, word in enumerate(words, 1))
        return replace(draft, steps=steps, done=(*draft.done, self.name))


class Structure:
    """Asks nothing."""

    name, version = "structure", "1"

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        return []

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        assert not answers
        return replace(draft, done=(*draft.done, self.name))


class Branches:
    """Two rounds; the first one's calls are independent."""

    name, version = "branches", "1"

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        if draft.blocks:
            return [Call("all", asked(self.name, "count", chain.trajectory, complaint))]
        return [
            Call(step.label, asked(self.name, "upper", f"{step.title} of {chain.id}", complaint))
            for step in draft.steps
        ]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        if draft.blocks:
            block = replace(draft.blocks["1"], conclusion=str(read(self.name, answers["all"])))
            return replace(draft, blocks={"1": block}, done=(*draft.done, self.name))
        paths = tuple(read(self.name, answers[step.label]) for step in draft.steps)
        if any(not isinstance(path, str) or not path.endswith(chain.id.upper()) for path in paths):
            raise StageFailure(self.name, "a path is cut off")
        return replace(draft, blocks={"1": BlockText("", (), paths, "")})


STAGES = (Steps(), Structure(), Branches())


def passes(chain: Chain, draft: Draft, stage: str) -> Draft:
    """A check that measures and never fails."""
    return replace(draft, measures={**draft.measures, stage: float(len(draft.steps))})


class InProcess:
    """A model without HTTP.

    Args:
        answer (`Callable`): a text for messages, or an exception to raise.
        pause (`float`): seconds that an answer takes.
    """

    def __init__(self, answer: Callable[[list[dict[str, str]]], Any] = toy_answer, pause: float = 0.0) -> None:
        self.answer, self.pause = answer, pause
        self.calls: list[tuple[list[dict[str, str]], ModelOptions]] = []
        self.open = self.most_open = 0

    async def complete(self, messages: Any, options: ModelOptions) -> Completion:
        self.calls.append((messages, options))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.pause)
            text = self.answer(messages)
        finally:
            self.open -= 1
        if isinstance(text, BaseException):
            raise text
        return text if isinstance(text, Completion) else Completion(text, "stop", 10, 5, options.model)

    async def aclose(self) -> None:
        pass


def curate(
    path: Path,
    backend: Any = None,
    chains: list[Chain] | None = None,
    stages: Any = STAGES,
    check: Any = passes,
    options: StageOptions = OPTIONS,
    progress: Any = None,
    **limits: Any,
) -> Summary:
    """One run over a store."""
    with Store(path) as store:
        chains = toy_chains(6) if chains is None else chains
        return run(chains, stages, check, backend or InProcess(), store, options, Limits(**limits), progress)


def of_chain(messages: Any, number: int) -> bool:
    """Whether a call belongs to a chain; all of its texts end in its number."""
    return json.loads(messages[-1]["content"])["text"].endswith((f" {number}", f"c{number}"))


def record(path: Path, chain_id: str) -> Record:
    """A record of a store that nobody writes to."""
    with Store(path, read_only=True) as store:
        found = store.find(chain_id)
    assert found is not None
    return found


def results(path: Path) -> bytes:
    """All that a run has made of its input, in its order."""
    with Store(path, read_only=True) as store:
        rows = [
            [each.chain.id, each.status, each.stage, dict(each.attempts), each.draft.to_dict(), list(each.history)]
            for each in store.records()
        ]
    return json.dumps(rows).encode()


def http_options(url: str, **fields: Any) -> StageOptions:
    """For a scripted server, which sees by the seed which attempt it is asked for."""
    return StageOptions(ModelOptions("toy", base_url=url, **{"timeout": 60.0, "seed": 0, **fields}))


def curate_over_http(path: str, url: str, count: int, concurrency: int) -> None:
    """A run that a process of its own makes."""
    curate(Path(path), Models(), toy_chains(count), options=http_options(url), concurrency=concurrency)


#: Starts new processes as forks of one that has done nothing but import what takes long.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["multiverse.curator.models", "multiverse.curator.pipeline"])
