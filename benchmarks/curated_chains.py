"""Chains of thought of any length with the answers of a model that curates them well, for timings of the curator.

A chain treats cases, some of which have cases of their own, in sentences full of numbers and formulas; every case is a
path. The answers need no model: they say where the sentences are that the chain was put together from.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from multiverse.curator.completion import Completion
from multiverse.curator.model_options import ModelOptions
from multiverse.curator.records import Chain
from multiverse.curator.sentences import split_sentences

#: Paths of a block, and characters of a leaf step, from 20 to 40 sentences of a long chain.
PATHS, LEAF = 3, 1400

_SENTENCES = (
    "Let me take $x = {a}$ first, which gives $y = {a} + {b} = {c}$, and see where that leads us. ",
    "So the value of f({a}) is {a}*{b} - {c} = {d}, if I have not made a mistake here.\n",
    "Wait, is that right? ",
    "We have \\(n_{{{a}}} = \\frac{{{b}}}{{{c}}}\\), i.e. the ratio is about {b}.{a}, and that is smaller than {d}. ",
    "Hmm, but this only holds if the remainder of {d} by {a} is less than {b}, so let me check it once more.\n\n",
    "Then \\[ S_{a} = {a} + {b} + {c} = {d}. \\]\n",
    "Adding both sides I find 2x + {a} = {b}, therefore x is positive and the other root can be dropped. ",
    "- the term with $\\alpha^{{{a}}}$ vanishes, since {b} divides it\n",
    "It does not matter in which order these are taken, as the sum of the first {a} of them is the same every time. ",
)


#: What tells the prompts of the stages apart, right after their first word.
_STAGES = {"outline": "steps", "refine": "substeps", "decide": "groups", "say": "refill"}
_NUMBER = re.compile(r"Problem (\d+)")
_FIRST_PART = re.compile(r"^Part 1, (.*)$", re.MULTILINE)


@dataclass
class CuratedChain:
    """A chain, and what a good model answers about it.

    Attributes:
        chain (`Chain`): the source.
        answers (`dict[str, str]`): by stage, and in the last one by title of a block's first part.
    """

    chain: Chain
    answers: dict[str, str] = field(default_factory=dict)


class GoodModel:
    """Knows the answers to every question about some chains, and gives them at once."""

    def __init__(self, chains: Iterable[CuratedChain]) -> None:
        self._answers = {(each.chain.id, key): text for each in chains for key, text in each.answers.items()}

    async def complete(self, messages: Any, options: ModelOptions) -> Completion:
        """The answer to what a stage asks."""
        prompt = messages[-1]["content"]
        number, first_part = _NUMBER.search(prompt), _FIRST_PART.search(prompt)
        key = _STAGES.get(prompt[:20].split()[1]) or (first_part[1] if first_part else "")
        assert number is not None
        text = self._answers[f"c{number[1]}", key]
        return Completion(text, "stop", len(prompt) // 4, len(text) // 4, options.model)

    async def aclose(self) -> None:
        """Nothing is open."""


def curated_chain(number: int, characters: int) -> CuratedChain:
    """One chain; no two of different numbers are the same.

    Args:
        number (`int`): of the problem, which its question and its first sentence name.
        characters (`int`): of the chain, more or less.
    """
    return _Writer(number, characters).write()


class _Writer:
    def __init__(self, number: int, characters: int) -> None:
        self.number, self.rng = number, random.Random(number)
        self.leaves = max(3, round(characters / LEAF))
        self.size = characters // self.leaves
        self.sentences = 0
        self.text = ""
        self.steps: list[dict[str, Any]] = []
        self.substeps: dict[str, list[str]] = {}
        self.needs: dict[str, list[str]] = {}
        self.groups: list[dict[str, Any]] = []
        self.refill: dict[str, list[int]] = {}
        self.blocks: dict[str, str] = {}

    def write(self) -> CuratedChain:
        """The chain, a block of cases after the other."""
        self._step(f"Problem {self.number} asks for a number, and there are some cases to look at.\n\n")
        left = self.leaves
        while left > 0:
            left -= self._block(nested=left > 2 * PATHS)
        result = self.rng.randint(100, 999)
        self._step(f"All cases together leave {result}, so that is the result.\nAnswer: {result}")
        assert len(split_sentences(self.text)) == self.sentences
        question = f"Problem {self.number}: which number remains after all cases?"
        chain = Chain(f"c{self.number}", question, self.text, f"It is $\\boxed{{{result}}}$.", str(result))
        answers = {
            "steps": {"steps": self.steps},
            "substeps": {"substeps": self.substeps},
            "groups": {"needs": self.needs, "groups": self.groups},
            "refill": {"sentences": self.refill},
        }
        return CuratedChain(chain, {**{key: json.dumps(each) for key, each in answers.items()}, **self.blocks})

    def _block(self, nested: bool) -> int:
        """Some steps side by side, the last of which may hold a block of its own; how many leaves they are."""
        first, paths = len(self.steps) + 1, []
        for place in range(PATHS):
            if nested and place == PATHS - 1:
                paths.append(self._complex())
            else:
                paths.append(self._step(self._prose()))
        labels = [str(label) for label in range(first, first + PATHS)]
        self._answer(labels, [self.steps[int(label) - 1]["title"] for label in labels], paths)
        return 2 * PATHS - 1 if nested else PATHS

    def _step(self, text: str) -> str:
        label = self._begin(False)
        self.refill[label] = self._sentences(text)
        return text.strip()

    def _complex(self) -> str:
        """A step of sub-steps side by side."""
        own = self._begin(True)
        labels = [f"{own}.{place}" for place in range(1, PATHS + 1)]
        titles = [f"Look at case {label} of problem {self.number}." for label in labels]
        self.substeps[own] = titles
        texts = []
        for label in labels:
            text = self._prose()
            self.needs[label] = []
            self.refill[label] = self._sentences(text)
            texts.append(text.strip())
        self._answer(labels, titles, texts)
        return f"{{{{block {labels[0]}-{labels[-1]}}}}}"

    def _begin(self, divided: bool) -> str:
        label = str(len(self.steps) + 1)
        self.steps.append({"title": f"Look at case {label} of problem {self.number}.", "complex": divided})
        self.needs[label] = []
        return label

    def _answer(self, labels: list[str], titles: list[str], paths: list[str]) -> None:
        self.groups.append({"steps": labels, "kind": "collective", "reason": "They are different cases."})
        answer = {
            "goal": "Look at all cases.",
            "outlines": titles,
            # A word less, as if it had pointed at a sibling.
            "paths": [path.replace(" once more", "", 1) for path in paths],
            "conclusion": "All cases have been looked at.",
        }
        self.blocks[titles[0]] = json.dumps(answer)

    def _sentences(self, text: str) -> list[int]:
        first, count = self.sentences + 1, len(split_sentences(text))
        self.sentences += count
        self.text += text
        return [first, self.sentences]

    def _prose(self) -> str:
        text = ""
        while len(text) < self.size:
            a, b, c = (self.rng.randint(2, 99) for _ in range(3))
            text += self.rng.choice(_SENTENCES).format(a=a, b=b, c=c, d=a * b + c)
        return text.strip() + "\n\n"
