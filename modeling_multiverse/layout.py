"""`BranchLayout`: the structure of one token sequence, and its token-by-token twin.

Shapes: N tokens, R branches (one root per document, one per path).
"""

import importlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from .problems import Problem, find_problems
from .structure import Block, StructureMachine
from .tags import check_token_ids


@dataclass(eq=False)
class BranchLayout:
    """Branch, position and visibility of every token of one sequence (LAYOUT.md, sections 3 to 5).

    Attributes:
        branch_ids (`torch.LongTensor` of shape `(N,)`): branch of every token, 0 for the (first) root.
        position_ids (`torch.LongTensor` of shape `(N,)`): rotary position of every token.
        machine (`StructureMachine`): the state after the last token; `blocks` and `problems` are read off it.

    Example:

    ```python
    >>> from multiverse import BranchLayout
    >>> layout = BranchLayout.from_token_ids(input_ids, model.config.multiverse_token_ids)
    >>> layout.position_ids, layout.attention_mask(), layout.problems
    ```
    """

    branch_ids: torch.Tensor
    position_ids: torch.Tensor
    machine: StructureMachine

    @classmethod
    def from_token_ids(
        cls,
        input_ids: torch.Tensor | Sequence[int],
        token_ids: Mapping[str, int],
        document_starts: torch.Tensor | Iterable[int] | None = None,
    ) -> "BranchLayout":
        """Reads the structure of a whole sequence: O(N) vectorised work, Python steps for the tags only.

        Args:
            input_ids (`torch.Tensor` or sequence of `int`, shape `(N,)`): any token sequence, well-formed or not.
            token_ids (`Mapping[str, int]`): id of every tag, `model.config.multiverse_token_ids`.
            document_starts (`torch.Tensor` or iterable of `int`, *optional*): index of the first token of every packed
                document. Index 0 is implied.

        Raises:
            ValueError: if `input_ids` is not one-dimensional, `token_ids` lacks a tag, or a start lies outside.
        """
        machine = read_sequence(input_ids, check_token_ids(token_ids), document_starts)
        return cls.from_machine(machine)

    @classmethod
    def from_machine(cls, machine: StructureMachine, start: int = 0) -> "BranchLayout":
        """The layout of the tokens from index `start` on that `machine` has read."""
        branch_ids, position_ids = expand_runs(machine, start)
        return cls(branch_ids=branch_ids, position_ids=position_ids, machine=machine)

    @property
    def blocks(self) -> list[Block]:
        """Outermost blocks in order; nested ones hang below their path."""
        return self.machine.blocks

    @cached_property
    def problems(self) -> list[Problem]:
        """What is malformed, by index; empty for a well-formed sequence."""
        return find_problems(self.machine.events)

    @cached_property
    def compatible(self) -> torch.Tensor:
        """Bool table of shape `(R, R)`: whether two branches may see each other (causality apart)."""
        return compatible_branches(self.machine)

    def attention_mask(self, first: int = 0) -> torch.Tensor:
        """Bool mask of shape `(N - first, N)`: True where the row's token may attend to the column's.

        Args:
            first (`int`): index of the first token to have a row.
        """
        pairs = self.compatible[self.branch_ids[first:]][:, self.branch_ids]
        return pairs.tril_(first)

    def plot(
        self,
        kind: Literal["mask", "timeline", "both"] = "both",
        tokens: Sequence[str] | None = None,
        axes: Any = None,
        start: int = 0,
    ) -> Any:
        """Draws the attention mask, the timeline that the positions allow, or both (needs the extra `plots`).

        Args:
            kind (`str`): `"mask"`, `"timeline"` or `"both"`.
            tokens (sequence of `str` of length N, *optional*): texts of the tokens, written along the mask's axes.
            axes (`matplotlib.axes.Axes` or a pair of them, *optional*): where to draw, mask first; new by default.
            start (`int`): index of the first generated token; those before it are left out of the timeline.

        Returns:
            `matplotlib.figure.Figure`: the figure that holds the axes.

        Raises:
            ImportError: if matplotlib is missing, or this is code beside a checkpoint and the package is missing.
            ValueError: if an argument does not fit.
        """
        try:
            # By name, not by an import statement: this module is also written beside checkpoints, with every module
            # that it imports, and a model does not need pictures.
            module = importlib.import_module("multiverse.plot")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "multiverse":
                raise
            raise ImportError(
                "`plot` is not part of the code beside a checkpoint: `pip install 'multiverse-transformers[plots]'`."
            ) from error
        return module.plot_layout(self, kind, tokens, axes, start)

    def __len__(self) -> int:
        return self.branch_ids.shape[0]


