"""Verifiable problems as a dataset in the curator's columns: something to train on where no language model is at hand.

Every row is a problem of `trainer.synthetic` (sums) or `trainer.expression_trees` (trees) with both of its solutions.
No problem is in it that this project tests a model with.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from multiverse.curator.dataset_card import DatasetFacts
from multiverse.curator.output import FinishedRecord, write_output
from multiverse.curator.records import Chain
from multiverse.curator.statistics import CorpusStatistics
from multiverse.trainer.choice import CHOICE_PROBLEMS
from multiverse.trainer.expression_trees import FAMILIES, TreeOptions
from multiverse.trainer.synthetic import Problem, ProblemOptions, ProblemSource, generate_problems, train_and_test
from transformers import PreTrainedTokenizerBase

#: What problems of a family are drawn from. Wider than what is tested, so that lengths and numbers of paths vary.
TRAINED: dict[str, ProblemSource] = {
    "sums": ProblemOptions(terms=(3, 11), nested=0.3),
    "trees": TreeOptions(branching=(2, 3)),
}
#: Seeds of all held-out sets of the demo, the evaluation, the trainings and the experiments.
HELD_OUT_SEEDS = (0, 1, 2, 10)
#: As many of each as the largest of these sets holds; smaller ones are the first of it.
HELD_OUT_PROBLEMS = 400
_HELD_OUT_OPTIONS: tuple[ProblemSource, ...] = (*(family() for family in FAMILIES.values()), CHOICE_PROBLEMS)

_FACTS = {
    "summary": (
        "Arithmetic problems with real parallel structure and a known answer, each solved in a parallel and in a "
        "sequential form of the same content."
    ),
    "method": (
        "Problems and solutions were drawn by a program (`multiverse curate synthetic`), without any language model. "
        "The parts of a problem depend on nothing but their own lines, so all blocks are collective. Problems that "
        "the project tests models with are left out."
    ),
    "license": "apache-2.0",
    "licence_note": "Apache-2.0. There is no source but the program.",
    "limits": (
        "The problems are small sums, differences and products in one fixed wording: enough to learn the structure, "
        "nothing to learn mathematics from."
    ),
}


@dataclass
class _Mixture:
    """Draws from one family after the other, and no question twice or that is held out."""

    families: Sequence[str]
    seen: set[str]
    drawn: list[str] = field(default_factory=list)

    def draw(self, rng: random.Random) -> Problem:
        """One problem; `drawn` says of which family."""
        family = self.families[len(self.drawn) % len(self.families)]
        while (problem := TRAINED[family].draw(rng)).question in self.seen:
            pass
        self.seen.add(problem.question)
        self.drawn.append(family)
        return problem


@cache
def held_out_questions() -> frozenset[str]:
    """Questions of all problems that models of this project are tested with."""
    sets = (
        train_and_test(0, HELD_OUT_PROBLEMS, seed, test_options=options)[1]
        for seed in HELD_OUT_SEEDS
        for options in _HELD_OUT_OPTIONS
    )
    return frozenset(problem.question for problems in sets for problem in problems)


def synthetic_records(
    rows: int = 1000, seed: int = 0, families: Sequence[str] = tuple(FAMILIES)
) -> Iterator[FinishedRecord]:
    """Problems with both solutions, as records.

    Args:
        rows (`int`): how many.
        seed (`int`): same arguments, same records.
        families (sequence of `str`): of `FAMILIES`; they take turns.

    Raises:
        ValueError: if `rows` is not positive, or a family is not known.
    """
    if rows < 1:
        raise ValueError(f"`rows` is {rows}. Give a positive number.")
    unknown = [family for family in families if family not in TRAINED]
    if unknown or not families:
        raise ValueError(f"`families` is {list(families)}. Name one or more of {list(TRAINED)}.")
    mixture = _Mixture(families, set(held_out_questions()))
    problems = generate_problems(rows, seed, mixture)
    return (
        _record(problem, f"{number:06d}-{family}", family, seed)
        for number, (problem, family) in enumerate(zip(problems, mixture.drawn, strict=True))
    )


def write_synthetic(
    folder: str | Path,
    rows: int = 1000,
    seed: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CorpusStatistics:
    """Writes the problems as a dataset with its card, see `write_output` and `synthetic_records`."""
    records = synthetic_records(rows, seed, families)
    name = Path(folder).resolve().name
    facts = DatasetFacts(name=name, language=("en",), tags=("synthetic",), **_FACTS)
    return write_output(folder, records, facts=facts, tokenizer=tokenizer)


def _record(problem: Problem, own: str, family: str, seed: int) -> FinishedRecord:
    # The last line is the answer, and stands alone in the attempt that follows the thoughts.
    parallel, _, attempt = problem.parallel().rpartition("\n")
    sequential, _, _ = problem.sequential().rpartition("\n")
    chain = Chain(own, problem.question, sequential, attempt, str(problem.answer), {"family": family})
    provenance = {
        "generator": "multiverse curate synthetic",
        "family": family,
        "seed": seed,
        "kinds": ["collective"] * parallel.count("<Parallel>"),
    }
    # Its own sequential form is what is left of the parallel one without structure.
    return FinishedRecord(chain, parallel, sequential, provenance)
