"""One request: its tree of branches, and the rules by which sampled and forced tokens make it grow.

Plain Python: no model and no tensors but the logits a token may carry, so every rule can be tested by itself.
Layout contract, section 7.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from multiverse.forced import HeaderTokens
from multiverse.layout import read_sequence
from multiverse.problems import OpenTag
from multiverse.structure import Block, StructureMachine

from .branch import Branch, BranchStatus, Choice, Token
from .closing import CONCLUSION, GOAL_AND_PATH, closing_tag, cost_to_close, may_fork
from .prompt import adopt_prompt, path_labels


@dataclass(frozen=True)
class RequestRules:
    """What every request of a call shares.

    Attributes:
        token_ids (`Mapping[str, int]`): id of every tag.
        header (`HeaderTokens`): separators and labels to force.
        eos_token_ids (`frozenset[int]`): tokens that end a request, or a path.
        max_new_tokens (`int`): tokens a request may add in all its branches, forced ones included.
        max_path_tokens (`int`, *optional*): tokens a path may hold itself, its header included, before it is closed.
        max_depth (`int`, *optional*): most blocks around a token; no block is opened in a path that deep.
        max_sequential_steps (`int`, *optional*): rounds of sampling before everything open is closed.
        max_kv_slots (`int`, *optional*): cache slots a request may hold, one per token of its prompt and of what it
            adds, since nothing is freed before its end.
    """

    token_ids: Mapping[str, int]
    header: HeaderTokens
    eos_token_ids: frozenset[int]
    max_new_tokens: int
    max_path_tokens: int | None = None
    max_depth: int | None = None
    max_sequential_steps: int | None = None
    max_kv_slots: int | None = None
    tag_of_id: dict[int, str] = field(init=False)
    _banned: dict[tuple[frozenset[str], bool], tuple[int, ...]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tag_of_id", {token_id: tag for tag, token_id in self.token_ids.items()})

    def banned(self, allowed: frozenset[str], may_end: bool) -> tuple[int, ...]:
        """Ids of all tags that are not `allowed`, and the end-of-sequence tokens unless the sequence `may_end`."""
        key = (allowed, may_end)
        if key not in self._banned:
            tags = [token_id for tag, token_id in self.token_ids.items() if tag not in allowed]
            self._banned[key] = tuple(tags if may_end else [*tags, *sorted(self.eos_token_ids)])
        return self._banned[key]


class Request:
    """A prompt and everything that grows from it.

    The prompt may end anywhere: in plain text, inside a goal, just after `</Goal>`, inside a path. What it leaves open
    is taken over as if it had been generated.

    Args:
        prompt (`list[int]`): token ids without padding.
        rules (`RequestRules`): limits and tags.

    Attributes:
        machine (`StructureMachine`): structure of the prompt.
        root (`Branch`): branch 0.
        budget (`int`): tokens it may add, by `max_new_tokens` or `max_kv_slots`, whichever is reached first.
        budget_reason (`str`): finish reason of a request that has used up its budget.
        made (`int`): tokens generated so far.
        closing_cost (`int`): tokens it takes to close everything that is open as a well-formed text: an outline for
            a goal without one, an empty path for every outline, a conclusion for every block. The budget always leaves
            room for them.
        steps (`int`): sequential steps so far, a step being one round of sampling.
        finish_reason (`str`, *optional*): `"eos"`, `"length"`, `"max_kv_slots"`, `"max_sequential_steps"`,
            `"max_time"`, `"stopped"` by another stopping criterion, `"interrupted"` by an exception; `None` while it
            runs.
        kv_slots (`int`): cache slots in use, kept by the model step.
        cached (`int`): tokens at the beginning of the prompt whose keys and values an earlier turn has left.
        seconds (`dict[str, float]`): wall time by stage: `"prefill"`, and what `stage` names.
    """

    def __init__(self, prompt: list[int], rules: RequestRules) -> None:
        self.prompt = prompt
        self.rules = rules
        self.budget, self.budget_reason = rules.max_new_tokens, "length"
        if rules.max_kv_slots is not None and rules.max_kv_slots - len(prompt) < self.budget:
            self.budget, self.budget_reason = rules.max_kv_slots - len(prompt), "max_kv_slots"
        self.made = 0
        self.closing_cost = 0
        self.steps = 0
        self.finish_reason: str | None = None
        self.kv_slots = 0
        self.cached = 0
        self.seconds: dict[str, float] = {}
        # A step, and how many branches were running in it.
        self._asked = (-1, 0)
        self.machine: StructureMachine = read_sequence(prompt, rules.token_ids)
        self.root = Branch(number=0)
        self._branch_numbers = count(len(self.machine.parents))
        adopt_prompt(self)
        needed = self.made + self.closing_cost
        if self.budget < max(needed, 1):
            if self.budget_reason == "max_kv_slots":
                raise ValueError(
                    f"`max_kv_slots` is {rules.max_kv_slots}, but a prompt of {len(prompt)} tokens and what it takes "
                    f"to go on need {len(prompt) + max(needed, 1)}. Raise it, or shorten the prompt."
                )
            raise ValueError(
                f"`max_new_tokens` is {rules.max_new_tokens}, but it takes {needed} tokens to close what "
                f"the prompt leaves open. Raise it, or close the blocks in the prompt."
            )

    @property
    def finished(self) -> bool:
        """Whether the request has come to its end."""
        return self.finish_reason is not None

    def branches(self) -> list[Branch]:
        """All branches in linear order of their beginnings."""
        return self.root.tree()

    @property
    def stage(self) -> str:
        """`"map"` inside the root's goal, `"process"` while its paths run, `"reduce"` inside its conclusion, and
        `"sequential"` outside a block."""
        if self.root.status is BranchStatus.WAITING:
            return "process"
        block = self.root.grammar.block()
        if block is None:
            return "sequential"
        return "reduce" if block.conclusions else "map"

    def linear_ids(self) -> list[int]:
        """Prompt and all generated tokens, in linear order."""
        return self.prompt + [token.id for token in self.root.tokens()]

    def linear_slots(self) -> list[int]:
        """The cache slot of every token of `linear_ids`; -1 for those that have not been run."""
        return [*range(len(self.prompt)), *(token.slot for token in self.root.tokens())]

    def linear_machine(self) -> StructureMachine:
        """The structure of `linear_ids`."""
        return read_sequence(self.linear_ids(), self.rules.token_ids)

    def count_seconds(self, stage: str, seconds: float) -> None:
        """Adds wall time to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def end_step(self) -> None:
        """Ends a round of sampling in which the request took part."""
        limit = self.rules.max_sequential_steps
        if limit is not None and self.steps >= limit and not self.finished:
            self.close("max_sequential_steps")

    def banned_tokens(self, branch: Branch) -> tuple[int, ...]:
        """Tags, and end-of-sequence tokens, that would break the structure or a limit if `branch` sampled them now."""
        allowed = branch.grammar.allowed()
        if "<Parallel>" in allowed and self.rules.max_depth is not None and branch.depth >= self.rules.max_depth:
            allowed -= {"<Parallel>"}
        room = self.budget - self.made - self.closing_cost
        if self._asked[0] != self.steps:
            self._asked = (self.steps, self.root.running())
        room //= max(self._asked[1], 1)
        if room <= GOAL_AND_PATH + CONCLUSION:
            # What could not be closed within a branch's share of the budget is not offered, as it would end the whole
            # request: the branch goes on with plain text instead.
            openers = allowed & {"<Think>", "<Parallel>", "<Outline>"}
            allowed -= {tag for tag in openers if self._growth(branch, self.rules.token_ids[tag]) > room}
        return self.rules.banned(allowed, self._may_end(branch))

    def accept(self, branch: Branch, choice: Choice) -> None:
        """Takes a sampled token into `branch` and does everything that follows from it."""
        token_id = choice.token_id
        if self.made + self.closing_cost + self._growth(branch, token_id) > self.budget:
            self.close(self.budget_reason)
            return
        if token_id in self.rules.eos_token_ids and branch.parent is not None:
            # No end-of-sequence token may stand inside a path: readers cut an answer at the first one.
            self._close_path(branch, "eos")
        else:
            self._write(branch, token_id, choice)
            if token_id in self.rules.eos_token_ids:
                self.finish_reason = "eos"
                return
            if token_id in self.rules.tag_of_id:
                self._read_tag(branch, self.rules.tag_of_id[token_id])
        limit = self.rules.max_path_tokens
        running_path = branch.parent is not None and branch.status is BranchStatus.RUNNING
        room = self.budget - self.made - self.closing_cost
        over_limit = limit is not None and running_path and branch.written >= limit - 1
        if over_limit and self._may_end(branch) and room >= len(self.rules.header.separator):
            self._close_path(branch, "max_path_tokens")
        if not self.finished and self.made + self.closing_cost >= self.budget:
            self.close(self.budget_reason)

    def close(self, reason: str) -> None:
        """Ends the request, closing what is open so that siblings stay apart in the linear text.

        Args:
            reason (`str`): finish reason of the request; paths that are cut off have none of their own.
        """
        self._close_branch(self.root)
        assert self.made <= self.budget, "the budget keeps room for what is forced"
        self.finish_reason = reason

    def _close_branch(self, branch: Branch) -> None:
        for fork in list(branch.forks):
            for child in fork.children:
                self._close_branch(child)
        while left := self._to_close(branch):
            position = branch.next_position
            tag, forks = closing_tag(left[-1]), may_fork(branch)
            self._force_tag(branch, tag)
            if tag == "</Goal>" and forks:
                self._fork_closed(branch, branch.blocks[-1])
            if branch.parent is not None and not branch.grammar.stack:
                self.finish_path(branch, None, position, separator=False)

    def _growth(self, branch: Branch, token_id: int) -> int:
        """By how much `made + closing_cost` grows if `branch` takes `token_id`."""
        tag = self.rules.tag_of_id.get(token_id)
        separator = len(self.rules.header.separator)
        if token_id in self.rules.eos_token_ids:
            return 1 if branch.parent is None else separator
        if tag is None:
            return 1
        if tag == "<Parallel>":
            return 1 + GOAL_AND_PATH + CONCLUSION
        if tag == "<Think>":
            return 2
        if tag == "<Outline>" and branch.grammar.stack[-1].outlines:
            return 4 if may_fork(branch) else 2
        if tag == "</Path>":
            return separator
        if tag != "</Goal>" or not branch.blocks:
            return 0 if self._to_close(branch) else 1
        labels = self._labels(branch, branch.blocks[-1])
        return separator + sum(separator + len(self.rules.header.write_label(label)) for label in labels)

    def _may_end(self, branch: Branch) -> bool:
        """Whether nothing but plain text would be cut if the branch ended here."""
        if branch.parent is None:
            return not self._to_close(branch)
        return [entry.name for entry in branch.grammar.stack] == ["Path"]

    def _write(self, branch: Branch, token_id: int, choice: Choice | None = None) -> None:
        branch.write(Token(token_id, branch.next_position, choice, self.steps))
        self.made += 1

    def force(self, branch: Branch, token_ids: list[int]) -> None:
        """Writes tokens that the model is not asked for."""
        for token_id in token_ids:
            self._write(branch, token_id)

    def _read_tag(self, branch: Branch, tag: str) -> None:
        """Does what a sampled tag calls for, just after it was written to `branch`."""
        self._record_tag(branch, tag)
        if tag == "</Goal>" and branch.blocks:
            self.force(branch, self.rules.header.separator)
            self.fork(branch, branch.blocks[-1], self._labels(branch, branch.blocks[-1]), [])
        elif tag == "</Path>" and branch.parent is not None and not branch.grammar.stack:
            self.finish_path(branch, "closed", branch.next_position - 1)

    def _record_tag(self, branch: Branch, tag: str) -> None:
        """Takes the tag that was just written to `branch` into its open tags and blocks."""
        index = len(branch.history) - 1
        branch.grammar.read(tag, index)
        if tag == "<Parallel>":
            branch.blocks.append(Block(branch=branch.number, start=index))
        elif tag == "<Outline>" and branch.blocks:
            branch.blocks[-1].outlines.append(index)
        elif tag == "</Goal>" and branch.blocks:
            branch.blocks[-1].goal_position = branch.next_position - 1
        elif tag == "</Parallel>" and branch.blocks:
            branch.blocks.pop()
        self.count_open_tags(branch)

    def _labels(self, branch: Branch, block: Block) -> list[str]:
        """The label of every path that `block`, written by `branch`, calls for."""
        read = self.rules.header.read_label
        return path_labels(branch.label, [read(branch.history, start + 1)[0] for start in block.outlines])

    def fork(self, branch: Branch, block: Block, labels: list[str], started: list[Branch]) -> None:
        """Opens a branch for every outline of `block` that has no path yet.

        Args:
            branch (`Branch`): holds the block and waits from now on.
            block (`Block`): its goal is closed.
            labels (`list[str]`): label of every path.
            started (`list[Branch]`): paths that exist already (a prompt that ends inside the block).
        """
        fork = branch.open_fork(block, list(started))
        for label in labels[len(started) :]:
            child = branch.child(next(self._branch_numbers), label, block)
            self.count_open_tags(child)
            fork.children.append(child)
            self.force(child, [self.rules.token_ids["<Path>"], *self.rules.header.separator])
            self.force(child, self.rules.header.write_label(label))
        self.merge_if_finished(branch)

    def _close_path(self, branch: Branch, reason: str) -> None:
        """Ends a path that did not end itself."""
        position = branch.next_position
        self._write(branch, self.rules.token_ids["</Path>"])
        branch.grammar.stack.clear()
        self.count_open_tags(branch)
        self.finish_path(branch, reason, position)

    def finish_path(self, branch: Branch, reason: str | None, close_position: int, separator: bool = True) -> None:
        """Ends a path whose `</Path>` has been written, and reduces its block if it was the last one."""
        assert branch.path is not None and branch.parent is not None  # noqa: PT018
        if branch.path.close is None:
            branch.path.last_position = close_position
        branch.status, branch.finish_reason = BranchStatus.FINISHED, reason
        if separator:
            self.force(branch, self.rules.header.separator)
        self.merge_if_finished(branch.parent)

    def _fork_closed(self, branch: Branch, block: Block) -> None:
        """Gives every outline of `block` an empty path: there is no room to work on any of them."""
        fork = branch.open_fork(block, [])
        for label in self._labels(branch, block):
            child = branch.child(next(self._branch_numbers), label, block)
            fork.children.append(child)
        for child in fork.children:
            self._write(child, self.rules.token_ids["<Path>"])
            position = child.next_position
            self._write(child, self.rules.token_ids["</Path>"])
            child.grammar.stack.clear()
            self.finish_path(child, None, position, separator=False)

    def merge_if_finished(self, branch: Branch) -> None:
        """Reduce: once all paths have ended the parent goes on with `<Conclusion>`, seeing every one of them."""
        fork = branch.forks[-1]
        if not fork.finished:
            return
        branch.merge(fork)
        self._force_tag(branch, "<Conclusion>")

    def _force_tag(self, branch: Branch, tag: str) -> None:
        self._write(branch, self.rules.token_ids[tag])
        self._record_tag(branch, tag)

    def count_open_tags(self, branch: Branch) -> None:
        """Brings `closing_cost` up to date after the open tags of `branch` have changed."""
        cost = cost_to_close(branch, len(self._to_close(branch)))
        self.closing_cost += cost - branch.closing_cost
        branch.closing_cost = cost

    def _to_close(self, branch: Branch) -> list[OpenTag]:
        """Open tags that must not stay open: all of a path's; the root's from its first block or generated tag on.

        What a prompt opens outside a block may be talk about tags, which nobody means to close.
        """
        stack = branch.grammar.stack
        if branch.parent is not None:
            return stack
        prompt = len(self.prompt)
        first = (depth for depth, tag in enumerate(stack) if tag.name == "Parallel" or tag.index >= prompt)
        return stack[next(first, len(stack)) :]
