"""Callbacks that look after a training run: answers to held-out prompts, and a stop before numbers turn to NaN."""

import functools
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from multiverse.layout import BranchLayout
from multiverse.tags import check_token_ids
from multiverse.trainer.recovery import find_complete_checkpoint
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

logger = logging.getLogger(__name__)

#: Steps in a row whose gradients may overflow under float16 before it counts as an error: the loss scale, which is
#: halved each time, has then come down from 65536 to below 1.
_MOST_OVERFLOWS = 20


class HeldOutAnswers(TrainerCallback):
    """Lets the model answer held-out prompts while it is trained, logs how well it did, and keeps the answers.

    Logged, as means over the prompts: `eval_generation_valid` (ended by itself, and no structure problem in prompt and
    answer), `eval_generation_accuracy` (with a `judge`), `eval_generation_parallelism` (tokens per sequential step, of
    each answer; paper, section 6), `eval_generation_steps`, `eval_generation_tokens`; and the number
    `eval_generation_failed` of prompts whose generation or judgement raised an error. Such an error is reported as a
    warning with its traceback and stored in the answer's place; training goes on. At an evaluation the numbers are
    among its metrics too, so `metric_for_best_model="eval_generation_accuracy"` works.

    Every answer is a line of JSON in `output_dir`; a step that is run again after a restart adds its lines once more.

    Training is not disturbed: random states, the mode of every module and the flags of the training loop are put back,
    and weights, gradients and configuration are not touched. Processes share the prompts; where they share the weights
    (FSDP2, DeepSpeed ZeRO-3) all of them answer every prompt in step. Answers have the precision of the training.

    Args:
        trainer (`Trainer`): whose model answers; give the callback to its `add_callback`.
        rows (`Sequence[Mapping]`): held-out rows with `prompt` (a text, or a list of messages) or `messages` (those
            that end the conversation by the assistant are what is to be answered).
        judge (`Callable[[str, Mapping], bool]`, *optional*): whether an answer to a row is right. The text has the
            tags, but no special tokens.
        every (`int`, *optional*): steps from one round to the next; without it, at every evaluation.
        batch_size (`int`): prompts that are answered together.
        max_new_tokens (`int`): per answer, all branches together.
        generation (`Mapping`, *optional*): further arguments of `generate()`; greedy decoding without packed weights
            by default.
        file_name (`str`): of the answers, in `output_dir`.

    Raises:
        ValueError: for empty or unusable rows, counts that are not positive, a model without tags, FSDP1.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Sequence[Mapping[str, Any]],
        judge: Callable[[str, Mapping[str, Any]], bool] | None = None,
        every: int | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 1024,
        generation: Mapping[str, Any] | None = None,
        file_name: str = "answers.jsonl",
    ) -> None:
        for name, value in (("every", every), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if not (name == "every" and value is None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if len(rows) == 0:
            raise ValueError("`rows` is empty: there is nothing to answer. Give held-out rows, or no callback.")
        self.tokenizer: Any = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if not callable(self.tokenizer):
            raise ValueError("`trainer.processing_class` is no tokenizer. Pass the model's to the trainer.")
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise ValueError("`fsdp_version` is 1, whose flat parameters cannot generate. Use version 2.")
        self.trainer = trainer
        self.rows = [dict(row) for row in rows]
        self.prompts = [self._prompt(number) for number in range(len(rows))]
        self.judge = judge
        self.every = every
        self.batch_size = batch_size
        self.generation = {
            "do_sample": False,
            "max_new_tokens": max_new_tokens,
            # The configuration says False while a model is trained.
            "use_cache": True,
            # Weights change from round to round, and training needs the memory of the copies.
            "pack_linears": False,
            **(generation or {}),
            "return_dict_in_generate": True,
            # Processes that share the weights answer the same prompts, and so make the same steps anyway.
            "synced_gpus": False,
        }
        self.file_name = file_name
        self.token_ids = check_token_ids(getattr(self._model().config, "multiverse_token_ids", None))
        self._latest: tuple[int, dict[str, float]] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._round(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if self.every is None:
            # One round is enough for all datasets of an evaluation.
            if self._latest is None or self._latest[0] != state.global_step:
                self._round(args, state, control)
            assert self._latest is not None
            metrics.update(self._latest[1])

    def _round(self, args: Any, state: Any, control: Any) -> None:
        accelerator = self.trainer.accelerator
        sharded = self.trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        first, stride = (0, 1) if sharded else (accelerator.process_index, accelerator.num_processes)
        numbers = range(first, len(self.rows), stride)
        with undisturbed(self._model()):
            batches = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
            records = [{"step": state.global_step, **record} for batch in batches for record in self._answer(batch)]
        if not sharded and accelerator.num_processes > 1:
            records = sorted(gather_object(records), key=lambda record: record["row"])
        if state.is_world_process_zero:
            path = Path(args.output_dir) / self.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._latest = (state.global_step, _means(records))
        # The trainer's own `log` alone: TRL's would hand out, and forget, what it gathers for its next log. A log
        # also switches off the one that is due at this step.
        due = control.should_log
        Trainer.log(self.trainer, dict(self._latest[1]))
        control.should_log = due

    def _answer(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """A record for each of the rows, by number, of one batch."""
        try:
            return self._records(numbers, self._generate(numbers))
        except Exception as error:
            logger.warning(
                "Answering held-out prompts %s failed; training goes on without.", list(numbers), exc_info=True
            )
            return [{"row": number, "error": f"{type(error).__name__}: {error}"} for number in numbers]

    def _generate(self, numbers: Sequence[int]) -> Any:
        device = self.trainer.accelerator.device
        prompts = [torch.tensor(self.prompts[number]) for number in numbers]
        ids = pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        return self._model().generate(input_ids=ids.to(device), attention_mask=mask.to(device), **self.generation)

    def _records(self, numbers: Sequence[int], output: Any) -> list[dict[str, Any]]:
        sequences = output.sequences.cpu()
        width = max(len(self.prompts[number]) for number in numbers)
        records = []
        for number, row, report in zip(numbers, sequences, output.reports, strict=True):
            made = row[width : width + report.generated_tokens].tolist()
            problems = BranchLayout.from_token_ids([*self.prompts[number], *made], self.token_ids).problems
            text = str(self.tokenizer.decode(made, skip_special_tokens=True))
            record = {
                "row": number,
                "valid": report.finish_reason == "eos" and not problems,
                "problems": [str(problem) for problem in problems],
                "finish_reason": report.finish_reason,
                "generated_tokens": report.generated_tokens,
                "sequential_steps": report.sequential_steps,
                "text": text,
            }
            if self.judge is not None:
                record["right"] = bool(self.judge(text, self.rows[number]))
            records.append(record)
        return records

    def _model(self) -> Any:
        """What can generate: without the wrappers of data parallelism and compilation, with an adapter's."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)

    def _prompt(self, number: int) -> list[int]:
        row = self.rows[number]
        prompt = row.get("prompt")
        if prompt is None:
            prompt = list(row.get("messages") or ())
            while prompt and prompt[-1]["role"] == "assistant":
                prompt.pop()
        if not prompt:
            raise ValueError(
                f"`rows[{number}]` has neither a 'prompt' nor 'messages' to answer, got {sorted(row)}. Give it one."
            )
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    answered = [record for record in records if "error" not in record]
    means: dict[str, float] = {"eval_generation_failed": len(records) - len(answered)}
    if not answered:
        return means

    def mean(value: Callable[[Mapping[str, Any]], float]) -> float:
        return sum(map(value, answered)) / len(answered)

    means["eval_generation_valid"] = mean(lambda record: record["valid"])
    if "right" in answered[0]:
        means["eval_generation_accuracy"] = mean(lambda record: record["right"])
    means["eval_generation_parallelism"] = mean(
        lambda record: record["generated_tokens"] / max(record["sequential_steps"], 1)
    )
    means["eval_generation_steps"] = mean(lambda record: record["sequential_steps"])
    means["eval_generation_tokens"] = mean(lambda record: record["generated_tokens"])
    return means


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in, and all random states are as before.

    Args:
        model (`nn.Module`): whose modules are meant, and whose device's random state if it is a CUDA device.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (the one that the trainer saves)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


