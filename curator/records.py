"""What the stages hand on: a chain of thought, and the draft that grows out of it stage by stage.

Everything is immutable and goes to JSON and back, so that a run can stop between any two calls (`store.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

#: The stages in order (arXiv 2506.09991, section 5.1 and appendix A): a summary tree in two rounds, parallel groups,
#: structure, the original's sentences put back, and Map and Reduce around the paths.
STAGES = ("steps", "substeps", "groups", "structure", "refill", "branches")
#: Where a chain is rejected that nothing was asked about.
SOURCE = "source"
Stage = Literal["steps", "substeps", "groups", "structure", "refill", "branches"]
#: The stage after which a measure of the checks is taken.
MEASURED_AFTER = {"content_distance": "refill", "path_distance": "branches", "answer_checked": "branches"}
#: How the paths of a block belong together: all of them are needed, or one of several attempts is.
Kind = Literal["collective", "selective"]


@dataclass(frozen=True)
class Chain:
    """A problem with a sequential chain of thought.

    Attributes:
        id (`str`): unique in its run.
        question (`str`): the user's message.
        trajectory (`str`): the chain of thought.
        attempt (`str`): the final answer in full, as it followed the chain.
        answer (`str`, *optional*): the short answer that is known to be right.
        columns (`Mapping`): what else the row held, kept as it is.
    """

    id: str
    question: str
    trajectory: str
    attempt: str
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A step of the summary tree, at most two levels deep.

    Attributes:
        label (`str`): `"3"`, or `"3.1"` for its first sub-step.
        title (`str`): what is done in it, one sentence.
        complex (`bool`): whether it is to be divided into sub-steps.
        children (`tuple[Step, ...]`): its sub-steps.
    """

    label: str
    title: str
    complex: bool = False
    children: tuple["Step", ...] = ()

    def leaves(self) -> Iterator["Step"]:
        """The steps below it that text belongs to; itself where it has no sub-steps."""
        for child in self.children:
            yield from child.leaves()
        if not self.children:
            yield self


@dataclass(frozen=True)
class Group:
    """Consecutive steps under one parent that do not need each other.

    Attributes:
        labels (`tuple[str, ...]`): two or more, in order, without a gap.
        kind (`str`): `"collective"` or `"selective"`.
        reason (`str`): why none of them needs another.
    """

    labels: tuple[str, ...]
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Node:
    """A place of the structure: a step, or a block whose paths are nodes.

    Attributes:
        label (`str`): of the step; for a block that of its first path followed by `-` and that of its last, `"2-4"`.
        kind (`str`, *optional*): of a block; `None` for a step.
        children (`tuple[Node, ...]`): paths of a block, or the parts of a step that has sub-steps.
    """

    label: str
    kind: Kind | None = None
    children: tuple["Node", ...] = ()

    def blocks(self) -> Iterator["Node"]:
        """The blocks from here down, inner ones first."""
        for child in self.children:
            yield from child.blocks()
        if self.kind is not None:
            yield self


@dataclass(frozen=True)
class BlockText:
    """What Map and Reduce say of one block.

    Attributes:
        goal (`str`): what the paths are for; may be empty.
        outlines (`tuple[str, ...]`): one per path, without its label.
        paths (`tuple[str, ...]`): text of every path, written to stand alone, without its label. A nested block stands
            in it as `{{block LABEL}}` on a line of its own.
        conclusion (`str`): what follows from all paths together.
    """

    goal: str
    outlines: tuple[str, ...]
    paths: tuple[str, ...]
    conclusion: str


@dataclass(frozen=True)
class Draft:
    """How far a chain has come; every stage fills in its own fields.

    Attributes:
        steps (`tuple[Step, ...]`): by `steps`, with sub-steps by `substeps`.
        groups (`tuple[Group, ...]`): by `groups`.
        structure (`tuple[Node, ...]`): by `structure`.
        texts (`Mapping[str, str]`): by `refill`, the original's text of every leaf step, by label.
        blocks (`Mapping[str, BlockText]`): by `branches`, by the block's label.
        measures (`Mapping[str, float]`): what the checks have measured, such as the edit distance.
        done (`tuple[str, ...]`): names of the stages that are finished.
    """

    steps: tuple[Step, ...] = ()
    groups: tuple[Group, ...] = ()
    structure: tuple[Node, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    blocks: Mapping[str, BlockText] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    done: tuple[str, ...] = ()

    def back_to(self, stage: str) -> "Draft":
        """The draft as it was before `stage` began: its fields and those of later stages are empty again."""
        kept = STAGES[: STAGES.index(stage)]
        empty, fields = Draft(), {}
        for name, owner in _OWNERS.items():
            fields[name] = getattr(self, name) if owner in kept else getattr(empty, name)
        if "steps" in kept and "substeps" not in kept:
            fields["steps"] = tuple(replace(step, children=()) for step in self.steps)
        measures = {name: value for name, value in self.measures.items() if MEASURED_AFTER.get(name) in kept}
        return replace(self, **fields, measures=measures, done=tuple(name for name in self.done if name in kept))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        # `dataclasses.asdict` gives the same, but copies every text and name by way of a dozen calls.
        return {
            "steps": [_step_values(step) for step in self.steps],
            "groups": [
                {"labels": list(each.labels), "kind": each.kind, "reason": each.reason} for each in self.groups
            ],
            "structure": [_node_values(node) for node in self.structure],
            "texts": dict(self.texts),
            "blocks": {
                label: {
                    "goal": each.goal,
                    "outlines": list(each.outlines),
                    "paths": list(each.paths),
                    "conclusion": each.conclusion,
                }
                for label, each in self.blocks.items()
            },
            "measures": dict(self.measures),
            "done": list(self.done),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Draft":
        """The inverse of `to_dict`, also after JSON."""
        return cls(
            steps=tuple(map(_step, values["steps"])),
            groups=tuple(Group(tuple(each["labels"]), each["kind"], each["reason"]) for each in values["groups"]),
            structure=tuple(map(_node, values["structure"])),
            texts=dict(values["texts"]),
            blocks={
                label: BlockText(each["goal"], tuple(each["outlines"]), tuple(each["paths"]), each["conclusion"])
                for label, each in values["blocks"].items()
            },
            measures=dict(values["measures"]),
            done=tuple(values["done"]),
        )


@dataclass(frozen=True)
class Call:
    """A question to a language model.

    Attributes:
        key (`str`): tells it from the other calls of its stage, such as the label of a block.
        messages (`Sequence[Mapping[str, str]]`): chat messages.
    """

    key: str
    messages: Sequence[Mapping[str, str]]


class StageFailure(Exception):
    """An answer that cannot be used, or a result that fails a check.

    Args:
        stage (`str`): the stage to be done again.
        reason (`str`): what is wrong, in words that the model is shown.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason = stage, reason


#: The stage that fills a field of a draft.
_OWNERS = {"steps": "steps", "groups": "groups", "structure": "structure", "texts": "refill", "blocks": "branches"}


def _step_values(step: Step) -> dict[str, Any]:
    children = [_step_values(child) for child in step.children]
    return {"label": step.label, "title": step.title, "complex": step.complex, "children": children}


def _node_values(node: Node) -> dict[str, Any]:
    return {"label": node.label, "kind": node.kind, "children": [_node_values(child) for child in node.children]}


def _step(values: Mapping[str, Any]) -> Step:
    return Step(values["label"], values["title"], values["complex"], tuple(map(_step, values["children"])))


def _node(values: Mapping[str, Any]) -> Node:
    return Node(values["label"], values["kind"], tuple(map(_node, values["children"])))
