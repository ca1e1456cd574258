"""Two runs, or two conditions of one, question by question, if they can be compared at all."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from multiverse.evaluation.compare import compare_conditions
from multiverse.evaluation.grouping import Questions, Record, asked_conditions, by_condition
from multiverse.evaluation.run_folder import SCHEMA_VERSION, RunFolder
from multiverse.evaluation.settings import Condition

#: Settings that say what is compared.
COMPARED = frozenset({"model", "adapter", "base", "revision"})
#: Settings that are compared elsewhere: conditions are paired one by one, questions and samples are in `tasks`.
_PAIRED = frozenset({"tasks", "data", "limit", "prompts", "modes", "budgets", "samples", "schema_version"})
#: Settings of the timed calls, which no answer depends on.
_TIMED = frozenset({"batch_sizes", "lengths", "repeats"})
#: Settings that greedy decoding makes no use of; what `seed` draws of questions is in `tasks`.
_SAMPLING = frozenset({"seed", "temperature", "top_p", "top_k"})
_FIELDS = ("task", "prompt", "mode", "budget")
_NAMES = ("first", "second")


@dataclass(frozen=True)
class Run:
    """What a comparison needs of a run.

    Attributes:
        settings (`Mapping`): as in settings.json.
        tasks (`Mapping`): as in tasks.json.
        records (sequence of `Mapping`): all generations.
        name (`str`): by which messages call it.
        checkpoint (`Mapping`): as in checkpoint.json; may be empty.
        prompts (`Mapping`): as in prompts.json; may be empty.
    """

    settings: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]
    records: Sequence[Record]
    name: str = ""
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    prompts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: RunFolder) -> "Run":
        """That of a folder.

        Raises:
            ValueError: if the folder holds no run, or one that has not got as far as its tasks.
        """
        settings = folder.settings().to_dict()
        tasks, checkpoint, prompts = (
            folder.fact(name) if (folder.path / f"{name}.json").is_file() else {}
            for name in ("tasks", "checkpoint", "prompts")
        )
        if not tasks:
            raise ValueError(f"`folder`: {folder.path} holds a run that has not read its tasks yet. Go on with it.")
        return cls(settings, tasks, folder.records(), str(folder.path), checkpoint, prompts)

    def facts(self) -> dict[str, Any]:
        """What tells it from another, for a table."""
        return {"name": self.name, **{name: self.settings[name] for name in sorted(COMPARED & self.settings.keys())}}


def compare_runs(
    first: Run,
    second: Run,
    allow: bool = False,
    allow_missing: bool = False,
    select_first: Mapping[str, Any] | None = None,
    select_second: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compares the conditions that two runs share, such as two checkpoints under the same settings.

    To compare modes or prompts instead, of one run or of two, select one for each: with `{"mode": "parallel"}` and
    `{"mode": "sequential"}`, conditions are paired that differ in their mode alone.

    Args:
        first, second (`Run`): may be the same.
        allow (`bool`): compares although settings differ that answers depend on, and lists them. Of a part of a
            condition that has one value on either side, the two are then paired as well.
        allow_missing (`bool`): compares the questions that both have answered in full, where generations are missing.
        select_first, select_second (`Mapping`, *optional*): `task`, `prompt`, `mode` or `budget` by name.

    Returns:
        `dict`: `first` and `second`; `different_settings`, each with both values; `missing` generations of both;
        `comparisons` as `compare_conditions` makes them; `unpaired` conditions of both, in words;
        `other_prompt_texts`, tasks whose messages two chat templates render differently.

    Raises:
        ValueError: if the runs cannot be compared, or not without being told to.
    """
    selections = (dict(select_first or {}), dict(select_second or {}))
    runs = (first, second)
    kept = (_selected(first, selections[0], "first"), _selected(second, selections[1], "second"))
    free = set(selections[0]) & set(selections[1])
    if allow:
        free |= {name for name in _FIELDS if all(len({getattr(each, name) for each in side}) == 1 for side in kept)}
    pairs = _pairs(kept[0], kept[1], free)
    different = _different_settings(first, second, pairs)
    if different and not allow:
        listed = "; ".join(f"{each['setting']} is {each['first']!r} and {each['second']!r}" for each in different)
        raise ValueError(
            f"`first` ({first.name}) and `second` ({second.name}) were made with different settings: {listed}. Make "
            "both alike, or pass `allow=True` (--allow-different-settings) to compare them all the same."
        )
    if not pairs:
        raise ValueError(
            f"`first` and `second` have no condition in common. `first` has {_labels(kept[0])}; `second` has "
            f"{_labels(kept[1])}. Select one of either by `select_first` and `select_second`, or pass `allow=True` "
            "(--allow-different-settings) where only one is left."
        )
    missing = {
        name: sum(_missing(run, pair[number], side) for pair in pairs)
        for number, (name, run, side) in enumerate(zip(_NAMES, runs, kept, strict=True))
    }
    if any(missing.values()) and not allow_missing:
        raise ValueError(
            f"Generations are missing: {missing['first']} of `first`, {missing['second']} of `second`. Finish with "
            "`multiverse evaluate run`, or pass `allow_missing=True` (--allow-missing) to compare only the questions "
            "that both have answered in full."
        )
    comparisons = [compared for pair in pairs if (compared := _compared(runs, kept, pair)) is not None]
    if not comparisons:
        raise ValueError("`first` and `second` have no question in common that both have answered in full.")
    return {
        "schema_version": SCHEMA_VERSION,
        "first": first.facts(),
        "second": second.facts(),
        "different_settings": different,
        "missing": missing,
        "comparisons": comparisons,
        "unpaired": {
            name: [each.label() for each in side if asdict(each) not in [compared[name] for compared in comparisons]]
            for name, side in zip(_NAMES, kept, strict=True)
        },
        "other_prompt_texts": sorted({one.task for one, other in pairs if _differs(runs, (one, other), "text")}),
    }


