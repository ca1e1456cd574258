"""Records of evaluations, written down instead of generated."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from multiverse.evaluation.settings import EvaluationSettings

STAGES = ("sequential", "map", "process", "reduce")


def record(question: str, right: bool = True, steps: int = 100, **values: Any) -> dict[str, Any]:
    """One generation of twice as many tokens as steps; `values` are put in the place of what is usual."""
    made = {
        "task": "sums",
        "prompt": "parallel",
        "mode": "parallel",
        "budget": None,
        "question": question,
        "question_number": 0,
        "sample": 0,
        "seed": None,
        "expected": f"answer to {question}",
        "answer": f"answer to {question}" if right else "another",
        "right": right,
        "reason": "right" if right else "wrong",
        "text": "",
        "prompt_tokens": 10,
        "finish_reason": "eos",
        "generated_tokens": 2 * steps,
        "forced_tokens": 0,
        "sequential_steps": steps,
        "degree_of_parallelism": 2.0,
        "kv_slots": 9 + 2 * steps,
        "path_finish_reasons": {"closed": 2},
        "blocks": 1,
        "paths": 2,
        "depth": 1,
        "problems": [],
        "tokens_by_stage": dict.fromkeys(STAGES, steps // 2),
        "batch": 0,
        "times": {
            "seconds": {"prefill": 1.0, **dict.fromkeys(STAGES, 0.25)},
            "first_token_seconds": 1.0,
            "seconds_per_token": 0.01,
            "batch_seconds": 2.0,
            "batch_rows": 1,
            "peak_memory_bytes": None,
        },
    }
    assert values.keys() <= made.keys()
    return {**made, **values}


def answers(marks: Iterable[str], steps: Sequence[int] | int = 100, **values: Any) -> list[dict[str, Any]]:
    """Generations of one condition, a mark per question: `1` is right, `0` is wrong, `0110` are four samples."""
    records = []
    for number, samples in enumerate(marks):
        length = steps if isinstance(steps, int) else steps[number]
        for sample, mark in enumerate(samples):
            records.append(record(f"q-{number:03}", mark == "1", length, sample=sample, **values))
    return records


def marks(shape: tuple[int, int], seed: int, share: float = 0.5) -> list[str]:
    """Marks at random, of shape `(questions, samples)`."""
    rng = random.Random(seed)
    return ["".join("01"[rng.random() < share] for _ in range(shape[1])) for _ in range(shape[0])]


def settings(**values: Any) -> dict[str, Any]:
    """As they stand in settings.json."""
    return {"schema_version": 1, **EvaluationSettings(**values).to_dict()}


def tasks(questions: int, samples: int = 1, sha256: str = "abc", name: str = "sums") -> dict[str, dict[str, Any]]:
    """As they stand in tasks.json."""
    return {name: {"source": "here", "sha256": sha256, "questions": questions, "samples": samples}}
