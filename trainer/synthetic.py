"""Verifiable problems with real parallel structure, each in a Multiverse and a sequential form.

A problem names a few sums (`A = 12+7-3`) and asks for their total. Every sum is a chain of small steps that depends on
nothing but its own line, so the paths are independent; the total needs all of them. A name may itself be made of
named parts (`B = B1+B2`), which nests one block in another. Every step is written out and every result is given its
name: paths share positions, so a conclusion finds a result by its name.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

PARALLEL_PROMPT = "Think step by step and in parallel."
SEQUENTIAL_PROMPT = "Think step by step."

_MOST_TERMS = 13


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
    def value(self) -> int:
        """The result."""
        return sum(self.terms) + sum(part.value for part in self.parts)

    def definition(self) -> str:
        """The lines that define this value in the question."""
        if self.parts:
            own = f"{self.name} = {'+'.join(part.name for part in self.parts)}"
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
    def answer(self) -> int:
        """The total."""
        return sum(each.value for each in self.sums)

    @property
    def question(self) -> str:
        """The user's message."""
        names = [each.name for each in self.sums]
        return "\n".join([f"Find {'+'.join(names)}.", *(each.definition() for each in self.sums)])

    def parallel(self) -> str:
        """The Multiverse form."""
        return f"{_block(self.sums, '')}\nAnswer: {self.answer}"

    def sequential(self) -> str:
        """The same content in one line of thought, without tags and labels."""
        return "\n".join([*_sequential_lines(self.sums), f"Answer: {self.answer}"])

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


@dataclass(frozen=True)
class ProblemOptions:
    """What problems are drawn from.

    Attributes:
        paths (`tuple[int, int]`): fewest and most paths of the outer block.
        terms (`tuple[int, int]`): fewest and most terms of a chain.
        repeats (`bool`): whether a step may come twice in a chain. Without repeats, whoever works through a chain can
            tell by the last step where to go on.
        nested (`float`): share of problems in which one value is made of two or three parts.
        largest (`int`): no running total of a chain leaves 1 to `largest` (parts: a share of it, 10 at least).
    """

    paths: tuple[int, int] = (2, 5)
    terms: tuple[int, int] = (9, 11)
    repeats: bool = False
    nested: float = 0.2
    largest: int = 20

    def __post_init__(self) -> None:
        for name in ("paths", "terms"):
            low, high = getattr(self, name)
            if not 2 <= low <= high:
                raise ValueError(f"`{name}` must be a (low, high) range from 2 up, got {(low, high)}.")
        if not self.repeats and self.terms[1] > _MOST_TERMS:
            raise ValueError(
                f"`terms` reaches {self.terms[1]}, too many for chains that repeat no step. Ask for at most "
                f"{_MOST_TERMS}, or allow `repeats`."
            )
        if self.paths[1] > 26:
            raise ValueError(f"`paths` reaches {self.paths[1]}, but names run from A to Z. Ask for at most 26.")
        if not 0.0 <= self.nested <= 1.0:
            raise ValueError(f"`nested` is a share between 0 and 1, got {self.nested}.")
        if self.largest < 20:
            raise ValueError(f"`largest` must be at least 20, got {self.largest}.")


def generate_problems(
    count: int,
    seed: int,
    options: ProblemOptions | None = None,
    exclude: frozenset[Problem] | set[Problem] = frozenset(),
) -> list[Problem]:
    """Draws `count` different problems.

    Args:
        count (`int`): how many.
        seed (`int`): same seed and options, same problems.
        options (`ProblemOptions`, *optional*): the distribution.
        exclude (`set[Problem]`): problems that must not come up, usually another split.

    Raises:
        ValueError: if `count` is negative.
    """
    if count < 0:
        raise ValueError(f"`count` must not be negative, got {count}.")
    seen: set[Problem] = set(exclude)
    problems: list[Problem] = []
    for problem in _stream(random.Random(seed), options or ProblemOptions()):
        if len(problems) == count:
            break
        if problem not in seen:
            seen.add(problem)
            problems.append(problem)
    return problems


def train_and_test(
    train: int,
    test: int,
    seed: int = 0,
    train_options: ProblemOptions | None = None,
    test_options: ProblemOptions | None = None,
) -> tuple[list[Problem], list[Problem]]:
    """Two splits that share no problem; the test split depends on `test`, `seed` and `test_options` alone."""
    held_out = generate_problems(test, seed + 1_000_003, test_options)
    return generate_problems(train, seed, train_options, exclude=set(held_out)), held_out


def read_answer(text: str) -> int | None:
    """The number after the last `Answer:` of a generated text, `None` where there is none."""
    words = text.rpartition("Answer:")[2].split() if "Answer:" in text else []
    return int(words[0]) if words and words[0].isdecimal() else None


def _stream(rng: random.Random, options: ProblemOptions) -> Iterator[Problem]:
    while True:
        names = [chr(ord("A") + number) for number in range(rng.randint(*options.paths))]
        grouped = rng.randrange(len(names)) if rng.random() < options.nested else None
        sums = []
        for number, name in enumerate(names):
            if number == grouped:
                parts = rng.randint(2, 3)
                limit = max(options.largest // parts, 10)
                sums.append(
                    Sum(name, parts=tuple(_chain(rng, f"{name}{p + 1}", options, limit) for p in range(parts)))
                )
            else:
                sums.append(_chain(rng, name, options, options.largest))
        yield Problem(tuple(sums))


def _chain(rng: random.Random, name: str, options: ProblemOptions, largest: int) -> Sum:
    """A chain whose running total stays between 1 and `largest`, in steps of 1 to 9."""
    while True:
        total = rng.randint(1, largest)
        terms = [total]
        steps = [*range(-9, 0), *range(1, 10)]
        length = rng.randint(*options.terms)
        while len(terms) < length and (choices := [step for step in steps if 1 <= total + step <= largest]):
            terms.append(rng.choice(choices))
            total += terms[-1]
            if not options.repeats:
                steps.remove(terms[-1])
        if len(terms) == length:
            return Sum(name, tuple(terms))


def _combine(sums: tuple[Sum, ...]) -> list[str]:
    """Adds named results one after the other: `A+B=12+30=42`, `42+C=42+7=49`."""
    lines, total, left = [], sums[0].value, sums[0].name
    for each in sums[1:]:
        lines.append(f"{left}+{each.name}={total}+{each.value}={total + each.value}")
        total += each.value
        left = str(total)
    return lines


def _block(sums: tuple[Sum, ...], prefix: str) -> str:
    labels = [f"{prefix}{number}" for number in range(1, len(sums) + 1)]
    outlines = [f"<Outline>\n{label}: {each.name}\n</Outline>" for label, each in zip(labels, sums, strict=True)]
    paths = [f"<Path>\n{label}: {_path(each, label)}\n</Path>" for label, each in zip(labels, sums, strict=True)]
    conclusion = "\n".join(["<Conclusion>", *_combine(sums), "</Conclusion>"])
    return "\n".join(["<Parallel>", "<Goal>", *outlines, "</Goal>", *paths, conclusion, "</Parallel>"])


def _path(each: Sum, label: str) -> str:
    if each.parts:
        return "\n".join([each.name, _block(each.parts, f"{label}."), f"{each.name}={each.value}"])
    return "\n".join([each.name, *each.steps()])


def _sequential_lines(sums: tuple[Sum, ...]) -> list[str]:
    lines = []
    for each in sums:
        lines.append(each.name)
        lines += [*_sequential_lines(each.parts), f"{each.name}={each.value}"] if each.parts else each.steps()
    return lines + _combine(sums)
