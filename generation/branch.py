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
class Token:
    """One generated token.

    Attributes:
        id (`int`): token id.
        position (`int`): rotary position.
        forced (`bool`): written by the engine rather than sampled.
        step (`int`): sequential step that made it, from 1; 0 for what the prompt's end called for.
        logits (`torch.FloatTensor` of shape `(vocabulary,)`, *optional*): raw logits it was sampled from, when they
            were asked for.
    """

    id: int
    position: int
    forced: bool
    step: int = 0
    logits: torch.Tensor | None = None


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
        number (`int`): label of the branch's cache slots, unique in a call of `generate()`.
        parent (`Branch`, *optional*): branch that holds the block this is a path of; `None` for the root.
        label (`str`): the path's label, such as `2.1`; empty for the root.
        path (`Path`, *optional*): this path in its block's own record, which fixes the merge position.
        next_position (`int`): position of the next token.
        visible (`set[int]`): labels of the slots it may see, its own included.
        history (`list[int]`): token ids it may see, in linear order, its own included: what logits processors get.
        inherited (`int`): how many of `history` were there when the branch opened.
        grammar (`TagGrammar`): tags that are open in this branch.
        blocks (`list[Block]`): open blocks that this branch holds, outermost first.
        items (`list[Token | Fork]`): what it wrote, in order.
        written (`int`): tokens it wrote itself, those of nested paths left out.
        pending (`list[Token]`): written, not yet run through the model.
        status (`BranchStatus`): what it does at present.
        finish_reason (`str`, *optional*): `"closed"`, `"eos"` or `"max_path_tokens"` for a path that has ended.
    """

    number: int
    parent: "Branch | None" = None
    label: str = ""
    path: Path | None = None
    next_position: int = 0
    visible: set[int] = field(default_factory=set)
    history: list[int] = field(default_factory=list)
    inherited: int = 0
    grammar: TagGrammar = field(default_factory=TagGrammar)
    blocks: list[Block] = field(default_factory=list)
    items: list[Token | Fork] = field(default_factory=list)
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
            visible=self.visible | {number},
            history=list(self.history),
            inherited=len(self.history),
            grammar=TagGrammar(stack=[OpenTag("Path", 0)]),
        )

    def merge(self, fork: Fork) -> None:
        """Takes the finished paths of `fork` into sight; no cache slot is touched."""
        for child in fork.children:
            self.visible |= child.visible
            self.history += child.history[child.inherited :]
        if fork.block.paths:
            self.next_position = fork.block.reduce_position()
        self.status = BranchStatus.RUNNING

    def tree(self) -> "list[Branch]":
        """This branch and all below it, in linear order of their beginnings."""
        found = [self]
        for item in self.items:
            if isinstance(item, Fork):
                for child in item.children:
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
