"""How a request went: its steps, its branches and the tree of its blocks, in plain values."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from multiverse.structure import Block, Path

from .branch import Branch, Fork, Token
from .prompt import path_labels
from .request import Request


@dataclass
class BranchReport:
    """One branch of a finished request, JSON-serialisable through `RequestReport.to_dict`.

    Attributes:
        label (`str`): `1`, `2.1`, ...; empty for the root.
        tokens (`int`): generated tokens that the branch holds itself.
        finish_reason (`str`, *optional*): why a path ended: `"closed"` by the model, `"eos"`, `"max_path_tokens"`,
            `"prompt"` where the prompt has closed it; `None` for the root and for what was cut off.
        first_step (`int`, *optional*): sequential step at which its first token was made; `None` without tokens.
        last_step (`int`, *optional*): and its last.
        first_sampled_step (`int`, *optional*): and the first that the model was asked for, `None` where it was not. A
            path's header is forced at its fork; where paths run one at a time, this is when its turn came.
    """

    label: str
    tokens: int
    finish_reason: str | None
    first_step: int | None
    last_step: int | None
    first_sampled_step: int | None = None


@dataclass
class PathReport:
    """One path of a block.

    Attributes:
        label (`str`): its own label where it has one, else its number.
        branch (`int`): branch id of its tokens.
        start, end (`int`): its tokens, counted from the row's first real one; `end` is exclusive.
        finish_reason (`str`, *optional*): why it ended, see `BranchReport`.
        first_step, last_step (`int`, *optional*): sequential steps that made the first and last token of its own.
        first_sampled_step (`int`, *optional*): see `BranchReport`.
        blocks (`list[BlockReport]`): blocks inside it, in order.
    """

    label: str
    branch: int
    start: int
    end: int
    finish_reason: str | None = None
    first_step: int | None = None
    last_step: int | None = None
    first_sampled_step: int | None = None
    blocks: list["BlockReport"] = field(default_factory=list)


@dataclass
class BlockReport:
    """One block, with everything inside it.

    Attributes:
        branch (`int`): branch id of what stands outside its paths.
        start, end (`int`): from `<Parallel>` to `</Parallel>`, counted from the row's first real token; `end` is
            exclusive, and the row's length for a block that is left open.
        goal_close (`int`, *optional*): index of `</Goal>`.
        conclusion (`int`, *optional*): index of `<Conclusion>`.
        outlines (`int`): how many paths the goal announces.
        paths (`list[PathReport]`): in linear order.
    """

    branch: int
    start: int
    end: int
    goal_close: int | None
    conclusion: int | None
    outlines: int
    paths: list[PathReport] = field(default_factory=list)


@dataclass
class RequestReport:
    """How one request went.

    Attributes:
        finish_reason (`str`, *optional*): why it ended, see `Request`.
        generated_tokens (`int`): tokens made in all branches, forced ones included.
        forced_tokens (`int`): tokens the engine wrote without asking the model.
        sequential_steps (`int`): rounds of sampling, the length of the critical path.
        kv_slots (`int`): cache slots in use at the end; a token that ends the request needs none.
        seconds (`dict[str, float]`): wall time by stage: `"prefill"`, `"sequential"`, `"map"`, `"process"`,
            `"reduce"`. A step of a batch counts in full for each request in it.
        branches (`list[BranchReport]`): root first, then the paths in linear order, less what the prompt has closed.
        blocks (`list[BlockReport]`): the tree of all blocks, the prompt's included.
    """

    finish_reason: str | None
    generated_tokens: int
    forced_tokens: int
    sequential_steps: int
    kv_slots: int
    seconds: dict[str, float]
    branches: list[BranchReport]
    blocks: list[BlockReport] = field(default_factory=list)

    @property
    def degree_of_parallelism(self) -> float:
        """Generated tokens per sequential step (paper, section 6)."""
        return self.generated_tokens / max(self.sequential_steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {**asdict(self), "degree_of_parallelism": self.degree_of_parallelism}

    @classmethod
    def of(cls, request: Request) -> "RequestReport":
        """The report of a finished request."""
        tokens = request.root.tokens()
        return cls(
            finish_reason=request.finish_reason,
            generated_tokens=len(tokens),
            forced_tokens=sum(token.forced for token in tokens),
            sequential_steps=request.steps,
            kv_slots=request.kv_slots,
            seconds=dict(request.seconds),
            branches=[_report(branch) for branch in request.branches()],
            blocks=_TreeReader(request).read(),
        )


def _report(branch: Branch) -> BranchReport:
    own = [item for item in branch.items if isinstance(item, Token)]
    return BranchReport(
        label=branch.label,
        tokens=len(own),
        finish_reason=branch.finish_reason,
        first_step=own[0].step if own else None,
        last_step=own[-1].step if own else None,
        first_sampled_step=next((token.step for token in own if not token.forced), None),
    )


class _TreeReader:
    """Puts what the engine knows of a path beside what its text says."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids = request.linear_ids()
        self.machine = request.linear_machine()
        self.branches = dict(_starts(request))

    def read(self) -> list[BlockReport]:
        return self._blocks(self.machine.blocks, "")

    def _blocks(self, blocks: Iterable[Block], prefix: str) -> list[BlockReport]:
        return [
            BlockReport(
                branch=block.branch,
                start=block.start,
                end=len(self.ids) if block.end is None else block.end,
                goal_close=block.goal_close,
                conclusion=block.conclusion,
                outlines=len(block.outlines),
                paths=self._paths(block.paths, prefix),
            )
            for block in blocks
        ]

    def _paths(self, paths: list[Path], prefix: str) -> list[PathReport]:
        read = self.request.rules.header.read_label
        labels = path_labels(prefix, [read(self.ids, path.start + 1)[0] for path in paths])
        reports = []
        for label, path in zip(labels, paths, strict=True):
            branch = self.branches.get(path.start)
            end = len(self.ids) if path.end is None else path.end
            report = PathReport(label, path.branch, path.start, end, "prompt", blocks=self._blocks(path.blocks, label))
            if branch is not None:
                own = _report(branch)
                report.label, report.finish_reason = branch.label, own.finish_reason
                report.first_step, report.last_step = own.first_step, own.last_step
                report.first_sampled_step = own.first_sampled_step
            reports.append(report)
        return reports


def _starts(request: Request) -> Iterator[tuple[int, Branch]]:
    """Every path that the engine has run, with the linear index of its `<Path>`."""
    index = len(request.prompt)

    def walk(branch: Branch) -> Iterator[tuple[int, Branch]]:
        nonlocal index
        for item in branch.items:
            if not isinstance(item, Fork):
                index += 1
                continue
            for child in item.children:
                # What the prompt has begun starts there, and goes on here.
                begun = child.visible is not None and child.path is not None
                yield (child.path.start if begun and child.path else index), child
                yield from walk(child)

    return walk(request.root)
