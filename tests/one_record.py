"""A record of the curator made by hand: a chain of thought, its draft, and the texts that become of it."""

from multiverse.curator.output import FinishedRecord, RejectedRecord
from multiverse.curator.records import BlockText, Chain, Draft, Group, Node, Step

FIRST = "We need two sums.\n"
LEFT = "The left one is 1 + 2. That makes 3.\n"
RIGHT = "The right one is 4 + 5. That makes 9.\n"
LAST = "Together they are 12."
TRAJECTORY = FIRST + LEFT + RIGHT + LAST
PARALLEL = (
    "We need two sums.\n<Parallel>\n<Goal>\n<Outline>\n1: the left sum\n</Outline>\n<Outline>\n2: the right sum\n"
    "</Outline>\n</Goal>\n<Path>\n1: The left one is 1 + 2, which makes 3.\n</Path>\n<Path>\n"
    "2: The right one is 4 + 5, which makes 9.\n</Path>\n<Conclusion>\nThe sums are 3 and 9.\n</Conclusion>\n"
    "</Parallel>\nTogether they are 12."
)
TWIN = (
    "We need two sums.\nThe left one is 1 + 2, which makes 3.\nThe right one is 4 + 5, which makes 9.\n"
    "The sums are 3 and 9.\nTogether they are 12."
)
DRAFT = Draft(
    steps=(Step("1", "say what is needed"), Step("2", "the left"), Step("3", "the right"), Step("4", "add")),
    groups=(Group(("2", "3"), "collective", "neither needs the other"),),
    structure=(Node("1"), Node("2-3", "collective", (Node("2"), Node("3"))), Node("4")),
    texts={"1": FIRST, "2": LEFT, "3": RIGHT, "4": LAST},
    blocks={
        "2-3": BlockText(
            "",
            ("the left sum", "the right sum"),
            ("The left one is 1 + 2, which makes 3.", "The right one is 4 + 5, which makes 9."),
            "The sums are 3 and 9.",
        )
    },
    measures={"distance": 0.0},
    done=("steps", "substeps", "groups", "structure", "refill", "branches"),
)
PROVENANCE = {
    "models": {"steps": "org/model-a", "refill": "org/model-b"},
    "prompts": {"steps": "1", "refill": "2"},
    "attempts": {"steps": 1, "refill": 3},
    "measures": {"distance": 0.0625},
    "kinds": ["collective"],
}


def chain(own: str = "000000-a", answer: str | None = "12", **columns) -> Chain:
    """The source of the record."""
    return Chain(own, "What is 1 + 2 and 4 + 5 together?", TRAJECTORY, "It is 12.", answer, columns)


def finished(own: str = "000000-a", draft: Draft | None = DRAFT, provenance=PROVENANCE, **columns) -> FinishedRecord:
    """It was curated."""
    source = Chain(**{**vars(chain(own)), "columns": columns})
    return FinishedRecord(source, PARALLEL, TWIN, provenance, draft)


def rejected(own: str = "000001-b") -> RejectedRecord:
    """It was given up when its sentences were to be put back."""
    story = (
        {"stage": "refill", "attempt": 1, "reason": "sentence 3 is missing", "answer": '{"ranges": []}'},
        {"stage": "refill", "attempt": 2, "reason": "sentence 2 comes twice", "answer": "x" * 400},
    )
    return RejectedRecord(chain(own), "refill", "sentence 2 comes twice", story, DRAFT.back_to("refill"))
