"""The decoding loop: schedule, run the model, sample, let the branches grow.

One step is one forward pass over the next tokens of all live branches. Tokens that the engine forces ride along with
sampled ones, so a fork and a merge cost no step of their own.
"""

from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .branch import Branch, BranchStatus
from .model_step import ModelStep
from .request import Request, RequestRules
from .scheduler import branches_to_run
from .streaming import BranchStreamer, LinearFeed


class Engine:
    """Decodes a batch of requests.

    Args:
        model (`PreTrainedModel`): a Multiverse causal LM.
        prompts (`Sequence[list[int]]`): token ids per request, without padding.
        rules (`RequestRules`): tags and limits.
        logits_processors (`Sequence[LogitsProcessorList]`): one list per request, called per branch with the tokens
            that the branch may see.
        stopping_criteria (`StoppingCriteriaList`): called per branch likewise; one that is met ends the request.
        do_sample (`bool`): multinomial sampling rather than the most likely token.
        parallel (`bool`): whether sibling paths run side by side.
        keep_logits (`bool`): whether every sampled token keeps the raw logits it was drawn from.
        streamer (`BaseStreamer`, *optional*): shown the tokens as they come.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        rules: RequestRules,
        logits_processors: Sequence[LogitsProcessorList],
        stopping_criteria: StoppingCriteriaList,
        do_sample: bool = False,
        parallel: bool = True,
        keep_logits: bool = False,
        streamer: BaseStreamer | None = None,
    ) -> None:
        self.rules = rules
        self.stopping_criteria = stopping_criteria
        self.do_sample = do_sample
        self.parallel = parallel
        self.keep_logits = keep_logits
        longest = max(len(prompt) for prompt in prompts)
        self.model_step = ModelStep(model, capacity=len(prompts) * (longest + min(rules.max_new_tokens, 256)))
        self.requests = [Request(prompt, rules, self.model_step.new_label) for prompt in prompts]
        self.processors = dict(zip(self.requests, logits_processors, strict=True))
        self.streamer = streamer
        self._show: Callable[[Sequence[Request]], None] | None = None
        if streamer is not None:
            self._show = streamer.put_step if isinstance(streamer, BranchStreamer) else LinearFeed(streamer).put_step

    def run(self) -> list[Request]:
        """Decodes until every request has come to its end."""
        ready: list[tuple[Request, Branch]] = []
        rows: list[torch.Tensor] = []
        for request in self.requests:
            logits = self.model_step.prefill(request)
            # A prompt that ends at a fork or a merge has forced tokens to run before anything is sampled.
            running = [branch for branch in request.branches() if branch.status is BranchStatus.RUNNING]
            ready += [(request, branch) for branch in running if not branch.pending]
            rows += [logits for branch in running if not branch.pending]
        if ready:
            self._sample(ready, torch.stack(rows))
        while any(not request.finished for request in self.requests):
            plan = [
                (request, branch)
                for request in self.requests
                if not request.finished
                for branch in branches_to_run(request, self.parallel)
            ]
            assert plan, "an unfinished request always has tokens to run"
            logits = self.model_step.decode([branch for _, branch in plan])
            sampled = [row for row, (_, branch) in enumerate(plan) if branch.status is BranchStatus.RUNNING]
            self._sample([plan[row] for row in sampled], logits[sampled])
        if self.streamer is not None:
            self.streamer.end()
        return self.requests

    def _sample(self, branches: list[tuple[Request, Branch]], logits: torch.Tensor) -> None:
        """Draws the next token of every branch from `logits` of shape `(branches, vocabulary)` and lets it grow."""
        raw = logits.to(dtype=torch.float32, copy=True)
        scores = raw.clone()
        for row, (request, branch) in enumerate(branches):
            scores[row, request.banned_tokens(branch)] = -torch.inf
            if self.processors[request]:
                history = torch.tensor([branch.history], device=scores.device)
                scores[row] = self.processors[request](history, scores[row][None])[0]  # type: ignore[arg-type]
        if self.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)[:, 0].tolist()
        else:
            tokens = scores.argmax(dim=-1).tolist()
        for request in {id(request): request for request, _ in branches}.values():
            request.steps += 1
        for row, ((request, branch), token) in enumerate(zip(branches, tokens, strict=True)):
            if not request.finished:
                request.accept(branch, token, raw[row] if self.keep_logits else None)
                self._check_criteria(request, branch)
        if self._show is not None:
            self._show(self.requests)

    def _check_criteria(self, request: Request, branch: Branch) -> None:
        """Ends the request if a stopping criterion holds for what `branch` sees."""
        if self.stopping_criteria and not request.finished:
            history = torch.tensor([branch.history], device=self.model_step.model.device)
            if bool(self.stopping_criteria(history, None)[0]):  # type: ignore[arg-type]
                request.close("stopped")
