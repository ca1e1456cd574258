"""Answers a batch of questions and makes a record of every answer."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from multiverse import MultiverseForCausalLM
from multiverse.evaluation.judge import judge
from multiverse.evaluation.measures import (
    end_of_sequence,
    made_tokens,
    plain_measures,
    report_measures,
    structure_measures,
    times,
)
from multiverse.evaluation.peak_memory import PeakMemory
from multiverse.evaluation.plan import Batch, seed_of
from multiverse.evaluation.prompts import chat_messages, render_prompts
from multiverse.evaluation.settings import Condition, EvaluationSettings
from multiverse.evaluation.tasks import Task
from transformers import PreTrainedTokenizerBase


class Answerer:
    """A model with the settings by which it answers.

    Args:
        model (`MultiverseForCausalLM`): in evaluation mode, on its device.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        settings (`EvaluationSettings`): of the run.
    """

    def __init__(
        self, model: MultiverseForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.token_ids = dict(model.config.multiverse_token_ids or {})
        self.eos = end_of_sequence(model)

    def answer(self, batch: Batch, task: Task) -> list[dict[str, Any]]:
        """Generates the rows of a batch.

        Raises:
            BaseException: whatever interrupts it, with what was generated until then as `partial_records`.
        """
        questions = [task.questions[row.question] for row in batch.rows]
        condition = batch.condition
        seeds = [
            seed_of(self.settings.seed, task.name, question.id, row.sample)
            for question, row in zip(questions, batch.rows, strict=True)
        ]
        instructions = self.settings.instructions
        messages = [chat_messages(question, condition.prompt, instructions) for question in questions]
        prompts = self.prompts(messages)
        start = time.perf_counter()
        with PeakMemory(self.model.device) as peak:
            try:
                output = self.generate(prompts, condition.mode, condition.budget, seeds)
            except BaseException as error:
                partial = getattr(error, "partial_output", None)
                if partial is not None:
                    error.partial_records = self._records(  # type: ignore[attr-defined]
                        batch, task, prompts, partial, seeds, time.perf_counter() - start, None
                    )
                raise
        return self._records(batch, task, prompts, output, seeds, time.perf_counter() - start, peak.bytes)

    def prompts(self, messages: Sequence[list[dict[str, str]]]) -> Any:
        """Token ids and mask of shape `(rows, longest prompt)`, padded on the left, on the model's device."""
        return render_prompts(self.tokenizer, list(messages)).to(self.model.device)

    def generate(
        self,
        prompts: Mapping[str, torch.Tensor],
        mode: str,
        budget: int | None = None,
        seeds: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
    ) -> Any:
        """Calls `generate()` with the settings of the run.

        Args:
            prompts (`Mapping`): made by `prompts`.
            mode (`str`): `"parallel"` or `"sequential"`.
            budget (`int`, *optional*): most sequential steps.
            seeds (sequence of `int`, *optional*): one per row; greedy decoding without.
            max_new_tokens (`int`, *optional*): in the place of the run's.
        """
        settings = self.settings
        options: dict[str, Any] = {"do_sample": settings.do_sample and seeds is not None}
        if options["do_sample"]:
            options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        longest = max_new_tokens or settings.max_new_tokens
        if self.token_ids:
            options |= {"parallel": mode == "parallel", "decode_attention": settings.decode_attention}
            options |= {"max_sequential_steps": budget}
            if options["do_sample"]:
                options["seed"] = list(seeds or ())
        else:
            # A token is a step here, and transformers draws all rows from one generator.
            longest = min(longest, budget or longest)
            if options["do_sample"]:
                torch.manual_seed((seeds or (0,))[0])
        return self.model.generate(**prompts, max_new_tokens=longest, return_dict_in_generate=True, **options)

    def _records(
        self, batch: Batch, task: Task, prompts: Any, output: Any, seeds: list[int], seconds: float, peak: int | None
    ) -> list[dict[str, Any]]:
        width = prompts["input_ids"].shape[1]
        lengths = prompts["attention_mask"].sum(dim=1).tolist()
        records = []
        for number, row in enumerate(batch.rows):
            question = task.questions[row.question]
            made, ended = made_tokens(output, number, width, self.eos)
            report = output.reports[number] if self.token_ids else None
            counted = report_measures(report) if report else plain_measures(len(made), ended, lengths[number])
            if not self.token_ids and not ended and len(made) == batch.condition.budget:
                counted["finish_reason"] = "max_sequential_steps"
            text = self.text(made)
            verdict = judge(text, question.expected, question.kind, counted["finish_reason"], question.choices)
            records.append(
                {
                    **_condition(batch.condition),
                    "question": question.id,
                    "question_number": row.question,
                    "sample": row.sample,
                    "seed": seeds[number] if self.settings.do_sample else None,
                    "expected": question.expected,
                    "answer": verdict.answer,
                    "right": verdict.right,
                    "reason": verdict.reason,
                    "text": text,
                    "prompt_tokens": lengths[number],
                    **counted,
                    **structure_measures(made, self.token_ids),
                    "batch": batch.number,
                    "times": {**times(report, len(made), seconds, len(batch.rows)), "peak_memory_bytes": peak},
                }
            )
        return records

    def counts(self, output: Any, row: int, prompts: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Tokens and sequential steps of a row."""
        if self.token_ids:
            report = output.reports[row]
            return report.generated_tokens, report.sequential_steps
        made, _ = made_tokens(output, row, prompts["input_ids"].shape[1], self.eos)
        return len(made), len(made)

    def text(self, made: list[int]) -> str:
        """What was generated, in linear order with its tags, without the end of the sequence."""
        kept = made[:-1] if made and made[-1] in self.eos else made
        return self.tokenizer.decode(kept, skip_special_tokens=False)  # type: ignore[return-value]


def _condition(condition: Condition) -> dict[str, Any]:
    return {
        "task": condition.task,
        "prompt": condition.prompt,
        "mode": condition.mode,
        "budget": condition.budget,
    }
