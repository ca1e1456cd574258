"""The state of one branch while it is decoded: its tokens, its open blocks and what it may see."""

from dataclasses import dataclass, field
from enum import Enum

import torch
from multiverse.problems import OpenTag, TagGrammar
from multiverse.structure import Block, Path


class BranchStatus(Enum):
    """What a branch does at present."""

    RUNNING = "running"  # its next token is sampled
    WAITING = "waiting"  # for the paths of a block it holds
    FINISHED = "finished"  # closed, merged into its parent


@dataclass(slots=True)
class Choice:
    """A sampled token and what was asked to be kept of the choice.

    Attributes:
        token_id (`int`): the token.
        logits (`torch.FloatTensor` of shape `(vocabulary,)`, *optional*): raw logits.
        scores (`torch.FloatTensor` of shape `(vocabulary,)`, *optional*): what the structure guard and the logits
            processors made of them.
        logprob (`float`, *optional*): log-probability under the raw logits.
    """

    token_id: int
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    logprob: float | None = None


@dataclass(slots=True)
class Token:
    """One generated token.

    Attributes:
        id (`int`): token id.
        position (`int`): rotary position.
        choice (`Choice`, *optional*): how the model came to it; `None` for a token that the engine forced.
        step (`int`): sequential step that made it, from 1; 0 for what the prompt's end called for.
        slot (`int`): its slot in the request's region of the cache; -1 until it has been run.
    """

    id: int
    position: int
    choice: Choice | None = None
    step: int = 0
    slot: int = -1

    @property
    def forced(self) -> bool:
        """Whether the engine wrote it without asking the model."""
        return self.choice is None


@dataclass(eq=False, slots=True)
class Fork:
    """A block whose paths are branches: its place among the parent's tokens, and the paths in linear order."""

    block: Block
    children: list["Branch"]

    @property
    def finished(self) -> bool:
        """Whether every path has ended."""
        return all(child.status is BranchStatus.FINISHED for child in self.children)


@dataclass(eq=False, slots=True)
class Branch:
    """One branch of one request.

    Attributes:
        number (`int`): unique in its request; branches of the prompt keep their branch id.
        parent (`Branch`, *optional*): branch that holds the block this is a path of; `None` for the root.
        label (`str`): the path's label, such as `2.1`; empty for the root.
        path (`Path`, *optional*): this path in its block's own record, which fixes the merge position.
        next_position (`int`): position of the next token.
        visible (`set[int]`, *optional*): branch ids of the prompt that it may see, for branches that the prompt has
            opened; all others see what their parent sees when they open, and themselves.
        absorbed (`list[Branch]`): finished paths that came into sight since the branch last ran.
        row (`int`, *optional*): its row in the request's table of visible slots, kept by the model step.
        history (`list[int]`): token ids it may see, in linear order, its own included: what logits processors get.
        inherited (`int`): how many of `history` were there when the branch opened.
        grammar (`TagGrammar`): tags that are open in this branch.
        closing_cost (`int`): tokens it takes to close what is open in this branch, kept by the request.
        blocks (`list[Block]`): open blocks that this branch holds, outermost first.
        items (`list[Token | Fork]`): what it wrote, in order.
        forks (`list[Fork]`): the forks among `items`.
        written (`int`): tokens it wrote itself, those of nested paths left out.
        pending (`list[Token]`): written, not yet run through the model.
        status (`BranchStatus`): what it does at present.
        finish_reason (`str`, *optional*): `"closed"`, `"eos"`, `"max_path_tokens"` or `"prompt"` for a path that has
            ended.
    """

    number: int
    parent: "Branch | None" = None
    label: str = ""
    path: Path | None = None
    next_position: int = 0
    visible: set[int] | None = None
    absorbed: list["Branch"] = field(default_factory=list)
    row: int | None = None
    history: list[int] = field(default_factory=list)
    inherited: int = 0
    grammar: TagGrammar = field(default_factory=TagGrammar)
    closing_cost: int = 0
    blocks: list[Block] = field(default_factory=list)
    items: list[Token | Fork] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    written: int = 0
    pending: list[Token] = field(default_factory=list)
    status: BranchStatus = BranchStatus.RUNNING
    finish_reason: str | None = None

    def write(self, token: Token) -> None:
        """Appends a token."""
        self.items.append(token)
        self.written += 1
        self.pending.append(token)
        self.history.append(token.id)
        self.next_position = token.position + 1

    def open_fork(self, block: Block, children: list["Branch"]) -> Fork:
        """Puts a fork after what was written so far; the branch waits for its paths from now on."""
        fork = Fork(block, children)
        self.items.append(fork)
        self.forks.append(fork)
        self.status = BranchStatus.WAITING
        return fork

    def child(self, number: int, label: str, block: Block) -> "Branch":
        """Opens the next path of `block`: same start for all of them, nothing shared but what the parent sees."""
        path = Path(branch=number, start=len(self.history))
        block.paths.append(path)
        return Branch(
            number=number,
            parent=self,
            label=label,
            path=path,
            next_position=block.open_paths_at(self.next_position),
            history=list(self.history),
            inherited=len(self.history),
            grammar=TagGrammar(stack=[OpenTag("Path", 0)]),
        )

    def merge(self, fork: Fork) -> None:
        """Takes the finished paths of `fork` into sight; no cache slot is touched."""
        self.absorbed += fork.children
        for child in fork.children:
            self.history += child.history[child.inherited :]
        if fork.block.paths:
            self.next_position = fork.block.reduce_position()
        self.status = BranchStatus.RUNNING

    @property
    def depth(self) -> int:
        """Blocks around the next token."""
        return len(self.blocks) + (0 if self.parent is None else self.parent.depth)

    def running(self) -> int:
        """Branches that are being sampled, this one and those below it."""
        if self.status is BranchStatus.RUNNING:
            return 1
        return sum(child.running() for child in self.forks[-1].children) if self.forks else 0

    def tree(self) -> "list[Branch]":
        """This branch and all below it, in linear order of their beginnings."""
        found = [self]
        for fork in self.forks:
            for child in fork.children:
                found += child.tree()
        return found

    def tokens(self) -> list[Token]:
        """All generated tokens from this branch down, in linear order."""
        found: list[Token] = []
        for item in self.items:
            if isinstance(item, Token):
                found.append(item)
            else:
                for child in item.children:
                    found += child.tokens()
        return found
