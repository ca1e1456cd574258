"""Which branches run in a step. Plain Python."""

from collections.abc import Iterable

from .branch import Branch, BranchStatus, Fork
from .request import Request


def branches_to_run(request: Request, parallel: bool) -> list[Branch]:
    """The branches of one request that take part in the next forward pass, in linear order.

    In parallel mode these are all branches with tokens to run. In sequential mode the same tree is walked one path at
    a time: everything up to the first branch that is still being sampled.

    Args:
        request (`Request`): unfinished.
        parallel (`bool`): whether sibling paths run side by side.
    """
    chosen = []
    for branch in _run_order(request.root):
        if branch.pending:
            chosen.append(branch)
        if not parallel and branch.status is BranchStatus.RUNNING:
            break
    return chosen


def _run_order(branch: Branch) -> Iterable[Branch]:
    """Branches in the order in which their pending tokens may see each other.

    A waiting parent's tokens come before its paths' (they stand before the fork), a merged parent's after them.
    """
    waiting = branch.status is BranchStatus.WAITING
    if waiting:
        yield branch
    for item in branch.items:
        if isinstance(item, Fork):
            for child in item.children:
                yield from _run_order(child)
    if not waiting:
        yield branch
