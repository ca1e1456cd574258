"""A chain that a good model has curated, answer by answer, and random drafts, for the tests of the curator."""

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from multiverse.curator.checks import check
from multiverse.curator.records import BlockText, Chain, Draft, Group, Node, Step
from multiverse.curator.stages import make_stages

SENTENCES = (
    "First I note what is asked for: three quantities of two shapes, which are to be added up in the end.\n",
    "The rectangle comes with its area and with its perimeter, and both are needed here.\n",
    "Its area is 3*4 = 12.\n",
    "Similarly, its perimeter is 2*(3+4) = 14.\n\n",
    "For the square, the side is given as 5, so that its area must be $s^2 = 25$. ",
    "Together this makes 12+14+25 = 51.\n",
    "Nothing was forgotten, and so that is the result.\n",
    "Answer: 51",
)
CHAIN = Chain(
    id="shapes",
    question="A rectangle has sides 3 and 4, a square side 5. Add area and perimeter of the one to the other's area.",
    trajectory="".join(SENTENCES),
    attempt="The three add up to $\\boxed{51}$.",
    answer="51",
)
INNER, OUTER = "2.2-2.3", "2-3"

#: What a good model answers, by stage, and by block in the last one.
ANSWERS: dict[str, Any] = {
    "steps": {
        "steps": [
            {"title": "Say what is asked for.", "complex": False},
            {"title": "Treat the rectangle.", "complex": True},
            {"title": "Treat the square.", "complex": False},
            {"title": "Add everything up.", "complex": False},
        ]
    },
    "substeps": {"substeps": {"2": ["Name both quantities.", "Compute the area.", "Compute the perimeter."]}},
    "groups": {
        "needs": {"1": [], "2": ["1"], "2.1": [], "2.2": ["2.1"], "2.3": ["2.1"], "3": ["1"], "4": ["2", "3"]},
        "groups": [
            {"steps": ["2", "3"], "kind": "collective", "reason": "They are two shapes."},
            {"steps": ["2.2", "2.3"], "kind": "collective", "reason": "Both come from the sides."},
        ],
    },
    "refill": {"sentences": {"1": [1, 1], "2.1": [2, 2], "2.2": [3, 3], "2.3": [4, 4], "3": [5, 5], "4": [6, 8]}},
    INNER: {
        "goal": "",
        "outlines": ["The area.", "The perimeter."],
        "paths": ["The area of the rectangle is 3*4 = 12.", "The perimeter of the rectangle is 2*(3+4) = 14."],
        "conclusion": "The area is 12 and the perimeter 14.",
    },
    OUTER: {
        "goal": "Work out the quantities of both shapes.",
        "outlines": ["The rectangle.", "The square."],
        "paths": [
            f"{SENTENCES[1]}{{{{block {INNER}}}}}",
            "For the square, the side is given as 5, so that its area must be $s^2 = 25$.",
        ],
        "conclusion": "The quantities are 12, 14 and 25.",
    },
}

#: The text that comes of it, written by hand from LAYOUT.md, section 1.
RENDERED = """\
First I note what is asked for: three quantities of two shapes, which are to be added up in the end.
<Parallel>
<Goal>
Work out the quantities of both shapes.
<Outline>
1: The rectangle.
</Outline>
<Outline>
2: The square.
</Outline>
</Goal>
<Path>
1: The rectangle comes with its area and with its perimeter, and both are needed here.
<Parallel>
<Goal>
<Outline>
1.1: The area.
</Outline>
<Outline>
1.2: The perimeter.
</Outline>
</Goal>
<Path>
1.1: The area of the rectangle is 3*4 = 12.
</Path>
<Path>
1.2: The perimeter of the rectangle is 2*(3+4) = 14.
</Path>
<Conclusion>
The area is 12 and the perimeter 14.
</Conclusion>
</Parallel>
</Path>
<Path>
2: For the square, the side is given as 5, so that its area must be $s^2 = 25$.
</Path>
<Conclusion>
The quantities are 12, 14 and 25.
</Conclusion>
</Parallel>
Together this makes 12+14+25 = 51.
Nothing was forgotten, and so that is the result.
Answer: 51"""


def curated(
    until: str | None = None, chain: Chain = CHAIN, answers: Mapping[str, Any] = ANSWERS, checks: bool = True
) -> Draft:
    """The draft as it is before the stage `until`, or finished."""
    draft = Draft()
    for stage in make_stages():
        if stage.name == until:
            break
        while stage.name not in draft.done:
            given = {call.key: json.dumps(answers[call.key]) for call in stage.calls(chain, draft)}
            draft = stage.accept(chain, draft, given)
        if checks:
            draft = check(chain, draft, stage.name)
    return draft


_WORDS = "the value that we look for is found by taking what was known and going on from there"


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A sentence of some length, with what follows it."""
    words = draw(st.lists(st.sampled_from(_WORDS.split()), min_size=14, max_size=20))
    return f"{' '.join(words).capitalize()}." + draw(st.sampled_from([" ", "\n", "\n\n"]))


@st.composite
def groups_of(draw: st.DrawFn, steps: list[Step]) -> list[Group]:
    """Some groups among siblings."""
    groups, at = [], 0
    while at < len(steps):
        size = draw(st.integers(1, 3))
        labels = tuple(step.label for step in steps[at : at + size])
        if len(labels) > 1:
            groups.append(Group(labels, draw(st.sampled_from(("collective", "selective"))), "They are apart."))
        at += size
    return groups


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    """A finished draft whose paths are their originals, with a conclusion of one word."""
    steps, groups = [], []
    for number in range(1, draw(st.integers(2, 5)) + 1):
        names = [f"{number}.{child}" for child in range(1, draw(st.sampled_from((0, 0, 2, 3))) + 1)]
        children = tuple(Step(name, f"Do {name}.") for name in names)
        steps.append(Step(str(number), f"Do {number}.", bool(children), children))
        groups += draw(groups_of(list(children)))
    groups += draw(groups_of(steps))
    written = {leaf.label: draw(texts()) for step in steps for leaf in step.leaves()}
    starts = {group.labels[0]: group for group in groups}
    inside = {label for group in groups for label in group.labels[1:]}

    # Built here in the plainest way, not by the functions under test.
    def node(step: Step) -> Node:
        return Node(step.label, None, nodes(list(step.children)))

    def nodes(siblings: list[Step]) -> tuple[Node, ...]:
        made: list[Node] = []
        for step in siblings:
            if step.label in starts:
                group = starts[step.label]
                members = tuple(node(each) for each in siblings if each.label in group.labels)
                made.append(Node(f"{group.labels[0]}-{group.labels[-1]}", group.kind, members))
            elif step.label not in inside:
                made.append(node(step))
        return tuple(made)

    def path(part: Node) -> str:
        if part.kind is not None:
            return f"\n{{{{block {part.label}}}}}\n"
        return "".join(map(path, part.children)) if part.children else written[part.label]

    structure = nodes(steps)
    blocks = {
        block.label: BlockText(
            draw(st.sampled_from(("", "Do all of it."))),
            tuple(f"Do {part.label}." for part in block.children),
            tuple(path(part).strip() for part in block.children),
            "Done.",
        )
        for top in structure
        for block in top.blocks()
    }
    done = ("steps", "substeps", "groups", "structure", "refill", "branches")
    return Draft(tuple(steps), tuple(groups), structure, written, blocks, {"content_distance": 0.0}, done)
