"""The tables of a report, made from the summary of a run; the page and the Markdown file write the same ones."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from multiverse.evaluation.paper import BENCHMARKS, TABLE_2
from multiverse.evaluation.settings import Condition

#: In the place of a value that there is none of.
NONE = "–"
#: Parts of a summary that are not the same when a run is repeated.
VARYING = ("times", "speed", "sessions")
STAGES = ("prefill", "sequential", "map", "process", "reduce")

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Words in rows and columns.

    Attributes:
        caption (`str`): what it shows.
        columns (`tuple[str, ...]`): heads of the columns; the first column names the row.
        rows (sequence of `tuple[str, ...]`): as many cells each as there are columns.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Cell(NamedTuple):
    """One task of Table 2: pass@1 in percent with its interval, and generated tokens per sequential step."""

    pass_at_1: str
    interval: str
    parallelism: str


@dataclass(frozen=True)
class PaperTable:
    """Table 2 of the paper for a checkpoint, with the published rows where a task is one of the paper's.

    Attributes:
        tasks (`list[str]`): heads of the columns.
        own (`list[tuple[str, list[Cell]]]`): name and cells of every row.
        published (`list[tuple[str, list[Cell]]]`): the paper's rows; none where no task is the paper's.
    """

    tasks: list[str]
    own: list[tuple[str, list[Cell]]]
    published: list[tuple[str, list[Cell]]]


def percent(value: float | None) -> str:
    """A share, in percent with one decimal."""
    return NONE if value is None or math.isnan(value) else f"{100 * value:.1f}"


def number(value: float | None, digits: int = 1) -> str:
    """A number with as many decimals; whole ones that were counted go without."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def interval(ends: Sequence[float | None] | None, shown: Callable[[float | None], str] = percent) -> str:
    """Both ends of an interval, `44.0 to 63.1`."""
    return NONE if ends is None else " to ".join(shown(end) for end in ends)


def label(condition: Any) -> str:
    """A condition, or a row that has one, in words."""
    return Condition.of(condition).label() if isinstance(condition, Mapping) else str(condition)


def arm(condition: Mapping[str, Any]) -> str:
    """A condition in words, without its task."""
    return Condition.of(condition).label().removeprefix(f"{condition['task']}, ")


