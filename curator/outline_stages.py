"""The stages that work on the outline: steps, sub-steps, groups and structure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from multiverse.curator import answers as reading
from multiverse.curator import templates
from multiverse.curator.outline import build_structure, families
from multiverse.curator.records import Call, Chain, Draft, Group, StageFailure, Step
from multiverse.curator.sentences import numbered, split_sentences

_KINDS = ("collective", "selective")


class Steps:
    """Asks for the steps of a chain, each with whether it is to be divided."""

    name = "steps"
    version = templates.version("steps")

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        """One call."""
        shown = numbered(split_sentences(chain.trajectory))
        return [_call(self.name, question=chain.question, sentences=shown, complaint=complaint)]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        """Fills in `steps`, labelled in their order.

        Raises:
            StageFailure: if the answer has no list of steps with a title each, or more than there are sentences.
        """
        values = reading.read_object(self.name, answers[self.name])
        steps = []
        for number, each in enumerate(reading.member(self.name, values, "steps", list), start=1):
            where = f"step {number}"
            step = reading.of_kind(self.name, each, dict, where)
            title = reading.line(
                self.name, reading.member(self.name, step, "title", str, where), f"The title of {where}"
            )
            steps.append(Step(str(number), title, reading.member(self.name, step, "complex", bool, where)))
        if len(steps) < 2:
            raise StageFailure(self.name, f"`steps` has {len(steps)} of them. Divide the solution into two or more.")
        _check_count(self.name, len(steps), chain)
        return replace(draft, steps=tuple(steps), done=(*draft.done, self.name))


class Substeps:
    """Divides the complex steps, in one call for all of them; there is no level below."""

    name = "substeps"
    version = templates.version("substeps")

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        """One call, none where no step is complex."""
        labels = [step.label for step in draft.steps if step.complex]
        if not labels:
            return []
        values = _shown(chain, draft)
        return [_call(self.name, **values, labels=labels, complaint=complaint)]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        """Fills in the children of complex steps; a step that the model finds undivided after all keeps none.

        Raises:
            StageFailure: if a label is unknown or missing, a step has a single sub-step, or one that is no text.
        """
        wanted = [step.label for step in draft.steps if step.complex]
        titles: dict[str, list[str]] = {}
        if wanted:
            values = reading.read_object(self.name, answers[self.name])
            titles = self._titles(reading.member(self.name, values, "substeps", dict), wanted)
        steps = []
        for step in draft.steps:
            named = enumerate(titles.get(step.label, ()), start=1)
            children = tuple(Step(f"{step.label}.{number}", title) for number, title in named)
            steps.append(replace(step, children=children))
        _check_count(self.name, sum(len(step.children) or 1 for step in steps), chain)
        return replace(draft, steps=tuple(steps), done=(*draft.done, self.name))

    def _titles(self, given: Mapping[str, Any], wanted: Sequence[str]) -> dict[str, list[str]]:
        _check_labels(self.name, "`substeps`", given, wanted)
        titles = {}
        for label in wanted:
            children = reading.of_kind(self.name, given[label], list, f"The sub-steps of {label}")
            if len(children) == 1:
                raise StageFailure(
                    self.name, f"Step {label} has one sub-step. Give two or more, or an empty list to leave it whole."
                )
            titles[label] = [
                reading.line(self.name, child, f"Sub-step {number} of {label}")
                for number, child in enumerate(children, start=1)
            ]
        return titles


class Groups:
    """Asks what every step needs, and for the groups of consecutive steps that do not need each other."""

    name = "groups"
    version = templates.version("groups")

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        """One call."""
        return [_call(self.name, **_shown(chain, draft), complaint=complaint)]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        """Fills in `groups`, in the order of the steps. What a step needs is compared with them and not kept.

        Raises:
            StageFailure: if there is no group; one is shorter than two, has a gap, overlaps another one, crosses from
                one parent to another or contradicts `needs`; a label is unknown or missing; or a part is not as asked.
        """
        values = reading.read_object(self.name, answers[self.name])
        order = [step.label for step in _in_order(draft.steps)]
        needs = self._needs(reading.member(self.name, values, "needs", dict), order)
        groups = [
            self._group(each, f"group {number}", draft.steps, order, needs)
            for number, each in enumerate(reading.member(self.name, values, "groups", list), start=1)
        ]
        if not groups:
            raise StageFailure(
                self.name,
                "`groups` is empty. Look once more for cases, attempts, quantities or checks that do not use each "
                "other's results. If there are none, leave it empty again: the solution is then put aside.",
            )
        seen: set[str] = set()
        for group in groups:
            if twice := [label for label in group.labels if label in seen]:
                raise StageFailure(self.name, f"Step {twice[0]} is in two groups. Put it into one, or into none.")
            seen.update(group.labels)
        ordered = sorted(groups, key=lambda group: order.index(group.labels[0]))
        return replace(draft, groups=tuple(ordered), done=(*draft.done, self.name))

    def _needs(self, given: Mapping[str, Any], order: Sequence[str]) -> dict[str, list[str]]:
        _check_labels(self.name, "`needs`", given, order)
        needs = {}
        for number, own in enumerate(order):
            listed = reading.of_kind(self.name, given[own], list, f"`needs` of {own}")
            needs[own] = [reading.label(self.name, each, f"A label in `needs` of {own}") for each in listed]
            for label in needs[own]:
                if label not in order:
                    raise StageFailure(self.name, f"`needs` of {own} names {label!r}, which is no step.")
                if order.index(label) >= number:
                    raise StageFailure(
                        self.name,
                        f"`needs` of {own} names {label}, which does not come before it. Name earlier steps.",
                    )
        return needs

    def _group(
        self, given: Any, where: str, steps: Sequence[Step], order: Sequence[str], needs: Mapping[str, list[str]]
    ) -> Group:
        values = reading.of_kind(self.name, given, dict, where)
        listed = reading.member(self.name, values, "steps", list, where)
        labels = tuple(reading.label(self.name, each, f"A label in {where}") for each in listed)
        kind = reading.member(self.name, values, "kind", str, where)
        if kind not in _KINDS:
            raise StageFailure(self.name, f"`kind` of {where} is {kind!r}. Give one of {', '.join(_KINDS)}.")
        reason = reading.line(
            self.name, reading.member(self.name, values, "reason", str, where), f"`reason` of {where}"
        )
        if unknown := [label for label in labels if label not in order]:
            raise StageFailure(self.name, f"{where} names {unknown[0]!r}, which is no step.")
        if len(labels) < 2:
            raise StageFailure(self.name, f"{where} has {len(labels)} steps. A group has two or more.")
        siblings = next([s.label for s in each] for each in families(steps) if labels[0] in [s.label for s in each])
        if strange := [label for label in labels if label not in siblings]:
            raise StageFailure(
                self.name, f"{where} holds {labels[0]} and {strange[0]}, which do not belong to the same step."
            )
        first = siblings.index(labels[0])
        if list(labels) != siblings[first : first + len(labels)]:
            raise StageFailure(
                self.name, f"{where} holds {', '.join(labels)}, which do not follow one another without a gap."
            )
        for label in labels:
            if needed := [other for other in needs[label] if other in labels]:
                raise StageFailure(
                    self.name,
                    f"{where} holds {label} and {needed[0]}, but `needs` says that {label} needs {needed[0]}. Mend "
                    "what is wrong of the two.",
                )
        return Group(labels, "collective" if kind == "collective" else "selective", reason)


class Structure:
    """Turns tree and groups into blocks. The paper asks a model; a function cannot err here."""

    name = "structure"
    version = "1"

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        """None."""
        return []

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        """Fills in `structure`."""
        structure = build_structure(draft.steps, draft.groups)
        return replace(draft, structure=structure, done=(*draft.done, self.name))


def outline(steps: Sequence[Step], marked: bool = False) -> str:
    """The steps as a model is shown them, one a line, sub-steps indented; with `marked`, leaves begin with `*`."""
    lines = []
    for step in _in_order(steps):
        mark = "* " if marked and not step.children else ""
        lines.append(f"{'  ' * step.label.count('.')}{mark}{step.label}: {step.title}")
    return "\n".join(lines)


def _in_order(steps: Sequence[Step]) -> Iterator[Step]:
    for step in steps:
        yield step
        yield from _in_order(step.children)


def _shown(chain: Chain, draft: Draft) -> dict[str, str]:
    return {
        "question": chain.question,
        "sentences": numbered(split_sentences(chain.trajectory)),
        "outline": outline(draft.steps),
    }


def _call(stage: str, **values: Any) -> Call:
    return Call(stage, templates.messages(stage, **values))


def _check_labels(stage: str, where: str, given: Mapping[str, Any], wanted: Sequence[str]) -> None:
    if unknown := [label for label in given if label not in wanted]:
        raise StageFailure(stage, f"{where} names {unknown[0]!r}. Its keys are {', '.join(wanted)}.")
    if missing := [label for label in wanted if label not in given]:
        raise StageFailure(stage, f"{where} lacks {', '.join(missing)}. Its keys are {', '.join(wanted)}.")


def _check_count(stage: str, steps: int, chain: Chain) -> None:
    sentences = len(split_sentences(chain.trajectory))
    if steps > sentences:
        raise StageFailure(
            stage,
            f"There are {steps} steps for {sentences} sentences, but each needs one of its own. Give fewer steps.",
        )
