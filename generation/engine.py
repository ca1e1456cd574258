"""The decoding loop: schedule, run the model, sample, let the branches grow.

One step is one forward pass over the next tokens of all live branches. Tokens that the engine forces ride along with
sampled ones, so a fork and a merge cost no step of their own.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

from .branch import Branch, BranchStatus
from .model_step import ModelStep
from .request import Request
from .sampling import Sampler, SamplingOptions
from .scheduler import branches_to_run
from .streaming import BranchStreamer, LinearFeed
from .transfer import on_device

#: Slots reserved at first for what a request writes. On a CPU, those that nothing is written to take no memory.
_HEADROOM = 256
_CPU_HEADROOM = 2048


@dataclass(frozen=True)
class EngineOptions:
    """How a batch is decoded.

    Attributes:
        implementation (`str`): attention of the decode steps, `"folded"` or the name of the model's own.
        width (`int`, *optional*): most branches of a request to sample side by side; 1 is sequential decoding.
        static_shapes (`bool`): whether decode steps are filled up to one of a few sizes.
    """

    implementation: str = "folded"
    width: int | None = None
    static_shapes: bool = False


class Engine:
    """Decodes a batch of requests.

    Args:
        model (`PreTrainedModel`): a Multiverse causal LM whose attention runs through `path_attention`.
        requests (`Sequence[Request]`): what to decode.
        sampling (`SamplingOptions`): how tokens are chosen.
        stopping_criteria (`Sequence[StoppingCriteriaList]`): one list per request, called per branch with the tokens
            that it sees; one that is met ends the request.
        options (`EngineOptions`): how steps are run.
        streamer (`BaseStreamer`, *optional*): shown the tokens as they come.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        sampling: SamplingOptions,
        stopping_criteria: Sequence[StoppingCriteriaList],
        options: EngineOptions,
        streamer: BaseStreamer | None = None,
    ) -> None:
        self.requests = requests
        self.options = options
        self.device = model.device
        self.sampler = Sampler(requests, sampling)
        most = _CPU_HEADROOM if model.device.type == "cpu" else _HEADROOM
        headroom = min(max(request.rules.max_new_tokens for request in requests), most)
        self.model_step = ModelStep(model, requests, headroom, options.implementation, options.static_shapes)
        # The clock is the same for all branches; everything else may look at the tokens.
        self._clocks = [each for each in stopping_criteria[0] if isinstance(each, MaxTimeCriteria)]
        self._criteria = {
            request: StoppingCriteriaList(each for each in criteria if each not in self._clocks)
            for request, criteria in zip(requests, stopping_criteria, strict=True)
        }
        self.streamer = streamer
        self._show: Callable[[Sequence[Request]], None] | None = None
        if streamer is not None:
            self._show = streamer.put_step if isinstance(streamer, BranchStreamer) else LinearFeed(streamer).put_step
        self._numbers = {request: number for number, request in enumerate(requests)}

    def run(self, past: Cache | None = None, columns: list[torch.Tensor] | None = None) -> None:
        """Decodes until every request has come to its end.

        Args:
            past (`Cache`, *optional*): keys and values of an earlier turn, in linear order.
            columns (`list[torch.Tensor]`, *optional*): its columns that hold the first tokens of each prompt.
        """
        if past is not None and columns is not None:
            self.model_step.adopt(past, columns)
        self._prefill()
        while live := [number for number, request in enumerate(self.requests) if not request.finished]:
            self._step(live)
        if self.streamer is not None:
            self.streamer.end()

    def _prefill(self) -> None:
        began = time.perf_counter()
        ready: list[tuple[int, Branch]] = []
        rows: list[torch.Tensor] = []
        for request, logits in self.model_step.prefill():
            # A prompt that ends at a fork or a merge has forced tokens to run before anything is sampled.
            running = [branch for branch in request.branches() if branch.status is BranchStatus.RUNNING]
            ready += [(self._numbers[request], branch) for branch in running if not branch.pending]
            rows += [logits for branch in running if not branch.pending]
        if ready:
            self._sample(ready, torch.stack(rows))
        for request in self.requests:
            request.count_seconds("prefill", time.perf_counter() - began)

    def _step(self, live: list[int]) -> None:
        began = time.perf_counter()
        stages = [self.requests[number].stage for number in live]
        plan = [(number, branches_to_run(self.requests[number], self.options.width)) for number in live]
        assert all(branches for _, branches in plan), "an unfinished request always has tokens to run"
        logits = self.model_step.decode(plan)
        order = [(number, branch) for number, branches in plan for branch in branches]
        sampled = [row for row, (_, branch) in enumerate(order) if branch.status is BranchStatus.RUNNING]
        if len(sampled) < len(order):
            logits = logits.index_select(0, on_device(sampled, logits.device))
        self._sample([order[row] for row in sampled], logits)
        for number, stage in zip(live, stages, strict=True):
            self.requests[number].count_seconds(stage, time.perf_counter() - began)

    def _sample(self, branches: list[tuple[int, Branch]], logits: torch.Tensor) -> None:
        """Draws the next token of every branch from `logits` of shape `(branches, vocabulary)` and lets it grow."""
        choices = self.sampler.choose(branches, logits)
        for number in dict.fromkeys(number for number, _ in branches):
            self.requests[number].steps += 1
        for (number, branch), choice in zip(branches, choices, strict=True):
            request = self.requests[number]
            if not request.finished:
                request.accept(branch, choice)
                self._check_criteria(request, branch)
        for number in dict.fromkeys(number for number, _ in branches):
            self.requests[number].end_step()
        # On the host: what a clock says is a tensor, and would be waited for on a device.
        if self._clocks and any(bool(clock(torch.empty(1, 0), None)[0]) for clock in self._clocks):  # type: ignore[arg-type]
            for request in self.requests:
                if not request.finished:
                    request.close("max_time")
        if self._show is not None:
            self._show(self.requests)

    def _check_criteria(self, request: Request, branch: Branch) -> None:
        """Ends the request if a stopping criterion holds for what `branch` sees."""
        criteria = self._criteria[request]
        if criteria and not request.finished:
            history = self.sampler.history(branch, self.device)
            if bool(criteria(history, None)[0]):  # type: ignore[arg-type]
                request.close("stopped")
