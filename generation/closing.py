"""What it takes to close the open tags of a branch as a well-formed text: the next tag, and how many in all."""

from multiverse.problems import OpenTag
from multiverse.structure import Block

from .branch import Branch

#: `<Goal><Outline></Outline></Goal><Path></Path>`, and `<Conclusion></Conclusion></Parallel>`.
GOAL_AND_PATH, CONCLUSION = 6, 3


def may_fork(branch: Branch) -> bool:
    """Whether the innermost block of `branch` is still before its paths."""
    return bool(branch.blocks) and _before_paths(branch.blocks[-1])


def _before_paths(block: Block) -> bool:
    return block.goal_position is None and not block.paths


def _blocks_of_tags(branch: Branch) -> list[Block | None]:
    """For every open tag of `branch` the block it belongs to; `None` outside the branch's own blocks.

    A malformed prompt may open a block inside a goal, so the innermost block is not everybody's.
    """
    found: list[Block | None] = []
    blocks, block = iter(branch.blocks), None
    for entry in branch.grammar.stack:
        if entry.name == "Parallel":
            block = next(blocks)
        found.append(block)
    return found


def _needs_goal(entry: OpenTag) -> bool:
    return entry.name == "Parallel" and not (entry.goals or entry.paths or entry.conclusions)


def closing_tag(entry: OpenTag) -> str:
    """The tag to write next on the way to closing `entry`."""
    if _needs_goal(entry):
        return "<Goal>"
    if entry.name == "Goal" and not entry.outlines:
        return "<Outline>"
    if entry.name == "Parallel" and not entry.conclusions:
        return "<Conclusion>"
    return f"</{entry.name}>"


def _cost(entry: OpenTag, block: Block | None) -> int:
    """Tokens that closing one open tag of `block` takes, those inside it left out."""
    outlines = len(block.outlines) if block is not None and _before_paths(block) else None
    if entry.name == "Parallel" and not entry.conclusions:
        # Outlines outside a goal, which only a malformed prompt has, call for a path like all others.
        return CONCLUSION + (GOAL_AND_PATH + 2 * (outlines or 0)) * _needs_goal(entry)
    if entry.name == "Goal":
        missing = 0 if entry.outlines else 1
        paths = 0 if outlines is None else outlines + missing
        return 1 + 2 * missing + 2 * paths
    return 1


def cost_to_close(branch: Branch, depth: int) -> int:
    """Tokens that closing the innermost `depth` open tags of `branch` takes."""
    tags = list(zip(branch.grammar.stack, _blocks_of_tags(branch), strict=True))
    return sum(_cost(entry, block) for entry, block in tags[len(tags) - depth :])
