"""The two faces of a report, an HTML page and a Markdown file, from the summary and the generations of a run."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from multiverse.evaluation import markdown
from multiverse.evaluation import report_tables as tables
from multiverse.evaluation.paper import BENCHMARKS, FIGURE_7, FIGURE_8, SOURCE
from multiverse.evaluation.pictures import MOST_SWEEPS, MOST_TASKS, budget_pictures, pairs, speed_pictures
from multiverse.evaluation.report_generations import (
    MOST_MALFORMED,
    MOST_RIGHT,
    MOST_WRONG,
    Shown,
    choose,
    render_generations,
)
from multiverse.evaluation.settings import Condition
from multiverse.hub_card.drawings import escaped
from multiverse.hub_card.page import page_head
from multiverse.version import __version__

#: Bytes that the page may have without its times. These are left out of the count, as they differ from run to run and
#: must not decide which generations are shown.
LARGEST = 4_400_000
_FOLDER = Path(__file__).resolve().parent
# Points of a curve in the Markdown file.
_POINTS = 8
# Tasks of which the head of the report speaks.
_SPOKEN_OF = 5


class Marker(NamedTuple):
    """What stands around times, speed and machines, which differ when a run is repeated."""

    begin: str = "<!-- times -->"
    end: str = "<!-- end of times -->"


_MARKER = Marker()


def without_times(report: str) -> str:
    """A report, page or Markdown, without what differs when the same run is repeated."""
    return re.sub(f"{re.escape(_MARKER.begin)}.*?{re.escape(_MARKER.end)}", "", report, flags=re.DOTALL)


def report_facts(
    summary: Mapping[str, Any],
    tasks: Mapping[str, Mapping[str, Any]],
    published_prompts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What both faces of the report show.

    Args:
        summary (`Mapping`): of the run.
        tasks (`Mapping`): facts of every task by its name; `texts`, questions by id, are not among them.
        published_prompts (`Mapping`): by task and form, `messages` and `text`, see `prompts.published_prompts`.
    """
    settings = dict(summary["settings"])
    known = {"schema_version", "settings", "tasks", "missing", "conditions", "comparisons", "budget_curves"}
    further = {name: value for name, value in summary.items() if name not in {*known, *tables.VARYING}}
    facts = {name: {key: value for key, value in each.items() if key != "texts"} for name, each in tasks.items()}
    return {
        "title": f"Evaluation of {settings.get('model', 'a checkpoint')}",
        "missing": summary["missing"],
        "sentences": sentences(summary),
        "remarks": _remarks(summary, settings),
        "paper": tables.paper_table(summary),
        "paper_source": SOURCE,
        "figure_7": FIGURE_7,
        "figure_8": FIGURE_8,
        "accuracy": tables.accuracy_table(summary),
        "comparisons": tables.comparison_table(summary),
        "budget_table": tables.budget_table(summary),
        "structure": tables.structure_table(summary),
        "counts": tables.count_tables(summary),
        "stages": tables.stage_table(summary),
        "times": tables.time_table(summary),
        "speed_table": tables.speed_table(summary),
        "settings": tables.flattened(settings),
        "further": {
            name.replace("_", " "): tables.flattened(value if isinstance(value, Mapping) else {name: value})
            for name, value in further.items()
        },
        "tasks": {name: tables.flattened(each) for name, each in facts.items()},
        "prompts": _prompts(published_prompts),
        "machines": _machines(summary.get("sessions") or []),
        "marker": _MARKER,
        "version": __version__,
    }


def render_page(
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    published_prompts: Mapping[str, Mapping[str, Any]],
) -> str:
    """A page that needs nothing but itself: no scripts, no fonts, no pictures from elsewhere.

    Args:
        summary, tasks, published_prompts: see `report_facts`.
        records (sequence of `Mapping`): all generations, in the order of the run.

    Returns:
        `str`: an HTML document of at most `LARGEST` bytes without its times, unless its tables alone need more.
    """
    facts = report_facts(summary, tasks, published_prompts)
    contents = {
        "accuracy": "Accuracy and parallelism",
        "budget": "Accuracy against steps" if facts["budget_table"] else "",
        "structure": "Structure",
        "speed": "Time and speed",
        "generations": "Generations",
        "settings": "Settings",
        "machine": "Machine and versions",
    }
    template = _environment().from_string((_FOLDER / "report.html.jinja").read_text(encoding="utf-8"))
    render = partial(
        template.render,
        **facts,
        head=page_head(facts["title"], _STYLE),
        contents=[(id_, words) for id_, words in contents.items() if words],
        budget_pictures=budget_pictures(summary),
        budget_note=_drawn(len(tables.names(summary.get("budget_curves") or [], "task")), MOST_TASKS),
        speed_pictures=speed_pictures(summary),
        speed_note=_drawn(len(pairs(summary.get("speed") or [])), MOST_SWEEPS),
    )
    chosen = choose(records)
    # First without generations: what is left is theirs, with half a kilobyte for the link to each malformed one.
    bare = render(generations=Shown("", 0, 0, []), generations_note="")
    room = LARGEST - len(without_times(bare).encode()) - 512 * sum(bool(record["problems"]) for record in chosen)
    texts = {name: each["texts"] for name, each in tasks.items() if each.get("texts")}
    shown = render_generations(chosen, max(room, 0), texts)
    return render(generations=shown, generations_note=_note(records, shown))


