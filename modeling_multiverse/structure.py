"""Blocks, paths and the one state machine that turns a token stream into branches and positions.

Everything that needs structure (mask, positions, training labels, decoding) goes through `StructureMachine`, so the
rules of LAYOUT.md are written down here and nowhere else. The machine reads tags only; the tokens between
two tags are taken in one step, which keeps a 32K-token sample at a few hundred Python steps.

Source: arXiv 2506.09991, section 4.1 (Multiverse Attention), with the separator after `</Path>` kept inside its path.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Path:
    """One `<Path>` of a block: a branch of its own.

    Attributes:
        branch (`int`): branch id of the path's tokens.
        start (`int`): linear index of `<Path>`.
        close (`int`, *optional*): linear index of `</Path>`.
        end (`int`, *optional*): exclusive linear end of the branch (the separator after `</Path>` included); `None`
            while the path is the one being read.
        last_position (`int`): position of `</Path>`, or of the last token of a path that ended without one; -1 while
            neither is known.
        blocks (`list[Block]`): blocks nested in this path, in order.
    """

    branch: int
    start: int
    close: int | None = None
    end: int | None = None
    last_position: int = -1
    blocks: list["Block"] = field(default_factory=list)


@dataclass(slots=True)
class Block:
    """One `<Parallel>` block (Map, Process, Reduce).

    Attributes:
        branch (`int`): branch that holds `<Parallel>`, the parent of every path.
        start (`int`): linear index of `<Parallel>`.
        goal_close (`int`, *optional*): linear index of the first `</Goal>` before any path.
        goal_position (`int`, *optional*): position of that `</Goal>`.
        path_position (`int`, *optional*): position shared by the first token of every path.
        outlines (`list[int]`): linear index of every `<Outline>` read before the goal closed.
        paths (`list[Path]`): in linear order.
        conclusion (`int`, *optional*): linear index of `<Conclusion>`.
        end (`int`, *optional*): exclusive linear end, after `</Parallel>`; `None` for a block that is still open.
        in_path (`bool`): whether the last path of `paths` is the branch being read.
        path_branches (`list[tuple[int, int]]`): ranges of branch ids that its finished paths hold, nested ones
            included; one range unless the block is malformed.
    """

    branch: int
    start: int
    goal_close: int | None = None
    goal_position: int | None = None
    path_position: int | None = None
    outlines: list[int] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    conclusion: int | None = None
    end: int | None = None
    in_path: bool = False
    path_branches: list[tuple[int, int]] = field(default_factory=list)

    def open_paths_at(self, parent_next_position: int) -> int:
        """Fixes and returns the position of the first token of every path: position(`</Goal>`) + 1, or the parent's
        next position for a block that has no goal."""
        if self.path_position is None:
            goal = self.goal_position
            self.path_position = parent_next_position if goal is None else goal + 1
        return self.path_position

    def reduce_position(self) -> int:
        """Position at which the parent goes on: one past the longest path, whatever separators follow the paths."""
        return max(path.last_position for path in self.paths) + 1


class StructureMachine:
    """Reads a token stream in linear order and knows, at every token, its branch and position.

    The branch and position of a token depend on the tokens before it alone (prefix consistency), and every stream is
    accepted: a tag that means nothing where it stands is an ordinary token.

    Attributes:
        length (`int`): tokens read so far.
        branch (`int`): branch of the last token.
        next_position (`int`): position the next plain token gets.
        open_blocks (`list[Block]`): blocks around the next token, outermost first.
        blocks (`list[Block]`): outermost blocks of the stream, nested ones hang below their paths.
        parents (`list[int]`): parent of every branch, -1 for the root branch of each document.
        sibling_branches (`list[tuple[tuple[int, int], ...]]`): for every branch the ranges of branch ids that its
            earlier siblings hold, themselves and all below them.
        runs (`list[tuple[int, int, int]]`): `(first index, branch, first position)` of every stretch of tokens that
            shares a branch and counts up by one.
        events (`list[tuple[int, str]]`): index and name of every tag, document starts as `(index, "")`.
        resumptions (`list[tuple[int, int]]`): index and position of every jump that was made from outside.
    """

    def __init__(self) -> None:
        self.length = 0
        self.branch = -1
        self.next_position = 0
        self.open_blocks: list[Block] = []
        self.blocks: list[Block] = []
        self.parents: list[int] = []
        self.sibling_branches: list[tuple[tuple[int, int], ...]] = []
        self.runs: list[tuple[int, int, int]] = []
        self.events: list[tuple[int, str]] = []
        self.resumptions: list[tuple[int, int]] = []
        self.start_document()

    def start_document(self) -> None:
        """Begins a packed document: position 0, a new root branch, nothing of what came before in sight."""
        if self.events and self.events[-1] == (self.length, ""):
            return
        self.events.append((self.length, ""))
        for block in reversed(self.open_blocks):
            self._close_path(block)
        self.open_blocks = []
        self._move_to(self._new_branch(parent=-1), 0)

    def read_plain(self, count: int) -> None:
        """Reads `count` tokens that are no tags."""
        self.length += count
        self.next_position += count

    def resume_at(self, position: int) -> None:
        """Lets the current branch go on at `position` (tokens whose positions were given from outside)."""
        if position != self.next_position:
            self.resumptions.append((self.length, position))
            self._move_to(self.branch, position)

    def read_tag(self, tag: str) -> None:
        """Reads one tag, moving to another branch first where the tag says so."""
        block = self.open_blocks[-1] if self.open_blocks else None
        index = self.length
        self.events.append((index, tag))
        if tag == "<Parallel>":
            self._open_block(Block(branch=self.branch, start=index))
        elif block is not None:
            if tag == "<Path>":
                self._open_path(block)
            elif tag == "<Conclusion>":
                self._reduce(block)
                block.conclusion = index if block.conclusion is None else block.conclusion
            elif tag == "</Parallel>":
                self._reduce(block)
                block.end = index + 1
                self.open_blocks.pop()
            elif tag == "</Path>" and block.in_path and block.paths[-1].close is None:
                block.paths[-1].close = index
                block.paths[-1].last_position = self.next_position
            elif tag == "<Outline>" and block.goal_close is None and not block.paths:
                block.outlines.append(index)
            elif tag == "</Goal>" and block.goal_close is None and not block.paths:
                block.goal_close = index
                block.goal_position = self.next_position
        self.read_plain(1)

    def truncated(self, length: int) -> "StructureMachine":
        """Returns the machine as it was after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"`length` must lie between 0 and the {self.length} tokens read, got {length}.")
        replay = StructureMachine()
        steps: list[tuple[int, str | int]] = [event for event in self.events if event[0] < length]
        steps += [resumption for resumption in self.resumptions if resumption[0] <= length]
        for index, tag in sorted(steps, key=lambda step: step[0]):
            replay.read_plain(index - replay.length)
            if isinstance(tag, int):
                replay.resume_at(tag)
            elif tag:
                replay.read_tag(tag)
            else:
                replay.start_document()
        replay.read_plain(length - replay.length)
        return replay

    def _new_branch(self, parent: int, siblings: tuple[tuple[int, int], ...] = ()) -> int:
        self.parents.append(parent)
        self.sibling_branches.append(siblings)
        return len(self.parents) - 1

    def _move_to(self, branch: int, position: int) -> None:
        self.branch, self.next_position = branch, position
        self.runs.append((self.length, branch, position))

    def _open_block(self, block: Block) -> None:
        around = next((each for each in reversed(self.open_blocks) if each.in_path), None)
        (self.blocks if around is None else around.paths[-1].blocks).append(block)
        self.open_blocks.append(block)

    def _open_path(self, block: Block) -> None:
        position = block.open_paths_at(self.next_position)
        self._close_path(block)
        branch = self._new_branch(block.branch, tuple(block.path_branches))
        block.paths.append(Path(branch=branch, start=self.length))
        block.in_path = True
        self._move_to(branch, position)

    def _close_path(self, block: Block) -> None:
        if block.in_path:
            path = block.paths[-1]
            path.end = self.length
            if path.close is None:
                path.last_position = self.next_position - 1
            first, ranges = path.branch, block.path_branches
            if ranges and ranges[-1][1] == first:
                first = ranges.pop()[0]
            ranges.append((first, len(self.parents)))
            block.in_path = False

    def _reduce(self, block: Block) -> None:
        if block.in_path:
            self._close_path(block)
            self._move_to(block.branch, block.reduce_position())
