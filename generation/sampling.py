"""From logits to tokens: structure guard, logits processors, greedy choice or a draw per branch.

Draws come from a random stream of each branch, which depends on the request's seed and on the branch's place in the
tree. So a sample does not depend on what else is in the batch, nor on the order in which branches are run.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from .branch import Branch, Choice
from .request import Request
from .transfer import on_device

#: Processors that read the logits alone: one call serves all branches.
_WITHOUT_HISTORY: tuple[type, ...] = tuple(
    getattr(logits_process, name)
    for name in (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "MinPLogitsWarper",
        "SuppressTokensLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    )
    if hasattr(logits_process, name)
)


@dataclass
class SamplingOptions:
    """How tokens are chosen, and what is kept of the choice.

    Attributes:
        processors (`Sequence[LogitsProcessorList]`): one list per request.
        seeds (`Sequence[int]`, *optional*): one per request; `None` for greedy decoding.
        keep_logits (`bool`): every sampled token keeps the raw logits.
        keep_scores (`bool`): every sampled token keeps the processed scores.
        keep_logprobs (`bool`): every sampled token keeps its log-probability under the raw logits.
    """

    processors: Sequence[LogitsProcessorList]
    seeds: Sequence[int] | None = None
    keep_logits: bool = False
    keep_scores: bool = False
    keep_logprobs: bool = False


@dataclass(slots=True)
class _History:
    """Token ids that a branch sees, in a buffer that takes new ones without being built again."""

    buffer: torch.Tensor
    length: int = 0

    def read(self, ids: list[int]) -> torch.Tensor:
        if len(ids) > self.buffer.shape[1]:
            larger = self.buffer.new_empty(1, 2 * len(ids))
            larger[:, : self.length] = self.buffer[:, : self.length]
            self.buffer = larger
        if len(ids) > self.length:
            self.buffer[0, self.length : len(ids)] = on_device(ids[self.length :], self.buffer.device)
            self.length = len(ids)
        return self.buffer[:, : self.length]


@dataclass
class Sampler:
    """Chooses the next token of every branch.

    Args:
        requests (`Sequence[Request]`): the requests of the call.
        options (`SamplingOptions`): how.
    """

    requests: Sequence[Request]
    options: SamplingOptions
    _streams: dict[Branch, random.Random] = field(default_factory=dict)
    _histories: dict[Branch, _History] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lists = self.options.processors
        first = lists[0]
        self._shared = all(
            len(each) == len(first) and all(a is b for a, b in zip(each, first, strict=True)) for each in lists
        ) and all(type(processor) in _WITHOUT_HISTORY for processor in first)

    def history(self, branch: Branch, device: torch.device) -> torch.Tensor:
        """What the branch sees as token ids in linear order, shape `(1, length)`: for processors and criteria."""
        kept = self._histories.get(branch)
        if kept is None:
            # Room to grow: a path is seldom much longer than what came before it.
            kept = _History(torch.empty(1, 2 * len(branch.history) + 64, dtype=torch.long, device=device))
            self._histories[branch] = kept
        return kept.read(branch.history)

    def choose(self, branches: Sequence[tuple[int, Branch]], logits: torch.Tensor) -> list[Choice]:
        """One token per branch.

        Args:
            branches (`Sequence[tuple[int, Branch]]`): request and branch of every row.
            logits (`torch.Tensor` of shape `(rows, vocabulary)`): overwritten unless it is kept.

        Raises:
            ValueError: for logits that are not a number, and where no token is allowed.
        """
        options = self.options
        raw = logits.float()
        logprobs = raw.log_softmax(dim=-1) if options.keep_logprobs else None
        scores = raw.clone() if options.keep_logits else raw
        # Before the processors, which choose among what is left, and after them: some set scores instead of changing
        # them, and would let a banned token in again.
        banned = self._banned(branches, scores.device)
        _ban(scores, banned)
        if any(options.processors):
            scores = self._process(branches, scores)
            _ban(scores, banned)
        best = scores.max(dim=-1)
        if options.seeds is None:
            chosen = best.indices
        else:
            draws = [self._stream(number, branch).random() for number, branch in branches]
            # In float64: the float32 sum over a large vocabulary would round small probabilities away.
            cumulative = torch.softmax(scores, dim=-1).double().cumsum(dim=-1)
            points = on_device(draws, scores.device, torch.float64)[:, None]
            chosen = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)[:, 0]
            chosen = chosen.clamp_(max=scores.shape[-1] - 1)
        columns = [chosen.double(), best.values.double()]
        if logprobs is not None:
            columns.append(logprobs.gather(1, chosen[:, None])[:, 0].double())
        # The one place where the host waits for the device.
        read = torch.stack(columns).tolist()
        token_ids, maxima = [int(token) for token in read[0]], read[1]
        self._check(branches, maxima)
        return [
            Choice(
                token,
                raw[row] if options.keep_logits else None,
                scores[row] if options.keep_scores else None,
                read[2][row] if logprobs is not None else None,
            )
            for row, token in enumerate(token_ids)
        ]

    def _banned(
        self, branches: Sequence[tuple[int, Branch]], device: torch.device
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The structure guard: rows, shape `(rows, 1)`, and the tokens that would break the structure in them."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, (number, branch) in enumerate(branches):
            rows.setdefault(self.requests[number].banned_tokens(branch), []).append(row)
        return [
            (on_device(group, device)[:, None], on_device(banned, device)) for banned, group in rows.items() if banned
        ]

    def _process(self, branches: Sequence[tuple[int, Branch]], scores: torch.Tensor) -> torch.Tensor:
        lists = self.options.processors
        if self._shared:
            nothing = torch.empty(len(branches), 0, dtype=torch.long, device=scores.device)
            return lists[0](nothing, scores)  # type: ignore[arg-type]
        for row, (number, branch) in enumerate(branches):
            if lists[number]:
                history = self.history(branch, scores.device)
                scores[row] = lists[number](history, scores[row][None])[0]  # type: ignore[arg-type]
        return scores

    def _stream(self, number: int, branch: Branch) -> random.Random:
        stream = self._streams.get(branch)
        if stream is None:
            assert self.options.seeds is not None
            # Python's generator takes text as its seed, the same on every machine and version.
            stream = self._streams[branch] = random.Random(f"{self.options.seeds[number]}{_place(branch)}")
        return stream

    @staticmethod
    def _check(branches: Sequence[tuple[int, Branch]], maxima: list[float]) -> None:
        for (number, branch), best in zip(branches, maxima, strict=True):
            if best != best:
                raise ValueError(
                    f"The logits of row {number} (path {branch.label or 'root'}) are not a number. The weights or the "
                    "input overflow `dtype`: check them for NaN, or load the model in float32 or bfloat16."
                )
            if best == -float("inf"):
                raise ValueError(
                    f"No token is left for row {number} (path {branch.label or 'root'}): `logits_processor` allows "
                    "only tokens that would break the structure there. Let it allow what closes the open tags."
                )


def _ban(scores: torch.Tensor, banned: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for rows, token_ids in banned:
        scores[rows, token_ids] = -torch.inf


def _place(branch: Branch) -> str:
    """Where a branch stands in its tree, such as `/1.2/1.1`: fork of its parent, and path of that fork."""
    if branch.parent is None:
        return ""
    forks = branch.parent.forks
    fork = next(index for index in range(len(forks) - 1, -1, -1) if branch in forks[index].children)
    return f"{_place(branch.parent)}/{fork + 1}.{forks[fork].children.index(branch) + 1}"