class StopOnNonFinite(TrainerCallback):
    """Stops training with an error before a NaN or infinite loss or gradient norm reaches the weights.

    By default (`logging_nan_inf_filter`) the trainer shows a mean of earlier losses where a loss is NaN, and goes on;
    every later checkpoint is then useless. Here the step is not made, and no checkpoint is written after the last good
    one. (DeepSpeed makes its step by itself, earlier; there it is only the checkpoints that are spared.)

    Costs one wait for the device per optimiser step, and between processes the exchange of two numbers. Under float16
    a gradient norm may overflow now and then while the loss scale settles, so only the loss, or 20 overflows in a row,
    stop the run.

    Args:
        trainer (`Trainer`): the trainer; give the callback to its `add_callback`.

    Raises:
        FloatingPointError: while training, on every process, with the step, the learning rate and what to try.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._losses: list[torch.Tensor] = []
        self._norm: Any = None
        self._overflows = 0
        step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = step(*args, **kwargs)
            self._losses.append(loss.detach())
            return loss

        @functools.wraps(clip)
        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Any:
            self._norm = clip(*args, **kwargs)
            return self._norm

        trainer.training_step = training_step  # type: ignore[method-assign]
        trainer.accelerator.clip_grad_norm_ = clip_grad_norm_

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._losses.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        norm = 0.0 if self._norm is None else getattr(self._norm, "full_tensor", lambda: self._norm)()
        loss = torch.stack(self._losses).sum() if self._losses else 0.0
        values = torch.stack([torch.as_tensor(value, device=accelerator.device).float() for value in (loss, norm)])
        found = (~torch.isfinite(values)).long()
        if accelerator.num_processes > 1:
            found = accelerator.reduce(found, reduction="sum")
        bad_loss, bad_norm = found.tolist()
        if args.fp16 and not bad_loss:
            self._overflows = self._overflows + 1 if bad_norm else 0
            if self._overflows < _MOST_OVERFLOWS:
                return
        if bad_loss or bad_norm:
            raise FloatingPointError(self._message(args, state.global_step + 1, values.tolist(), optimizer))

    def _message(self, args: Any, step: int, values: list[float], optimizer: Any) -> str:
        rate = optimizer.param_groups[0]["lr"] if optimizer is not None else args.learning_rate
        checkpoint = find_complete_checkpoint(args.output_dir)
        kept = f"The last checkpoint, {checkpoint}, is intact" if checkpoint else "No checkpoint has been written yet"
        return (
            f"Training stopped at step {step}: the loss is {values[0]:g} and the gradient norm {values[1]:g} (process "
            f"{self.trainer.accelerator.process_index}, learning rate {rate:g}). {kept}. Try a lower `learning_rate`, "
            "more `warmup_steps`, a smaller `max_grad_norm`, `bf16` in the place of `fp16`; and look at this step's "
            "batch: a batch without a single label has no mean loss, and a broken weight in the checkpoint that was "
            "loaded gives NaN at the first step."
        )