def render_markdown(
    summary: Mapping[str, Any],
    tasks: Mapping[str, Mapping[str, Any]],
    published_prompts: Mapping[str, Mapping[str, Any]],
) -> str:
    """The table for a model card, and below it everything that the page has but the generations.

    Args:
        summary, tasks, published_prompts: see `report_facts`.
    """
    facts = report_facts(summary, tasks, published_prompts)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters |= {"cell": markdown.cell, "fenced": markdown.fenced, "table": markdown.table}
    template = environment.from_string((_FOLDER / "report.md.jinja").read_text(encoding="utf-8"))
    paper = facts["paper"]
    rows = [
        (name, *(f"{cell.pass_at_1} / {cell.parallelism}" for cell in cells if cell.pass_at_1 != tables.NONE))
        for name, cells in paper.published
    ]
    shared = [task for task in paper.tasks if task in BENCHMARKS.values()]
    published = tables.Table("", ("model", *shared), rows)
    facts["budget_table"] = tables.budget_table(summary, _POINTS)
    text = template.render(**facts, card=tables.card_table(summary), published=published)
    # Blocks of code are left as they are.
    lines = re.sub(
        r"(`{3,})\n.*?\n\1(?=\n)|\n{3,}", lambda found: found[0] if found[1] else "\n\n", text, flags=re.DOTALL
    )
    return lines.strip() + "\n"


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What a reader should know first: one sentence for each of the first few tasks."""
    by_task: dict[str, Mapping[str, Any]] = {}
    for row in summary["conditions"]:
        best = by_task.get(row["task"])
        # What the model is made for, where that was run.
        if best is None or Condition.of(row) == Condition(row["task"]):
            by_task[row["task"]] = row
    found = []
    for row in list(by_task.values())[:_SPOKEN_OF]:
        found.append(
            f"{tables.label(row)}: {tables.percent(row['pass_at_1'])}% of {tables.number(row['generations'])} "
            f"generations for {tables.number(row['questions'])} questions are right (95% interval "
            f"{tables.interval(row['pass_at_1_interval_95'])}), with "
            f"{tables.number(row['degree_of_parallelism'], 2)} tokens per sequential step; "
            f"{tables.percent(row['valid_structure'])}% are well-formed."
        )
    if len(by_task) > _SPOKEN_OF:
        found.append(f"Of {len(by_task) - _SPOKEN_OF} more tasks the tables tell.")
    return found


def _remarks(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What must be known before values are held against the paper's."""
    if not any(row["task"] in BENCHMARKS for row in summary["conditions"]):
        return []
    remarks = [
        "The published models have 32B parameters. Their values are comparable only where questions, prompts, "
        "sampling and the longest answer are the same; the settings of this run are below."
    ]
    if settings.get("limit") is not None:
        remarks.append(
            f"This run has asked the first {tables.number(settings['limit'])} questions of every task at most; the "
            "published values are of whole benchmarks."
        )
    return remarks


