"""A made-up evaluation, as its folder and its summary hold it, and readers of what is reported of it."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise, product
from statistics import mean
from typing import Any

from markdown_it import MarkdownIt
from page_reader import Reader

GOOD = (
    "Two sums.\n<Parallel>\n<Goal>\n<Outline>\n1: A\n</Outline>\n<Outline>\n2: B\n</Outline>\n</Goal>\n"
    "<Path>\n1: A is 3+4 = 7\n</Path>\n<Path>\n2: B is 5\n</Path>\n<Conclusion>\n7+5 = 12\n</Conclusion>\n"
    "</Parallel>\nThe answer is \\boxed{12}."
)
BROKEN = "<Parallel>\n<Goal>\n<Outline>\n1: A\n</Outline>\n</Goal>\n<Path>\n1: A is"


def prompts(*tasks: str) -> dict[str, Any]:
    """What the tasks' models were told."""
    forms = {"parallel": "Think step by step and in parallel.", "sequential": "Think step by step."}
    asked = {"role": "user", "content": "{question}"}
    return {
        task: {
            form: {
                "messages": [{"role": "system", "content": system}, asked],
                "text": f"<|im_start|>system\n{system}<|im_end|>\n\n\n\n{{question}}",
            }
            for form, system in forms.items()
        }
        for task in tasks
    }


def condition(task: str = "sums", prompt: str = "parallel", mode: str = "parallel", budget: int | None = None) -> dict:
    """What generations are compared by."""
    return {"task": task, "prompt": prompt, "mode": mode, "budget": budget}


def record(of: Mapping[str, Any], number: int = 0, sample: int = 0, **changes: Any) -> dict[str, Any]:
    """One generation."""
    values: dict[str, Any] = {
        **of,
        "question": f"{of['task']}-{number:04d}",
        "question_number": number,
        "sample": sample,
        "seed": 17 + number,
        "expected": "12",
        "answer": "12",
        "right": True,
        "reason": "right",
        "text": GOOD,
        "finish_reason": "eos",
        "prompt_tokens": 120,
        "generated_tokens": 300,
        "forced_tokens": 12,
        "sequential_steps": 150,
        "kv_slots": 419,
        "degree_of_parallelism": 2.0,
        "blocks": 1,
        "paths": 2,
        "depth": 1,
        "problems": [],
        "path_finish_reasons": {"closed": 2},
        "tokens_by_stage": {"sequential": 10, "map": 20, "process": 250, "reduce": 20},
        "times": {"batch_rows": 1, "batch_seconds": 2.0},
        "batch": number,
    }
    return values | changes


def wrong(of: Mapping[str, Any], number: int = 0, **changes: Any) -> dict[str, Any]:
    """One generation with a wrong answer."""
    return record(of, number, **{"right": False, "answer": "11", "reason": "wrong answer", **changes})


def broken(of: Mapping[str, Any], number: int = 0, **changes: Any) -> dict[str, Any]:
    """One generation that was cut off in a path."""
    problems = ["unclosed tag", "unclosed tag", "unclosed block"]
    cut = {"text": BROKEN, "problems": problems, "answer": None, "reason": "truncated", "finish_reason": "length"}
    return wrong(of, number, **{**cut, **changes})


