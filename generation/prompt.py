"""Takes over what a prompt leaves open: a goal, a block that is about to fork, a path, a conclusion."""

from typing import TYPE_CHECKING

from multiverse.layout import compatible_branches, expand_runs
from multiverse.problems import OpenTag, TagGrammar
from multiverse.structure import Block

from .branch import Branch, BranchStatus

if TYPE_CHECKING:
    from .request import Request


def adopt_prompt(request: "Request") -> None:
    """Fills `request.root`, opens the branches that the prompt has started, and forces what its last tag calls for.

    A prompt without an open block ends up as a root branch that runs. Inside a block, the branch that holds the
    prompt's last token runs on, and its siblings that have an outline but no path yet are forked beside it.

    Args:
        request (`Request`): with its prompt, rules, `machine` and `root` set.
    """
    machine, read_label = request.machine, request.rules.header.read_label
    visible = _visible_branches(request)
    stacks = _open_tags(request)

    branch = request.root
    branch.visible, branch.grammar = visible[0], TagGrammar(stack=_tags_outside_blocks(stacks[0]))
    waiting: list[tuple[Branch, Block, list[Branch]]] = []
    for block, stack in zip(machine.open_blocks, stacks[1:], strict=True):
        branch.blocks.append(block)
        if not block.in_path:
            branch.grammar.stack += _tags_in_block(block, branch.grammar.stack[-1], stack)
            continue
        labels = path_labels(branch.label, [read_label(request.prompt, path.start + 1)[0] for path in block.paths])
        paths = []
        for label, path in zip(labels, block.paths, strict=True):
            paths.append(Branch(path.branch, branch, label, path, visible=visible[path.branch]))
            paths[-1].status, paths[-1].finish_reason = BranchStatus.FINISHED, "prompt"
        waiting.append((branch, block, paths))
        # A path after the conclusion takes the block back to where its conclusion is still to come.
        branch.grammar.stack[-1].conclusions = 0
        branch.status = BranchStatus.WAITING
        branch = paths[-1]
        branch.status, branch.finish_reason = BranchStatus.RUNNING, None
        branch.grammar = TagGrammar(stack=[OpenTag("Path", 0), *_tags_outside_blocks(stack)])

    branch.next_position = machine.next_position
    for each in (branch, *(parent for parent, _, _ in waiting)):
        request.count_open_tags(each)
    _recall(request, [branch, *(each for parent, _, paths in waiting for each in (parent, *paths[:-1]))])
    innermost = machine.open_blocks[-1] if machine.open_blocks else None
    # Read now: a fork adds its paths to the same block.
    path_closed = innermost is not None and innermost.in_path and innermost.paths[-1].close is not None
    for parent, block, paths in waiting:
        labels = _labels(request, parent, block)
        for path_branch in paths:
            # Merging adds what the parent does not have yet; histories of the prompt's own branches hold it all.
            path_branch.inherited = len(parent.history)
        request.fork(parent, block, labels if block.goal_close is not None else [], paths)

    last_tag = request.rules.tag_of_id.get(request.prompt[-1]) if request.prompt else None
    if innermost is None:
        return
    if innermost.in_path:
        if path_closed:
            assert branch.path is not None
            branch.grammar.stack.clear()
            request.count_open_tags(branch)
            request.finish_path(branch, "prompt", branch.path.last_position, separator=last_tag == "</Path>")
    elif innermost.goal_close is not None and innermost.conclusion is None and not innermost.paths:
        request.force(branch, request.rules.header.separator if last_tag == "</Goal>" else [])
        request.fork(branch, innermost, _labels(request, branch, innermost), [])


def _labels(request: "Request", branch: Branch, block: Block) -> list[str]:
    """The label of every path that a block of the prompt calls for."""
    read = request.rules.header.read_label
    return path_labels(branch.label, [read(request.prompt, start + 1)[0] for start in block.outlines])


def path_labels(prefix: str, written: list[str | None]) -> list[str]:
    """The outlines' own labels, those without one numbered by order below their block's path (`2` gives `2.1`)."""
    start = f"{prefix}." if prefix else ""
    return [label or f"{start}{number}" for number, label in enumerate(written, start=1)]


def _visible_branches(request: "Request") -> list[set[int]]:
    """Branch ids of the prompt that each branch of the prompt may see from now on.

    A parent gets its paths into sight when their block reduces; until then they must not reach it, or the siblings
    that are still to be forked from it would inherit them.
    """
    machine = request.machine
    table = compatible_branches(machine)
    for block in machine.open_blocks:
        if block.in_path:
            for first, end in [*block.path_branches, (block.paths[-1].branch, len(table))]:
                table[block.branch, first:end] = False
    return [set(row.nonzero().flatten().tolist()) for row in table]


def _open_tags(request: "Request") -> list[list[OpenTag]]:
    """Tags open at the end of the prompt: those up to the first open `<Parallel>` (included), then up to the next."""
    grammar = TagGrammar()
    for index, tag in request.machine.events:
        if tag:
            grammar.read(tag, index)
    stacks: list[list[OpenTag]] = [[]]
    for entry in grammar.stack:
        stacks[-1].append(entry)
        if entry.name == "Parallel":
            stacks.append([])
    return stacks


def _tags_outside_blocks(stack: list[OpenTag]) -> list[OpenTag]:
    """The tags of `stack` that mean something to a branch outside its own blocks.

    A stray `<Goal>`, be it talk about tags or one that follows a path, opens nothing that could be closed.
    """
    return [entry for entry in stack if entry.name in ("Think", "Parallel")]


def _tags_in_block(block: Block, parallel: OpenTag, stack: list[OpenTag]) -> list[OpenTag]:
    """The tags of `stack` that a branch inside `block` has to close.

    Malformed prompts may hold several goals, or a goal after the conclusion. Structure knows one goal, which opens
    the paths; tags that say otherwise open nothing that could be closed.
    """
    if block.goal_close is not None or block.paths:
        parallel.goals = max(parallel.goals, 1)
        return [entry for entry in stack if entry.name not in ("Goal", "Outline")]
    if stack and stack[0].name == "Goal":
        # Its paths are still to come, so the conclusion is too.
        parallel.conclusions = 0
    return stack


def _recall(request: "Request", branches: list[Branch]) -> None:
    """Gives each branch the part of the prompt it may see, and the outlines of goals it has yet to close in terms of
    that part."""
    owners = expand_runs(request.machine)[0].tolist()
    for branch in dict.fromkeys([*branches, request.root]):
        assert branch.visible is not None
        indices = [index for index, owner in enumerate(owners) if owner in branch.visible]
        branch.history = [request.prompt[index] for index in indices]
        branch.inherited = len(branch.history)
        for block in branch.blocks:
            if block.goal_close is None and not block.paths:
                block.outlines = [indices.index(start) for start in block.outlines]
