"""Many chains like that of `curated_chain`, and a model that knows the right answer to every question about them."""

import json
import re
from typing import Any

from curated_chain import ANSWERS, CHAIN, INNER, OUTER
from multiverse.curator.records import Chain


def numbers_of(problem: int) -> tuple[int, int, int]:
    """Two sides of the rectangle and that of the square, no two problems alike."""
    return 11 + problem % 10, 23 + problem // 10, 47 + problem


def _filled(text: str, problem: int) -> str:
    """A text of the one chain with the numbers of another problem."""
    a, b, c = numbers_of(problem)
    values = {
        "3*4 = 12": f"{a}*{b} = {a * b}",
        "2*(3+4) = 14": f"2*({a}+{b}) = {2 * (a + b)}",
        "$s^2 = 25$": f"$s^2 = {c * c}$",
        "given as 5": f"given as {c}",
        "12+14+25 = 51": f"{a * b}+{2 * (a + b)}+{c * c} = {a * b + 2 * (a + b) + c * c}",
        "12, 14 and 25": f"{a * b}, {2 * (a + b)} and {c * c}",
        "area is 12 and the perimeter 14": f"area is {a * b} and the perimeter {2 * (a + b)}",
        "sides 3 and 4, a square side 5": f"sides {a} and {b}, a square side {c}",
        "51": str(a * b + 2 * (a + b) + c * c),
    }
    text = re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], text)
    # What tells the model which problem it is asked about, in every prompt.
    return text.replace("what is asked for", f"what problem {problem} asks for").replace(
        "A rectangle has", f"This is problem {problem}. A rectangle has"
    )


def chain(problem: int) -> Chain:
    """A chain that says which problem it is about."""
    return Chain(
        id=f"problem-{problem:03d}",
        question=_filled(CHAIN.question, problem),
        trajectory=_filled(CHAIN.trajectory, problem),
        attempt=_filled(CHAIN.attempt, problem),
        answer=_filled(str(CHAIN.answer), problem),
    )


def right_answer(messages: list[dict[str, str]]) -> str:
    """What a good model answers to a prompt of any stage."""
    prompt = messages[-1]["content"]
    found = re.search(r"problem (\d+)", prompt)
    assert found is not None, prompt
    return json.dumps(_of(ANSWERS[_asked(prompt)], int(found[1])))


def _asked(prompt: str) -> str:
    """The stage, or the block, by what is wanted in the answer."""
    if '"outlines"' in prompt:
        return INNER if "Part 1, Compute the area" in prompt else OUTER
    return next(name for name, key in _KEYS if key in prompt)


_KEYS = (("groups", '"needs"'), ("refill", '"sentences"'), ("substeps", '"substeps"'), ("steps", '"steps"'))


def _of(value: Any, problem: int) -> Any:
    if isinstance(value, dict):
        return {key: _of(each, problem) for key, each in value.items()}
    if isinstance(value, list):
        return [_of(each, problem) for each in value]
    return _filled(value, problem) if isinstance(value, str) else value