def row(records: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A condition's row of the summary, from its generations; intervals and times are made up."""
    first, count = records[0], len(records)
    share = sum(each["right"] for each in records) / count
    values: dict[str, Any] = {
        **{name: first[name] for name in ("task", "prompt", "mode", "budget")},
        "questions": len({each["question"] for each in records}),
        "generations": count,
        "samples": 1,
        "right": sum(each["right"] for each in records),
        "pass_at_1": share,
        "pass_at_1_interval_95": [max(share - 0.1234, 0.0), min(share + 0.1234, 1.0)],
        "majority": None,
        "generated_tokens": mean(each["generated_tokens"] for each in records),
        "sequential_steps": mean(each["sequential_steps"] for each in records),
        "degree_of_parallelism": mean(each["degree_of_parallelism"] for each in records),
        "total_tokens_per_step": 1.97,
        "valid_structure": sum(not each["problems"] for each in records) / count,
        "with_blocks": sum(each["blocks"] > 0 for each in records) / count,
        "blocks": mean(each["blocks"] for each in records),
        "paths": mean(each["paths"] for each in records),
        "paths_per_block": 2.0,
        "depth": mean(each["depth"] for each in records),
        "deepest": max(each["depth"] for each in records),
        "problems": dict(Counter(kind for each in records for kind in each["problems"])),
        "finish_reasons": dict(Counter(each["finish_reason"] for each in records)),
        "path_finish_reasons": {"closed": 2 * count},
        "reasons": dict(Counter(each["reason"] for each in records)),
        "tokens_by_stage": {"sequential": 10.0, "map": 20.0, "process": 250.0, "reduce": 20.0},
        "times": {
            "seconds": {"prefill": 0.05, "sequential": 0.4, "map": 0.8, "process": 6.25, "reduce": 0.9},
            "first_token_seconds": 0.061,
            "seconds_per_token": 0.0281,
            "seconds_per_step": 0.0562,
            "peak_memory_bytes": None,
        },
    }
    return values | changes


def summary_of(rows: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A summary with these conditions, and neither comparisons nor curves nor speed."""
    machine = {"machine": {"cores": 2}, "versions": {"torch": "2.13.0"}}
    values: dict[str, Any] = {
        "schema_version": 1,
        "settings": {"model": "demo", "tasks": ["sums"], "limit": None, "seed": 0, "temperature": 0.6},
        "tasks": {},
        "missing": 0,
        "conditions": list(rows),
        "comparisons": [],
        "budget_curves": [],
        "speed": [],
        "sessions": [{"rank": 0, "started": "2026-01-02T03:04:05", **machine}],
    }
    return values | changes


def curve(of: Mapping[str, Any], derived: bool = True) -> dict[str, Any]:
    """Accuracy against budgets."""
    shares = [0.1, 0.4, 0.62, 0.7]
    return {
        **{name: of[name] for name in ("task", "prompt", "mode")},
        "budgets": [64, 128, 256, None],
        "pass_at_1": shares,
        "intervals": [[share - 0.05, share + 0.05] for share in shares],
        "derived": derived,
    }


def speed(batch_size: int, length: int | None, speedup: float = 1.73, task: str = "sums") -> dict[str, Any]:
    """One entry of the speed sweep."""
    return {
        "task": task,
        "prompt": "parallel",
        "batch_size": batch_size,
        "length": length,
        "speedup": speedup,
        "range": [speedup - 0.2, speedup + 0.1],
        "repeats": 5,
        "seconds": {"parallel": 4.2, "sequential": 4.2 * speedup},
        "tokens_per_second": {"parallel": 30.5 * batch_size, "sequential": 30.5 * batch_size / speedup},
        "degree_of_parallelism": {"parallel": 1.9, "sequential": 1.0},
    }


def comparison(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One condition against another."""
    lengths = {
        "first": 150.0,
        "second": 300.0,
        "ratio": 0.5,
        "interval_95": [0.471, 0.533],
        "p_value": 0.0002,
        "verdict": "first needs fewer",
    }
    return {
        "first": dict(first),
        "second": dict(second),
        "questions": 24,
        "left_out": 0,
        "pass_at_1": {
            "first": 0.5,
            "second": 0.4167,
            "difference": 0.0833,
            "interval_95": [-0.0417, 0.2083],
            "first_better": 3,
            "second_better": 1,
            "test": "McNemar, exact",
            "p_value": 0.625,
        },
        "verdict": "no difference shown",
        "sequential_steps": lengths,
        "generated_tokens": {**lengths, "ratio": 1.013, "verdict": "no difference shown"},
    }


PARALLEL, SEQUENTIAL = condition(), condition(mode="sequential")


def whole() -> tuple[dict, list[dict]]:
    """Two tasks in both modes, with everything that a summary can hold."""
    conditions = [condition(task, mode=mode) for task, mode in product(("sums", "aime24"), ("parallel", "sequential"))]
    records = [
        make(each, number)
        for each in conditions
        for number, make in enumerate((record, wrong, broken, record, record, record, record))
    ]
    rows = [row([each for each in records if each.items() >= own.items()]) for own in conditions]
    rows[2]["majority"] = {"k": 8, "value": 0.6, "interval_95": [0.512, 0.687]}
    summary = summary_of(
        rows,
        comparisons=[comparison(conditions[0], conditions[1])],
        budget_curves=[curve(conditions[0]), curve(conditions[0], derived=False), curve(conditions[1])],
        speed=[speed(batch, length) for batch in (1, 8) for length in (128, None)],
    )
    return summary, records


FACTS = {
    "sums": {"source": "problems of the family sums, drawn with seed 1", "sha256": "ab" * 32, "questions": 7},
    "aime24": {"source": "HuggingFaceH4/aime_2024, split train, revision 0a1b2c", "sha256": "cd" * 32, "questions": 7},
}


class Tables(HTMLParser):
    """The cells of every table by its caption, row by row, as words."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.scopes: list[str | None] = []
        self._rows: list[list[str]] = []
        self._caption, self._inside = "", None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
            if tag == "th":
                self.scopes.append(dict(attrs).get("scope"))
        if tag in ("caption", "th", "td"):
            self._inside = tag

    def handle_endtag(self, tag):
        if tag == self._inside:
            self._inside = None
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        if self._inside == "caption":
            self._caption += data
        elif self._inside:
            self._rows[-1][-1] += data


def check_page(page: str) -> Reader:
    """A page by itself: well nested, nothing from elsewhere, no scripts, every id once, every picture in words."""
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    headings = []
    for tag, attributes in reader.elements:
        assert tag not in (
            "script",
            "link",
            "img",
            "image",
            "iframe",
            "object",
            "embed",
            "base",
            "form",
            "foreignobject",
        )
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action", "srcset")]
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
        if "style" in attributes:
            assert not re.search(r"url\((?!#)", attributes["style"])
        if tag == "svg" and "aria-hidden" not in attributes:
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if re.fullmatch("h[1-6]", tag):
            headings.append(int(tag[1]))
    styles = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    assert len(styles) == 1
    assert not any(word in styles[0] for word in ("@import", "url(", "http"))
    assert set(re.findall(r"https?://[^\"'\s<]+", page)) <= {"http://www.w3.org/2000/svg"}
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, each in reader.elements for name, value in each.items() if name.endswith("href")]
    targets += [each["aria-labelledby"] for _, each in reader.elements if "aria-labelledby" in each]
    targets += re.findall(r"url\(#([^)]*)\)", page)
    assert set(targets) <= set(ids)
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert set(Tables(page).scopes) <= {"col", "row", "colgroup", "rowgroup"}
    return reader


def tables_of(page: str) -> dict[str, list[list[str]]]:
    return Tables(page).tables


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Rows of cells of every table, as a reader of Markdown sees them."""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in pairwise(tokens):
        if before.type == "table_open":
            found.append([])
        if before.type == "tr_open":
            found[-1].append([])
        if before.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(each.content for each in token.children or ()))
    return found
