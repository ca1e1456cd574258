"""What is malformed in a tagged text, and where. (A layout exists all the same.)"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

ProblemKind = Literal[
    "unclosed block",
    "stray close",
    "path outside a block",
    "block without goal",
    "empty goal",
    "paths unequal outlines",
    "missing conclusion",
    "unclosed tag",
    "misplaced tag",
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One defect of a tagged text.

    Attributes:
        kind (`str`): one of `ProblemKind`.
        index (`int`): linear index of the token that shows it.
        message (`str`): the defect in words, with what would mend it.
    """

    kind: ProblemKind
    index: int
    message: str

    def __str__(self) -> str:
        return f"{self.kind} at token {self.index}: {self.message}"


@dataclass(slots=True)
class OpenTag:
    """A tag that waits for its closing tag; the counts are used by `<Parallel>` and `<Goal>`."""

    name: str
    index: int
    goals: int = 0
    outlines: int = 0
    paths: int = 0
    conclusions: int = 0


@dataclass(slots=True)
class TagGrammar:
    """Reads tags in order, keeps the ones that are open, and knows which may come next.

    Attributes:
        stack (`list[OpenTag]`): open tags, outermost first.
        problems (`list[Problem]`): what was malformed so far.
    """

    stack: list[OpenTag] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def read(self, tag: str, index: int) -> None:
        """Reads one tag of `multiverse.TAGS`."""
        if tag.startswith("</"):
            self.close(tag[2:-1], index)
        else:
            self.open(tag[1:-1], index)

    def allowed(self) -> frozenset[str]:
        """The tags that keep the text well-formed if one comes next (ordinary tokens always do)."""
        if not self.stack:
            return frozenset({"<Think>", "<Parallel>"})
        top = self.stack[-1]
        if top.name == "Parallel":
            if top.conclusions:
                return frozenset({"</Parallel>"})
            return frozenset({"<Conclusion>"} if top.goals or top.paths else {"<Goal>"})
        if top.name == "Goal":
            return frozenset({"<Outline>", "</Goal>"} if top.outlines else {"<Outline>"})
        if top.name == "Outline":
            return frozenset({"</Outline>"})
        return frozenset({"<Parallel>", f"</{top.name}>"})

    def report(self, kind: ProblemKind, index: int, message: str) -> None:
        self.problems.append(Problem(kind, index, message))

    def block(self) -> OpenTag | None:
        return next((entry for entry in reversed(self.stack) if entry.name == "Parallel"), None)

    def drop_unclosed_above(self, block: OpenTag) -> None:
        """Pops what is still open inside `block`, each a defect of its own."""
        while self.stack[-1] is not block:
            entry = self.stack.pop()
            self.report("unclosed tag", entry.index, f"<{entry.name}> has no </{entry.name}>.")

    def open(self, name: str, index: int) -> None:
        block = self.block()
        if name in ("Goal", "Outline", "Path", "Conclusion") and block is None:
            if name == "Path":
                self.report("path outside a block", index, "<Path> needs a <Parallel> around it.")
            else:
                self.report("misplaced tag", index, f"<{name}> needs a <Parallel> around it.")
        elif name in ("Goal", "Path", "Conclusion"):
            assert block is not None
            self.drop_unclosed_above(block)
            if name == "Goal" and (block.goals or block.paths or block.conclusions):
                self.report("misplaced tag", index, "a block has one <Goal>, before its paths.")
            elif name == "Path" and block.conclusions:
                self.report("misplaced tag", index, "<Path> stands after the block's <Conclusion>.")
            elif name == "Conclusion" and block.conclusions:
                self.report("misplaced tag", index, "a block has one <Conclusion>.")
            block.goals += name == "Goal"
            block.paths += name == "Path"
            block.conclusions += name == "Conclusion"
        elif name == "Outline":
            assert block is not None
            if self.stack[-1].name == "Outline":
                entry = self.stack.pop()
                self.report("unclosed tag", entry.index, "<Outline> has no </Outline>.")
            if self.stack[-1].name == "Goal":
                self.stack[-1].outlines += 1
                block.outlines += 1
            else:
                self.report("misplaced tag", index, "<Outline> belongs directly inside <Goal>.")
        elif name == "Parallel" and self.stack and self.stack[-1].name in ("Goal", "Outline", "Parallel"):
            self.report("misplaced tag", index, f"<Parallel> stands directly inside <{self.stack[-1].name}>.")
        self.stack.append(OpenTag(name, index))

    def close(self, name: str, index: int) -> None:
        floor = 0 if name == "Parallel" else self._block_depth()
        depth = next((d for d in range(len(self.stack) - 1, floor - 1, -1) if self.stack[d].name == name), None)
        if depth is None:
            self.report("stray close", index, f"</{name}> closes nothing; remove it or open <{name}> before it.")
            return
        while len(self.stack) > depth + 1:
            entry = self.stack.pop()
            kind: ProblemKind = "unclosed block" if entry.name == "Parallel" else "unclosed tag"
            self.report(kind, entry.index, f"<{entry.name}> has no </{entry.name}>.")
        entry = self.stack.pop()
        if name == "Goal" and not entry.outlines:
            self.report("empty goal", entry.index, "<Goal> holds no <Outline>.")
        if name == "Parallel":
            self.check_block(entry)

    def check_block(self, block: OpenTag) -> None:
        if not block.goals:
            self.report("block without goal", block.index, "<Parallel> has no <Goal> with outlines.")
        elif block.paths != block.outlines:
            self.report(
                "paths unequal outlines", block.index, f"{block.outlines} <Outline>, {block.paths} <Path>; one each."
            )
        if not block.conclusions:
            self.report("missing conclusion", block.index, "<Parallel> has no <Conclusion>.")

    def end(self) -> None:
        """Reports what the text leaves open: it was cut off, or never closed."""
        for entry in self.stack:
            if entry.name == "Parallel":
                self.report("unclosed block", entry.index, "<Parallel> has no </Parallel>.")
                if not entry.goals and entry.paths:
                    self.report("block without goal", entry.index, "<Parallel> has no <Goal> with outlines.")
            else:
                self.report("unclosed tag", entry.index, f"<{entry.name}> has no </{entry.name}>.")
        self.stack = []

    def _block_depth(self) -> int:
        depths = [depth for depth, entry in enumerate(self.stack) if entry.name == "Parallel"]
        return depths[-1] + 1 if depths else 0


def find_problems(events: Iterable[tuple[int, str]]) -> list[Problem]:
    """Checks the tags of a text against the grammar of section 1 of LAYOUT.md.

    Args:
        events (`Iterable[tuple[int, str]]`): linear index and name of every tag in order; an empty name starts a
            packed document.

    Returns:
        `list[Problem]`: by index; empty for a well-formed text.
    """
    grammar = TagGrammar()
    for index, tag in events:
        if not tag:
            grammar.end()
        else:
            grammar.read(tag, index)
    grammar.end()
    return sorted(grammar.problems, key=lambda problem: problem.index)