def _prompts(published: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What was said in words, by the names of all tasks with the same prompts."""
    grouped: dict[str, tuple[dict[str, str], list[str]]] = {}
    for task, forms in published.items():
        words: dict[str, str] = {}
        for form, prompt in forms.items():
            for message in prompt["messages"]:
                words[f"{form} prompt, {message['role']}"] = message["content"]
            if prompt["text"] is not None:
                words[f"{form} prompt, as the model reads it"] = prompt["text"]
        grouped.setdefault(repr(words), (words, []))[1].append(task)
    return {", ".join(names): words for words, names in grouped.values()}


def _machines(sessions: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, str], list[str]]]:
    """What is the same of several sessions, and the process and the time of each."""
    own = ("rank", "world", "started")
    grouped: dict[str, tuple[dict[str, str], list[str]]] = {}
    for session in sessions:
        common = tables.flattened({name: value for name, value in session.items() if name not in own})
        starts = ", ".join(f"{name} {_moment(session[name])}" for name in own if name in session)
        grouped.setdefault(repr(common), (common, []))[1].append(starts or "unknown time")
    return list(grouped.values())


def _moment(value: Any) -> str:
    """Seconds since 1970 as a date, and anything else as it is."""
    if not isinstance(value, float):
        return tables.shown(value)
    return datetime.fromtimestamp(value, timezone.utc).isoformat(timespec="seconds")


def _note(records: Sequence[Mapping[str, Any]], shown: Shown) -> str:
    wrong = sum(not record["right"] for record in records)
    note = (
        f"{shown.generations:,} of {len(records):,} generations are shown ({wrong:,} of all are wrong), taken from "
        f"all conditions in turn: the first {MOST_WRONG} wrong ones, {MOST_RIGHT} right ones and {MOST_MALFORMED} "
        "more that are malformed, as far as there are so many and they fit. All are in the folder of the run, under "
        "records/. Lengths and timelines are counted in words, and a timeline is what the structure allows, not a "
        "measurement."
    )
    if shown.cut:
        note += f" {shown.cut:,} long texts are shown without their middle."
    return note


def _drawn(found: int, most: int) -> str:
    return "" if found <= most else f"The first {most} of {found} are drawn; the table has all."


def _environment() -> Environment:
    def finalize(value: Any) -> Markup:
        # Also what HTML cannot hold, and quotes, which Jinja's own escaping lets pass or leaves to the reader.
        return value if isinstance(value, Markup) else Markup(escaped(str(value)))

    return Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=True, finalize=finalize
    )


_STYLE = """
:root { color-scheme: light dark; }
.ev-page { margin: 0 auto; max-width: 80rem; padding: 1rem; font-family: system-ui, sans-serif; color: #1c1e21;
  background: #fff; }
@media (prefers-color-scheme: dark) { .ev-page { color: #e4e6ea; background: #16181d; } }
.ev-page h1 { font-size: 1.5rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
.ev-page h2 { font-size: 1.25rem; margin: 2.2rem 0 0.3rem; }
.ev-page h3 { font-size: 1.05rem; margin: 1.4rem 0 0.3rem; }
.ev-page h4 { font-size: 0.9rem; margin: 0.8rem 0 0.2rem; }
.ev-page p { max-width: 48rem; margin: 0.3rem 0 0.6rem; overflow-wrap: anywhere; }
.ev-page a { color: inherit; }
.ev-page nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; list-style: none; padding: 0; }
.ev-page nav a { display: inline-block; padding: 0.25rem 0; }
.ev-page table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums;
  margin: 0.4rem 0 1rem; }
.ev-page caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
.ev-page caption span, .ev-group span { display: inline-block; position: sticky; left: 0; white-space: normal;
  max-width: calc(100vw - 3.5rem); overflow-wrap: anywhere; }
.ev-page th, .ev-page td { padding: 0.25rem 0.6rem; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent); }
.ev-page thead th { white-space: normal; vertical-align: bottom; }
.ev-page th:first-child { text-align: left; white-space: normal; min-width: 9rem; max-width: 22rem;
  overflow-wrap: anywhere; }
.ev-page tbody th { font-weight: normal; }
.ev-page thead tr + tr th:first-child { text-align: right; min-width: 0; }
.ev-page th[scope="colgroup"] { text-align: center; overflow-wrap: anywhere; }
.ev-page tbody th.ev-group { font-weight: 600; text-align: left; max-width: none; padding-top: 0.7rem; }
.ev-page summary { cursor: pointer; padding: 0.25rem 0; overflow-wrap: anywhere; }
.ev-pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 24rem)); gap: 1rem; }
.ev-pictures figure { margin: 0; min-width: 0; }
.ev-pictures figcaption { font-weight: 600; font-size: 0.9rem; overflow-wrap: anywhere; }
.ev-picture { display: block; width: 100%; height: auto; }
.ev-picture * { stroke-linejoin: round; }
.ev-values { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr));
  gap: 0.4rem 1rem; margin: 0.3rem 0; }
.ev-values dt { font-size: 0.8rem; opacity: 0.8; overflow-wrap: anywhere; }
.ev-values dd { margin: 0; min-width: 0; }
.ev-columns { columns: 18rem; }
.ev-generation { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: 0.2rem 0; }
.ev-right, .ev-wrong, .ev-malformed { border-radius: 3px; padding: 0 0.4em; font-size: 0.85em; color: #fff; }
.ev-right { background: #1b7a3d; }
.ev-wrong { background: #c1121f; }
.ev-malformed { background: #8a5300; }
.ev-notice { border-left: 4px solid #c1121f; padding: 0.3rem 0.8rem; }
"""