def _selected(run: Run, selection: Mapping[str, Any], name: str) -> dict[Condition, Questions]:
    unknown = sorted(selection.keys() - set(_FIELDS))
    if unknown:
        raise ValueError(f"`select_{name}` names {', '.join(unknown)}. It may name {', '.join(_FIELDS)}.")
    groups = by_condition(run.records)
    asked = asked_conditions(run.settings)
    kept = [each for each in asked if all(getattr(each, part) == value for part, value in selection.items())]
    if not kept:
        which = ", ".join(f"{part} {value!r}" for part, value in selection.items())
        raise ValueError(f"`select_{name}`: {run.name} has no condition with {which}. It has {_labels(asked)}.")
    return {condition: groups.get(condition, {}) for condition in kept}


def _pairs(
    first: Iterable[Condition], second: Iterable[Condition], free: set[str]
) -> list[tuple[Condition, Condition]]:
    """Conditions that agree in everything that is not free."""

    def fixed(condition: Condition) -> tuple[Any, ...]:
        return tuple(getattr(condition, name) for name in _FIELDS if name not in free)

    partners = {fixed(condition): condition for condition in second}
    return [(condition, partners[fixed(condition)]) for condition in first if fixed(condition) in partners]


def _different_settings(first: Run, second: Run, pairs: Sequence[tuple[Condition, Condition]]) -> list[dict[str, Any]]:
    """What answers depend on, apart from what is compared, where it differs."""
    ignored = COMPARED | _PAIRED | _TIMED
    if not any(run.settings.get("do_sample") for run in (first, second)):
        ignored |= _SAMPLING
    # A run that was interrupted early has not looked at its checkpoint.
    known = bool(first.checkpoint and second.checkpoint)
    values = [_values(run, ignored, known) for run in (first, second)]
    names = list(dict.fromkeys(name for each in values for name in each))
    for one, other in pairs:
        for fact in ("sha256", "samples"):
            name = f"{fact} of task {one.task}" if one.task == other.task else f"{fact} of the task"
            names.append(name)
            values[0][name], values[1][name] = first.tasks[one.task].get(fact), second.tasks[other.task].get(fact)
        if _differs((first, second), (one, other), "messages"):
            names.append(f"{one.prompt} prompt of task {one.task}")
            values[0][names[-1]], values[1][names[-1]] = (
                run.prompts[one.task][one.prompt]["messages"] for run in (first, second)
            )
    found = [
        {"setting": name, "first": values[0].get(name), "second": values[1].get(name)} for name in dict.fromkeys(names)
    ]
    return [each for each in found if each["first"] != each["second"]]


def _values(run: Run, ignored: frozenset[str], known: bool) -> dict[str, Any]:
    values = {name: value for name, value in run.settings.items() if name not in ignored}
    if known:
        values["dtype of the weights"] = run.checkpoint["dtype"]
        for name, value in sorted(run.checkpoint.get("generation_config", {}).items()):
            # Ids are those of the checkpoint's own vocabulary.
            if not name.endswith("_token_id"):
                values[f"generation_config.{name}"] = value
    return values


def _differs(runs: tuple[Run, Run], pair: tuple[Condition, Condition], part: str) -> bool:
    """Whether one and the same prompt of one and the same task has other messages, or another text, in two runs."""
    task, form = pair[0].task, pair[0].prompt
    if (pair[1].task, pair[1].prompt) != (task, form) or not all(task in run.prompts for run in runs):
        return False
    return runs[0].prompts[task][form][part] != runs[1].prompts[task][form][part]


def _missing(run: Run, condition: Condition, groups: Mapping[Condition, Questions]) -> int:
    task = run.tasks[condition.task]
    return int(task["questions"] * task["samples"] - sum(map(len, groups[condition].values())))


def _compared(
    runs: tuple[Run, Run], kept: tuple[Mapping[Condition, Questions], ...], pair: tuple[Condition, Condition]
) -> dict[str, Any] | None:
    one, other = (kept[number][pair[number]] for number in (0, 1))
    for question in sorted(one.keys() & other.keys()):
        expected = [str(side[question][0]["expected"]) for side in (one, other)]
        if expected[0] != expected[1]:
            raise ValueError(
                f"`first` and `second` mean different questions by {question!r}: right is {expected[0]!r} and "
                f"{expected[1]!r}. Answers to different questions cannot be paired; run both on the same ones."
            )
    samples = [int(run.tasks[condition.task]["samples"]) for run, condition in zip(runs, pair, strict=True)]
    compared = compare_conditions(one, other, samples[0], samples[1])
    return None if compared is None else {"first": asdict(pair[0]), "second": asdict(pair[1]), **compared}


def _labels(conditions: Iterable[Condition]) -> str:
    return "; ".join(condition.label() for condition in conditions)
