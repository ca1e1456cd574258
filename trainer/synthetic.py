"""Verifiable problems with real parallel structure, each in a Multiverse and a sequential form.

A problem names a few sums (`A = 12+7-3`) and asks for their total. Every sum is a chain of small steps that depends on
nothing but its own line, so the paths are independent; the total needs all of them. A name may itself be made of
named parts (`B = B1+B2`), which nests one block in another. Every step is written out and every result is given its
name: paths share positions, so a conclusion finds a result by its name.

Chains, both forms of a solution and the splits serve other families of problems too (`expression_trees`).
"""

import operator
import random
from dataclasses import dataclass, field
from typing import Protocol

from multiverse.trainer.forms import PARALLEL_PROMPT, SEQUENTIAL_PROMPT

_MOST_TERMS = 13
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Sum:
    """A named value: a chain of additions and subtractions, or the sum of named parts.

    Attributes:
        name (`str`): `A`, or `A2` for the second part of `A`.
        terms (`tuple[int, ...]`): signed terms of a chain; empty when there are parts.
        parts (`tuple[Sum, ...]`): parts that may be worked out in parallel.
    """

    name: str
    terms: tuple[int, ...] = ()
    parts: tuple["Sum", ...] = ()

    @property
    def operators(self) -> tuple[str, ...]:
        """What stands between the parts."""
        return ("+",) * (len(self.parts) - 1)

    @property
    def value(self) -> int:
        """The result."""
        return _results(self.parts, self.operators)[-1] if self.parts else sum(self.terms)

    def definition(self) -> str:
        """The lines that define this value in the question."""
        if self.parts:
            own = f"{self.name} = {_formula(self.parts, self.operators)}"
            return "\n".join([own, *(part.definition() for part in self.parts)])
        return f"{self.name} = {self.terms[0]}" + "".join(f"{term:+d}" for term in self.terms[1:])

    def steps(self) -> list[str]:
        """The chain, one step a line, ending with the named result."""
        lines, total = [], self.terms[0]
        for term in self.terms[1:]:
            lines.append(f"{total}{term:+d}={total + term}")
            total += term
        return [*lines, f"{self.name}={total}"]


@dataclass(frozen=True)
class Problem:
    """A question with its answer and two worked solutions of the same content.

    Attributes:
        sums (`tuple[Sum, ...]`): one per path of the outer block.
    """

    sums: tuple[Sum, ...] = field()

    @property
    def operators(self) -> tuple[str, ...]:
        """What stands between the sums."""
        return ("+",) * (len(self.sums) - 1)

    @property
    def answer(self) -> int:
        """The total."""
        return _results(self.sums, self.operators)[-1]

    @property
    def question(self) -> str:
        """The user's message."""
        return "\n".join([f"Find {_formula(self.sums, self.operators)}.", *(each.definition() for each in self.sums)])

    def parallel(self) -> str:
        """The Multiverse form."""
        return f"{_block(self.sums, self.operators, '')}\nAnswer: {self.answer}"

    def sequential(self) -> str:
        """The same content in one line of thought, without tags and labels."""
        return "\n".join([*_sequential_lines(self.sums, self.operators), f"Answer: {self.answer}"])

    def messages(self, form: str) -> dict[str, list[dict[str, str]]]:
        """A row of a conversational prompt-completion dataset.

        Args:
            form (`str`): `"parallel"` or `"sequential"`.
        """
        if form not in ("parallel", "sequential"):
            raise ValueError(f"`form` must be 'parallel' or 'sequential', got {form!r}.")
        system = PARALLEL_PROMPT if form == "parallel" else SEQUENTIAL_PROMPT
        completion = self.parallel() if form == "parallel" else self.sequential()
        return {
            "prompt": [{"role": "system", "content": system}, {"role": "user", "content": self.question}],
            "completion": [{"role": "assistant", "content": completion}],
        }


class ProblemSource(Protocol):
    """What problems are drawn from: the options of a family."""

    def draw(self, rng: random.Random) -> Problem:
        """One problem."""


@dataclass(frozen=True)
class ChainOptions:
    """What chains are drawn from, whatever they are part of.

    Attributes:
        terms (`tuple[int, int]`): fewest and most terms of a chain.
        repeats (`bool`): whether a step may come twice in a chain. Without repeats, whoever works through a chain can
            tell by the last step where to go on.
        largest (`int`): no running total of a chain leaves 1 to `largest`.
    """

    terms: tuple[int, int] = (9, 11)
    repeats: bool = False
    largest: int = 20

    def __post_init__(self) -> None:
        self._check_range("terms", 2)
        if not self.repeats and self.terms[1] > _MOST_TERMS:
            raise ValueError(
                f"`terms` reaches {self.terms[1]}, too many for chains that repeat no step. Ask for at most "
                f"{_MOST_TERMS}, or allow `repeats`."
            )
        if self.largest < 20:
            raise ValueError(f"`largest` must be at least 20, got {self.largest}.")

    def _check_range(self, name: str, least: int) -> None:
        low, high = getattr(self, name)
        if not least <= low <= high:
            raise ValueError(f"`{name}` must be a (low, high) range from {least} up, got {(low, high)}.")

    def chain(self, rng: random.Random, name: str, largest: int, value: int | None = None) -> Sum:
        """A chain whose running total stays between 1 and `largest`, in steps of 1 to 9.

        Args:
            rng (`random.Random`): what is drawn from.
            name (`str`): of the chain.
            largest (`int`): largest running total.
            value (`int`, *optional*): what the chain comes to; left to chance by default.
        """
        while True:
            total = rng.randint(1, largest) if value is None else value
            terms = [total]
            steps = [*range(-9, 0), *range(1, 10)]
            length = rng.randint(*self.terms)
            while len(terms) < length and (choices := [step for step in steps if 1 <= total + step <= largest]):
                terms.append(rng.choice(choices))
                total += terms[-1]
                if not self.repeats:
                    steps.remove(terms[-1])
            if len(terms) == length:
                if value is not None:
                    # It was walked from its end: the same totals the other way round.
                    terms = [total, *(-term for term in reversed(terms[1:]))]
                return Sum(name, tuple(terms))