class IncrementalLayout:
    """The twin of `BranchLayout` that reads one token at a time, for decoding and for cached forward passes.

    After any number of `append` calls it holds exactly what `BranchLayout.from_token_ids` gives for the same tokens.

    Args:
        token_ids (`Mapping[str, int]`): id of every tag.
    """

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        self._tag_of_id = {token_id: tag for tag, token_id in check_token_ids(token_ids).items()}
        self.machine = StructureMachine()

    def start_document(self) -> None:
        """Lets the next token begin a packed document."""
        self.machine.start_document()

    def append(self, token_id: int) -> tuple[int, int]:
        """Reads one token and returns its `(branch id, position)`."""
        tag = self._tag_of_id.get(token_id)
        if tag is None:
            self.machine.read_plain(1)
        else:
            self.machine.read_tag(tag)
        return self.machine.branch, self.machine.next_position - 1

    def layout(self) -> BranchLayout:
        """The layout of everything read so far."""
        return BranchLayout.from_machine(self.machine)


def read_sequence(
    input_ids: torch.Tensor | Sequence[int],
    token_ids: Mapping[str, int],
    document_starts: torch.Tensor | Iterable[int] | None = None,
    machine: StructureMachine | None = None,
) -> StructureMachine:
    """Lets `machine` (a new one by default) read `input_ids`; only tags cost a Python step.

    `document_starts` are indices into `input_ids`. `token_ids` is taken as checked.
    """
    ids = torch.as_tensor(input_ids).detach()
    if ids.dim() != 1:
        raise ValueError(f"`input_ids` must have one dimension, got shape {tuple(ids.shape)}. Pass one row at a time.")
    if ids.is_floating_point() and ids.numel():
        raise ValueError(f"`input_ids` must hold integers, got {ids.dtype}.")
    length = ids.shape[0]
    starts = sorted({operator.index(start) for start in document_starts}) if document_starts is not None else []
    if starts and not 0 <= starts[0] <= starts[-1] < max(length, 1):
        raise ValueError(f"`document_starts` must lie in [0, {length}), got {starts[0]} to {starts[-1]}.")

    machine = StructureMachine() if machine is None else machine
    tag_of_id = {token_id: tag for tag, token_id in token_ids.items()}
    wanted = torch.tensor(list(tag_of_id), dtype=torch.long, device=ids.device)
    indices = torch.isin(ids.long(), wanted).nonzero().flatten()
    events = [(int(i), tag_of_id[int(t)]) for i, t in zip(indices.tolist(), ids[indices].tolist(), strict=True)]
    if starts:
        # A start sorts before a tag at the same index, as "" sorts before every tag.
        events = sorted(events + [(start, "") for start in starts])
    offset = machine.length
    for index, tag in events:
        machine.read_plain(offset + index - machine.length)
        if tag:
            machine.read_tag(tag)
        else:
            machine.start_document()
    machine.read_plain(offset + length - machine.length)
    return machine


def expand_runs(machine: StructureMachine, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Branch and position of every token from `start` on, int64 of shape `(machine.length - start,)` each."""
    runs = torch.tensor(machine.runs, dtype=torch.long).view(-1, 3)
    first, branch, position = runs.unbind(1)
    lengths = torch.diff(first, append=torch.tensor([machine.length]))
    branch_ids = torch.repeat_interleave(branch, lengths)
    position_ids = torch.arange(machine.length) + torch.repeat_interleave(position - first, lengths)
    return branch_ids[start:], position_ids[start:]


def compatible_branches(machine: StructureMachine) -> torch.Tensor:
    """Bool table `(R, R)` of branch compatibility.

    A new branch sees what its parent sees, less the branches that its earlier siblings hold, and itself.
    """
    count = len(machine.parents)
    table = torch.zeros(count, count, dtype=torch.bool)
    rows = table.numpy()
    for branch, (parent, siblings) in enumerate(zip(machine.parents, machine.sibling_branches, strict=True)):
        if parent >= 0:
            rows[branch, :branch] = rows[parent, :branch]
            for first, end in siblings:
                rows[branch, first:end] = False
        rows[branch, branch] = True
        # Symmetric as it grows: the parent's row must know the branches that came after it.
        rows[:branch, branch] = rows[branch, :branch]
    return table
