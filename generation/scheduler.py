"""Which branches run in a step. Plain Python."""

from collections.abc import Iterable

from .branch import Branch, BranchStatus
from .request import Request


def branches_to_run(request: Request, width: int | None = None) -> list[Branch]:
    """The branches of one request that take part in the next forward pass.

    They stand in an order in which every token comes after all it may see. Of the branches that are being sampled the
    first `width` in linear order take part; the others keep their tokens until their turn. So a width of 1 walks the
    same tree one path at a time.

    Args:
        request (`Request`): unfinished.
        width (`int`, *optional*): most branches to sample side by side; all of them by default.
    """
    chosen: list[Branch] = []
    sampled = 0
    for branch in _run_order(request.root):
        if branch.pending:
            chosen.append(branch)
        if branch.status is BranchStatus.RUNNING:
            sampled += 1
            if sampled == width:
                break
    return chosen


def _run_order(branch: Branch) -> Iterable[Branch]:
    """The branch and those below it that may still hold tokens to run.

    A waiting parent's tokens come before its paths' (they stand before the fork), a merged parent's after them. Only
    the last fork matters: a fork is opened by a sampled token, and by then all that came before it has been run.
    """
    waiting = branch.status is BranchStatus.WAITING
    if waiting:
        yield branch
    if branch.forks:
        for child in branch.forks[-1].children:
            yield from _run_order(child)
    if not waiting:
        yield branch