@dataclass(frozen=True)
class ProblemOptions(ChainOptions):
    """What problems are drawn from; parts of a value get a share of `largest`, 10 at least.

    Attributes:
        paths (`tuple[int, int]`): fewest and most paths of the outer block.
        nested (`float`): share of problems in which one value is made of two or three parts.
    """

    paths: tuple[int, int] = (2, 5)
    nested: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("paths", 2)
        if self.paths[1] > 26:
            raise ValueError(f"`paths` reaches {self.paths[1]}, but names run from A to Z. Ask for at most 26.")
        if not 0.0 <= self.nested <= 1.0:
            raise ValueError(f"`nested` is a share between 0 and 1, got {self.nested}.")

    def draw(self, rng: random.Random) -> Problem:
        """One problem."""
        names = [chr(ord("A") + number) for number in range(rng.randint(*self.paths))]
        grouped = rng.randrange(len(names)) if rng.random() < self.nested else None
        sums = []
        for number, name in enumerate(names):
            if number == grouped:
                parts = rng.randint(2, 3)
                limit = max(self.largest // parts, 10)
                sums.append(Sum(name, parts=tuple(self.chain(rng, f"{name}{p + 1}", limit) for p in range(parts))))
            else:
                sums.append(self.chain(rng, name, self.largest))
        return Problem(tuple(sums))


def generate_problems(
    count: int,
    seed: int,
    options: ProblemSource | None = None,
    exclude: frozenset[Problem] | set[Problem] = frozenset(),
) -> list[Problem]:
    """Draws `count` different problems.

    Args:
        count (`int`): how many.
        seed (`int`): same seed and options, same problems.
        options (`ProblemSource`, *optional*): the distribution; `ProblemOptions()` by default.
        exclude (`set[Problem]`): problems that must not come up, usually another split.

    Raises:
        ValueError: if `count` is negative.
    """
    if count < 0:
        raise ValueError(f"`count` must not be negative, got {count}.")
    rng, source = random.Random(seed), options or ProblemOptions()
    seen: set[Problem] = set(exclude)
    problems: list[Problem] = []
    while len(problems) < count:
        problem = source.draw(rng)
        if problem not in seen:
            seen.add(problem)
            problems.append(problem)
    return problems


def train_and_test(
    train: int,
    test: int,
    seed: int = 0,
    train_options: ProblemSource | None = None,
    test_options: ProblemSource | None = None,
) -> tuple[list[Problem], list[Problem]]:
    """Two splits that share no problem; the test split depends on `test`, `seed` and `test_options` alone."""
    held_out = generate_problems(test, seed + 1_000_003, test_options)
    return generate_problems(train, seed, train_options, exclude=set(held_out)), held_out


def read_answer(text: str) -> int | None:
    """The number after the last `Answer:` of a generated text, `None` where there is none."""
    words = text.rpartition("Answer:")[2].split() if "Answer:" in text else []
    # Python turns no more digits than these into a number.
    return int(words[0]) if words and words[0].isdecimal() and len(words[0]) <= 4300 else None


def _results(parts: tuple[Sum, ...], operators: tuple[str, ...]) -> list[int]:
    """What is reached with each part, from left to right."""
    results = [parts[0].value]
    for sign, part in zip(operators, parts[1:], strict=True):
        results.append(_APPLY[sign](results[-1], part.value))
    return results


def _formula(parts: tuple[Sum, ...], operators: tuple[str, ...]) -> str:
    return parts[0].name + "".join(sign + part.name for sign, part in zip(operators, parts[1:], strict=True))


def _combine(parts: tuple[Sum, ...], operators: tuple[str, ...]) -> list[str]:
    """Takes named results in one after the other: `A+B=12+30=42`, `42+C=42+7=49`."""
    results, left, lines = _results(parts, operators), parts[0].name, []
    for number, (sign, part) in enumerate(zip(operators, parts[1:], strict=True)):
        lines.append(f"{left}{sign}{part.name}={results[number]}{sign}{part.value}={results[number + 1]}")
        left = str(results[number + 1])
    return lines


def _block(parts: tuple[Sum, ...], operators: tuple[str, ...], prefix: str) -> str:
    labels = [f"{prefix}{number}" for number in range(1, len(parts) + 1)]
    outlines = [f"<Outline>\n{label}: {each.name}\n</Outline>" for label, each in zip(labels, parts, strict=True)]
    paths = [f"<Path>\n{label}: {_path(each, label)}\n</Path>" for label, each in zip(labels, parts, strict=True)]
    conclusion = "\n".join(["<Conclusion>", *_combine(parts, operators), "</Conclusion>"])
    return "\n".join(["<Parallel>", "<Goal>", *outlines, "</Goal>", *paths, conclusion, "</Parallel>"])


def _path(each: Sum, label: str) -> str:
    if each.parts:
        return "\n".join([each.name, _block(each.parts, each.operators, f"{label}."), f"{each.name}={each.value}"])
    return "\n".join([each.name, *each.steps()])


def _sequential_lines(parts: tuple[Sum, ...], operators: tuple[str, ...]) -> list[str]:
    lines = []
    for each in parts:
        lines.append(each.name)
        if each.parts:
            lines += [*_sequential_lines(each.parts, each.operators), f"{each.name}={each.value}"]
        else:
            lines += each.steps()
    return lines + _combine(parts, operators)
