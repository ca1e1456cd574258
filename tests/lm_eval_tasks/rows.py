"""Rows of the local tasks: short prompts in the words of `tiny.WORDS`."""

import json
from pathlib import Path
from typing import Any

import datasets

#: Of different lengths, so that a batch is padded; some leave a block open, some say what the stop string says.
QUESTIONS = (
    "a",
    "b c",
    "d e f g h i j k",
    "l <Parallel> _ <Goal> <Outline> 1 : m </Outline> <Outline> 2 : n </Outline> </Goal>",
    "o <Parallel> <Goal> <Outline> p </Outline> </Goal> _ <Path> q r",
    "s t 1 2 . 3",
    "u v w x y z a b c d e f",
    "g h e",
)
#: The second of each pair opens a block; the third lies within one.
CHOICES = ("i", "<Parallel> <Goal> <Outline> j </Outline> </Goal> _ <Path> k </Path> _ <Path> l m </Path> _", "n o p")


def load(answers: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """The rows.

    Args:
        answers (`str`, *optional*): JSON file with the right word and the right choice of every row.
    """
    right = json.loads(Path(answers).read_text()) if answers else {}
    rows = [
        {
            "question": question,
            "choices": [f" {choice}" for choice in CHOICES],
            "word": right.get("words", QUESTIONS)[number],
            "label": right.get("labels", [0] * len(QUESTIONS))[number],
        }
        for number, question in enumerate(QUESTIONS)
    ]
    return {"test": datasets.Dataset.from_list(rows)}