def names(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """Every value of `key` in the order in which it comes first."""
    return list(dict.fromkeys(row[key] for row in rows))


def paper_table(summary: Summary) -> PaperTable:
    """Table 2: rows are prompts and modes, columns pass@1 and degree of parallelism of every task."""
    conditions = summary["conditions"]
    tasks, empty = names(conditions, "task"), Cell(NONE, "", NONE)
    rows: dict[str, dict[str, Cell]] = {}
    for row in conditions:
        rows.setdefault(arm(row), {})[row["task"]] = Cell(
            percent(row["pass_at_1"]), interval(row["pass_at_1_interval_95"]), number(row["degree_of_parallelism"], 2)
        )
    own = [(name, [cells.get(task, empty) for task in tasks]) for name, cells in rows.items()]
    published = []
    if any(task in BENCHMARKS for task in tasks):
        for name, values in TABLE_2.items():
            cells_of = {
                task: Cell(f"{cell.pass_at_1:.1f}", "", f"{cell.parallelism:.2f}") for task, cell in values.items()
            }
            published.append((name, [cells_of.get(task, empty) for task in tasks]))
    return PaperTable([BENCHMARKS.get(task, task) for task in tasks], own, published)


def accuracy_table(summary: Summary) -> Table:
    """Every condition with what was right, and with how many tokens and steps."""
    rows = []
    for row in summary["conditions"]:
        rows.append(
            (
                label(row),
                number(row["questions"]),
                number(row["generations"]),
                number(row["right"]),
                percent(row["pass_at_1"]),
                interval(row["pass_at_1_interval_95"]),
                _agreed(row["majority"]),
                number(row["generated_tokens"]),
                number(row["sequential_steps"]),
                number(row["degree_of_parallelism"], 2),
                number(row["total_tokens_per_step"], 2),
            )
        )
    columns = (
        *("condition", "questions", "generations", "right", "pass@1, %", "95% interval", "maj@k, % (95% interval)"),
        *("tokens", "sequential steps", "# parallel", "all tokens / all steps"),
    )
    return Table("Accuracy, tokens and steps of every condition", columns, rows)


def card_table(summary: Summary) -> Table:
    """The few columns that a model card has room for."""
    rows = [
        (
            label(row),
            f"{number(row['right'])} of {number(row['generations'])}",
            f"{percent(row['pass_at_1'])} ({interval(row['pass_at_1_interval_95'])})",
            _agreed(row["majority"]),
            number(row["degree_of_parallelism"], 2),
            number(row["generated_tokens"]),
            number(row["sequential_steps"]),
            percent(row["valid_structure"]),
        )
        for row in summary["conditions"]
    ]
    columns = (
        *("condition", "right", "pass@1, % (95% interval)", "maj@k, % (95% interval)", "# parallel", "tokens"),
        *("sequential steps", "well-formed, %"),
    )
    return Table("Results", columns, rows)


def structure_table(summary: Summary) -> Table:
    """Blocks and paths of every condition."""
    rows = [
        (
            label(row),
            percent(row["valid_structure"]),
            percent(row["with_blocks"]),
            number(row["blocks"], 2),
            number(row["paths"], 2),
            number(row["paths_per_block"], 2),
            number(row["depth"], 2),
            number(row["deepest"]),
        )
        for row in summary["conditions"]
    ]
    columns = (
        *("condition", "well-formed, %", "with blocks, %", "blocks", "paths", "paths per block", "depth", "deepest"),
    )
    return Table("Structure of the generations (means)", columns, rows)


#: Fields of a condition that count by name, and what their table is about.
_COUNTS = {
    "problems": "Structure problems",
    "finish_reasons": "Why generations ended",
    "path_finish_reasons": "Why paths ended",
    "reasons": "Verdicts of the judge",
}


def count_tables(summary: Summary) -> list[Table]:
    """What went wrong, why generations and paths ended, and the verdicts; a table each, where there is anything."""
    tables = []
    for key, caption in _COUNTS.items():
        found = sorted({str(name) for row in summary["conditions"] for name in row[key]})
        rows = [
            (label(row), *(number(row[key].get(name, 0)) for name in found)) for row in summary["conditions"] if found
        ]
        if found:
            tables.append(Table(caption, ("condition", *found), rows))
    return tables


def stage_table(summary: Summary) -> Table:
    """Mean tokens of a generation by stage, with their share."""
    rows, stages = [], _stages(row["tokens_by_stage"] for row in summary["conditions"])
    for row in summary["conditions"]:
        tokens = row["tokens_by_stage"]
        total = sum(tokens.values())
        shares = (
            f"{number(tokens[stage])} ({percent(tokens[stage] / total if total else None)}%)"
            if stage in tokens
            else NONE
            for stage in stages
        )
        rows.append((label(row), *shares))
    return Table("Tokens of a generation by stage (mean and share)", ("condition", *stages), rows)


def time_table(summary: Summary) -> Table:
    """Seconds of a generation by stage, and what stands under `times` beside them."""
    stages = _stages(row["times"]["seconds"] or {} for row in summary["conditions"])
    rows = []
    for row in summary["conditions"]:
        times = row["times"]
        rows.append(
            (
                label(row),
                *(number((times["seconds"] or {}).get(stage), 3) for stage in stages),
                number(times["first_token_seconds"], 3),
                number(_scaled(times["seconds_per_token"], 1e3), 2),
                number(_scaled(times["seconds_per_step"], 1e3), 2),
                number(_scaled(times["peak_memory_bytes"], 2**-20)),
            )
        )
    columns = (
        *("condition", *(f"{stage}, s" for stage in stages), "first token, s"),
        *("per token, ms", "per step, ms", "peak memory, MiB"),
    )
    return Table("Time by stage (means), to the first token, per token and per step (medians)", columns, rows)


def speed_table(summary: Summary) -> Table | None:
    """The speed sweep, if there was one."""
    entries = summary.get("speed") or []
    if not entries:
        return None
    rows = [
        (
            f"{entry['task']}, {entry['prompt']} prompt",
            number(entry["batch_size"]),
            "its own" if entry["length"] is None else number(entry["length"]),
            number(entry["speedup"], 2),
            interval(entry["range"], lambda value: number(value, 2)),
            number(entry["repeats"]),
            *(number(entry["seconds"].get(mode), 3) for mode in ("parallel", "sequential")),
            *(number(entry["tokens_per_second"].get(mode)) for mode in ("parallel", "sequential")),
            *(number(entry["degree_of_parallelism"].get(mode), 2) for mode in ("parallel", "sequential")),
        )
        for entry in entries
    ]
    columns = (
        *("task", "batch", "length", "speed-up", "lowest to highest", "pairs", "parallel, s", "sequential, s"),
        *("parallel, tokens/s", "sequential, tokens/s", "parallel, # parallel", "sequential, # parallel"),
    )
    return Table("Speed-up over the sequential twin: median of paired runs", columns, rows)


def budget_table(summary: Summary, most: int | None = None) -> Table | None:
    """Accuracy against the steps that are allowed, if there is a curve.

    Args:
        summary (`Mapping`): of the run.
        most (`int`, *optional*): points of a derived curve, evenly chosen, the last among them; all by default.
    """
    rows = []
    for curve in summary.get("budget_curves") or []:
        how = "from the run without a limit" if curve["derived"] else "run with the limit"
        points = list(zip(curve["budgets"], curve["pass_at_1"], curve["intervals"], strict=True))
        if most is not None and curve["derived"]:
            points = points[:: -math.ceil(len(points) / most)][::-1]
        for budget, share, ends in points:
            allowed = "no limit" if budget is None else number(budget)
            rows.append((label({**curve, "budget": None}), allowed, percent(share), interval(ends), how))
    columns = ("condition", "steps allowed", "pass@1, %", "95% interval", "how")
    return Table("Accuracy against sequential steps allowed", columns, rows) if rows else None


def comparison_table(summary: Summary) -> Table | None:
    """Conditions of the run against one another, as `compare.compare_conditions` has found."""
    rows = []
    for each in summary.get("comparisons") or []:
        right, steps, tokens = each["pass_at_1"], each["sequential_steps"], each["generated_tokens"]
        rows.append(
            (
                f"{label(each['first'])} – {label(each['second'])}",
                number(each["questions"]),
                f"{percent(right['difference'])} ({interval(right['interval_95'])})",
                f"{number(right['first_better'])} / {number(right['second_better'])}",
                f"{right['p_value']:.4g} ({right['test']})",
                each["verdict"],
                *(f"{number(of['ratio'], 3)} ({interval(of['interval_95'], _ratio)})" for of in (steps, tokens)),
                steps["verdict"],
            )
        )
    columns = (
        *("first – second", "questions", "pass@1, points (95% interval)", "first / second better", "p (test)"),
        *("verdict", "steps, ratio (95% interval)", "tokens, ratio (95% interval)", "verdict on steps"),
    )
    return Table("First condition against the second, paired by question", columns, rows) if rows else None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Names and values as words; what stands inside a value is named by the words of both.

    Args:
        values (`Mapping`): of JSON.
        prefix (`str`): of every name.
    """
    found: dict[str, str] = {}
    for name, value in values.items():
        words = f"{prefix}{name}".replace("_", " ")
        found |= flattened(value, f"{words} ") if isinstance(value, Mapping) and value else {words: shown(value)}
    return found


def shown(value: Any) -> str:
    """A value of JSON in words, numbers to the last digit."""
    if value is None or value == [] or value == {}:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple) and not any(isinstance(each, list | tuple | Mapping) for each in value):
        return ", ".join(map(shown, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _agreed(majority: Mapping[str, Any] | None) -> str:
    if majority is None:
        return NONE
    return f"{percent(majority['value'])} ({interval(majority['interval_95'])}), k = {majority['k']}"


def _ratio(value: float | None) -> str:
    return number(value, 3)


def _stages(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Stages that any row has, the known ones in the order in which they follow one another."""
    found = {stage for row in rows for stage in row}
    return [*(stage for stage in STAGES if stage in found), *sorted(found - set(STAGES))]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
