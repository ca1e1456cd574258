"""What a training run shows about structure: loss on tags and on content, parallel tokens, branches, problems, speed.

Two hooks on the model take sums over the batches that pass through it, whichever loop or trainer drives it. Nothing
waits for the device: the sums stay on it until a log is due, and the structure of a batch is read where its ids are on
the host anyway, in the collator. Terms as in arXiv 2506.09991: a path of a block is a branch of its own.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from multiverse.tags import check_token_ids
from multiverse.trainer.structure_counts import BATCH_KEY, COUNTS, CountingCollator, count_structure
from torch import nn
from transformers import Trainer, TrainerCallback

IGNORE_INDEX = -100

#: Logits that are turned to float32 at a time: their full copy would be as large as the largest tensor of the step.
_LOGITS_AT_A_TIME = 1 << 24


class StructureMeter:
    """Sums over the batches that pass through a model, training and evaluation apart.

    A batch is a call with labels: TRL's fused head (which returns `log_probs`), or a plain forward pass (`logits`).
    In training only calls that build a graph count, so scoring by an old or a reference policy does not; a second call
    without gradients on the very same `input_ids` may add the losses that the first lacked (label smoothing). In
    evaluation every `input_ids` tensor counts once.

    Structure is taken from the counts that come with the batch, or read from its ids, which waits for the device.

    Args:
        model (`nn.Module`): the model that the loop calls, a PEFT wrapper for instance.
        token_ids (`Mapping[str, int]`): id of every tag.

    Example:

    ```python
    >>> meter = StructureMeter(model, model.config.multiverse_token_ids)
    >>> for batch in loader: ...  # a bare training loop
    >>> print(summarise(meter.totals(training=True).tolist()))
    ```
    """

    def __init__(self, model: nn.Module, token_ids: Mapping[str, int]) -> None:
        self.token_ids = check_token_ids(token_ids)
        self._tags = torch.tensor(sorted(self.token_ids.values()))
        self._totals: dict[bool, torch.Tensor] = {}
        self._batch: torch.Tensor | None = None
        self._scored = False
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def totals(self, training: bool) -> torch.Tensor:
        """The sums since the last call, which starts them anew.

        Returns:
            `torch.Tensor` of shape `(10,)` on the model's device: the six columns of `COUNTS`, then the negative
            log-likelihood (nats) and the number of tag targets, and the same for all other targets.
        """
        self._batch = None
        totals = self._totals.pop(training, None)
        return torch.zeros(len(COUNTS) + 4, dtype=torch.float64) if totals is None else totals

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        counts = kwargs.get(BATCH_KEY)
        kwargs = {name: value for name, value in kwargs.items() if name != BATCH_KEY}
        ids = _ids(args, kwargs)
        labelled = kwargs.get("labels") is not None or kwargs.get("shift_labels") is not None
        if ids is None or not (labelled or counts is not None):
            return args, kwargs
        if torch.is_grad_enabled() if module.training else ids is not self._batch:
            self._batch, self._scored = ids, False
            if counts is None:
                counts = count_structure({**kwargs, "input_ids": ids}, self.token_ids)
            self._add(module.training, ids.device, slice(0, len(COUNTS)), counts.sum(dim=0))
        return args, kwargs

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        ids = _ids(args, kwargs)
        if ids is None or ids is not self._batch or self._scored:
            return
        scored = _token_losses(kwargs, output)
        if scored is None:
            return
        self._scored = True
        losses, targets = scored
        self._tags = self._tags.to(targets.device)
        tags = torch.isin(targets, self._tags)
        content = (targets != IGNORE_INDEX) & ~tags
        sums = [part for kind in (tags, content) for part in (torch.where(kind, losses, 0).sum(), kind.sum())]
        self._add(module.training, ids.device, slice(len(COUNTS), None), torch.stack(sums))

    def _add(self, training: bool, device: torch.device, place: slice, values: torch.Tensor) -> None:
        totals = self._totals.get(training)
        if totals is None:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            totals = self._totals[training] = torch.zeros(len(COUNTS) + 4, dtype=dtype, device=device)
        totals[place] += values.to(device, totals.dtype, non_blocking=True)


def summarise(totals: Sequence[float]) -> dict[str, float]:
    """Turns the sums of `StructureMeter.totals` into what is logged; what there is nothing of is left out.

    - `loss_tags`, `loss_content`: mean negative log-likelihood (nats) of the targets that are tags, and of the others.
      Every target weighs the same, however batches and accumulation cut the run. Masked targets do not count.
    - `parallel_share`: share of the tokens that stand inside a path, prompts included.
    - `branches_per_sample`: 1 for a text without blocks.
    - `problems_per_sample`, and `malformed_samples`, the number of samples that have any.
    """
    tokens, parallel, samples, branches, problems, malformed, tag_loss, tags, content_loss, content = totals
    logs: dict[str, float] = {}
    if tags:
        logs["loss_tags"] = tag_loss / tags
    if content:
        logs["loss_content"] = content_loss / content
    if tokens and samples:
        logs["parallel_share"] = parallel / tokens
        logs["branches_per_sample"] = branches / samples
        logs["problems_per_sample"] = problems / samples
        logs["malformed_samples"] = round(malformed)
    return logs


class StructureWatch(TrainerCallback):
    """Adds the numbers of `summarise` to the trainer's own logs; made by `watch`.

    `tokens_per_second` counts the real tokens of all processes against the time from step to step, waiting for data
    included, evaluation and saving left out.

    Args:
        trainer (`Trainer`): the trainer.
        token_ids (`Mapping[str, int]`): id of every tag.
    """

    def __init__(self, trainer: Trainer, token_ids: Mapping[str, int]) -> None:
        self.trainer = trainer
        assert isinstance(trainer.model, nn.Module)
        self.meter = StructureMeter(trainer.model, token_ids)
        self._mark = time.perf_counter()
        self._seconds = 0.0
        trainer.data_collator = CountingCollator(trainer.data_collator, token_ids)
        # In front, so that everyone who is shown the logs, `report_to` targets and printers, sees them whole.
        trainer.callback_handler.callbacks.insert(0, self)

    def remove(self) -> None:
        """Undoes `watch`."""
        self.meter.remove()
        self.trainer.remove_callback(self)
        if isinstance(self.trainer.data_collator, CountingCollator):
            self.trainer.data_collator = self.trainer.data_collator.collator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.totals(training=True)
        self._mark, self._seconds = time.perf_counter(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.meter.totals(training=False)
        self._mark = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # Processes add up their sums only under the trainer's own logs, which all of them make; what a script logs on
        # one process alone must not wait for the others.
        prefixes = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
        if {"loss", "learning_rate"} <= logs.keys():
            totals, seconds = self._reduced(training=True)
            own = summarise(totals)
            if seconds:
                own["tokens_per_second"] = totals[0] / seconds
        elif prefixes and prefixes != ["train"]:
            own = {
                f"{prefixes[0]}_{name}": value for name, value in summarise(self._reduced(training=False)[0]).items()
            }
        else:
            own = {}
        logs.update(own)
        state.log_history[-1].update(own)
        self._mark = time.perf_counter()

    def _reduced(self, training: bool) -> tuple[list[float], float]:
        """Sums over all processes, and the seconds of a mean one. Tensor-parallel ones see the same batch."""
        totals = self.meter.totals(training)
        if training:
            seconds, self._seconds = self._seconds, 0.0
        else:
            seconds = 0.0
        if self.trainer.accelerator.num_processes > 1:
            device = self.trainer.accelerator.device
            summed = torch.cat([totals.to(device), totals.new_tensor([seconds]).to(device)])
            totals = self.trainer.accelerator.reduce(summed, reduction="sum") / self.trainer.get_tp_size()
            seconds = float(totals[-1]) * self.trainer.get_tp_size() / self.trainer.accelerator.num_processes
        return totals[: len(COUNTS) + 4].tolist(), seconds


def watch(trainer: Trainer) -> StructureWatch:
    """Lets a trainer log what happens to the structure, beside its loss and to the same places.

    For `transformers.Trainer` and TRL's trainers as they are. Every log of training then holds what `summarise` lists
    and `tokens_per_second`, every log of an evaluation the former with the evaluation's prefix; so
    `metric_for_best_model="eval_loss_content"` works. Under DPO the losses are those of the chosen and the rejected
    answers together, under GRPO those of the sampled answers. In a distributed evaluation the rows that fill up the
    last batch count again.

    Args:
        trainer (`Trainer`): with its model and collator in place; to be called before `train`.

    Raises:
        ValueError: if the model has no tags yet, is made anew by `model_init`, or is copied to several GPUs by one
            process.
    """
    known = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StructureWatch)]
    if known:
        return known[0]
    if trainer.model_init is not None:
        raise ValueError(
            "`trainer.model_init` makes a new model when training starts, and hooks on this one would be lost. Pass "
            "`model` to the trainer instead."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"`trainer.args.n_gpu` is {trainer.args.n_gpu}: `nn.DataParallel` copies the model at every step. Start "
            "the script with `torchrun` or `accelerate launch`, or show it one GPU (`CUDA_VISIBLE_DEVICES`)."
        )
    config = trainer.accelerator.unwrap_model(trainer.model).config
    return StructureWatch(trainer, check_token_ids(getattr(config, "multiverse_token_ids", None)))


def _ids(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None


def _token_losses(kwargs: Mapping[str, Any], output: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Negative log-likelihood (nats) of every target, 0 where it is masked, and the targets, `(B, T)` each.

    `labels` stand at the token itself and are shifted here, as in transformers' and TRL's losses; `shift_labels` are
    taken as they are. What a prompt-learning adapter puts in front of the text has no target.
    """
    shifted, labels = kwargs.get("shift_labels"), kwargs.get("labels")
    if shifted is None and labels is None:
        return None
    targets = shifted if labels is None or shifted is not None else labels[:, 1:]
    assert targets is not None
    columns = targets.shape[1]
    log_probs, logits = getattr(output, "log_probs", None), getattr(output, "logits", None)
    if isinstance(log_probs, torch.Tensor):
        losses = -log_probs.detach()[:, log_probs.shape[1] - columns :]
    elif isinstance(logits, torch.Tensor):
        end = logits.shape[1] - (shifted is None)
        losses = _cross_entropy(logits.detach()[:, end - columns : end], targets)
    else:
        return None
    return losses, targets.to(losses.device)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`(B, T)` losses of logits `(B, T, V)`, in float32 or better, a piece at a time."""
    rows = max(1, _LOGITS_AT_A_TIME // logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, torch.float32)
    targets = targets.to(logits.device)
    losses = torch.zeros(targets.shape, dtype=dtype, device=logits.device)
    for row in range(len(targets)):
        for start in range(0, targets.shape[1], rows):
            piece = slice(start, start + rows)
            losses[row, piece] = nn.functional.cross_entropy(
                logits[row, piece].to(dtype), targets[row, piece], ignore_index=IGNORE_INDEX, reduction="none"
            )
    return losses
