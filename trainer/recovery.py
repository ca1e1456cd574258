"""A training run that loses nothing: it goes on from the newest complete checkpoint, and writes one at a signal."""

import json
import logging
import os
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, sort_checkpoints

logger = logging.getLogger(__name__)

#: transformers writes it first when SIGTERM makes it save (`enable_jit_checkpoint`), and removes it last.
_SENTINEL = "checkpoint-is-incomplete.txt"

#: Weights of a model, an adapter (in a folder of its own where there are several), FSDP and DeepSpeed.
_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.*",
    "*/adapter_model.*",
    "pytorch_model_fsdp*",
    "global_step*",
)


def find_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, for `resume_from_checkpoint`.

    One that a kill has cut off is passed over with a warning. The trainer writes weights, optimizer, schedule and
    random states first and `trainer_state.json` last, so a checkpoint is complete when that file can be read; that the
    others are whole is checked as well, from their headers, since a machine that loses power keeps no order. Random
    states of other processes may be written after it: without them a run goes on, with other dropout masks.

    Args:
        output_dir (`str` or `Path`): of the trainer; it need not exist.

    Returns:
        `str`, *optional*: the folder; `None` where there is no complete checkpoint.
    """
    for folder in reversed(sort_checkpoints(str(output_dir), PREFIX_CHECKPOINT_DIR)):
        reason = why_incomplete(folder)
        if reason is None:
            return folder
        logger.warning("The checkpoint %s is incomplete (%s) and passed over.", folder, reason)
    return None


def why_incomplete(checkpoint: str | Path) -> str | None:
    """Says in words what a checkpoint lacks; `None` for a complete one. Reads headers, not weights."""
    folder = Path(checkpoint)
    if (folder / _SENTINEL).exists():
        return f"{_SENTINEL} is there"
    try:
        TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (OSError, TypeError, ValueError) as error:
        return f"trainer_state.json cannot be read: {type(error).__name__}"
    if not any(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
        return "no weights"
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".safetensors" and not _opens(file):
            return f"{file.name} is cut off"
        if file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
        if file.suffix == ".json":
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                return f"{file.name} is cut off"
            shards = set(content["weight_map"].values()) if file.name.endswith(".index.json") else set()
            if missing := sorted(shard for shard in shards if not (file.parent / shard).is_file()):
                return f"{missing[0]} is missing"
        # A sharded state; its table of contents is written when every process has written its part.
        sharded = file.is_dir() and (file.match("pytorch_model_fsdp_*") or file.match("optimizer_*"))
        if sharded and not (file / ".metadata").is_file():
            return f"{file.name}/.metadata is missing"
    return None


def _opens(weights: Path) -> bool:
    """Whether the file is as long as its header says."""
    try:
        with safe_open(weights, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def train_resumably(trainer: Trainer, resume_from_checkpoint: str | bool | None = True) -> TrainOutput:
    """`trainer.train()` for a command that may be stopped at any time and is then run again.

    It goes on from the newest complete checkpoint in the trainer's `output_dir`, with the same batches, schedule and
    random states as if nothing had happened; where there is none, it starts at the beginning, and where the run was
    finished, nothing is trained. Newer checkpoints that are incomplete are renamed (`incomplete-checkpoint-...`), so
    that the trainer's `save_total_limit` does not keep them in the place of good ones.

    The first Ctrl-C (SIGINT) or SIGTERM lets the step be finished, writes a checkpoint, whatever `save_strategy` says,
    and ends the training on all processes; the second stops at once. (`torchrun` passes a signal on to its processes
    and kills them 30 seconds later.) Where `enable_jit_checkpoint` is on, SIGTERM is left to it.

    Args:
        trainer (`Trainer`): ready to train.
        resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint to go on from; `True` finds it; `False` or
            `None` starts at the beginning.

    Raises:
        KeyboardInterrupt: after the checkpoint is written, if Ctrl-C has stopped the run.
        SystemExit: likewise with code 143 for SIGTERM, so that nothing after the training uses half-trained weights.
        ValueError: if `resume_from_checkpoint` names an incomplete checkpoint.
    """
    if isinstance(resume_from_checkpoint, str):
        reason = why_incomplete(resume_from_checkpoint)
        if reason is not None:
            raise ValueError(
                f"`resume_from_checkpoint` is {resume_from_checkpoint!r}, which is incomplete: {reason}. Pass "
                "another, or True to take the newest complete one."
            )
        checkpoint: str | None = resume_from_checkpoint
    else:
        checkpoint = _newest(trainer) if resume_from_checkpoint else None
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
    stop = StopAtStepEnd(trainer)
    trainer.add_callback(stop)
    try:
        with stop.listening():
            output = trainer.train(resume_from_checkpoint=checkpoint)
    except _NothingLeft:
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        trainer.is_in_train = False
        logger.info("%s has made all of its steps already.", checkpoint)
        output = TrainOutput(trainer.state.global_step, 0.0, {})
    finally:
        trainer.remove_callback(stop)
    stop.leave()
    return output


def resume_option(value: str | bool | None, by_itself: bool = True) -> str | bool:
    """What `train_resumably` is given for the trainer's `resume_from_checkpoint`.

    Args:
        value (`str` or `bool`, *optional*): a checkpoint, or true or false, which are strings on the command line.
        by_itself (`bool`): whether a run that says nothing goes on where it stopped.
    """
    if value is None:
        return by_itself
    return str(value).lower() == "true" if str(value).lower() in ("true", "false") else value


def _newest(trainer: Trainer) -> str | None:
    """The checkpoint to go on from. One process looks, since what they would find may change under their eyes."""
    found: list[str | None] = [None]
    if trainer.is_world_process_zero():
        output_dir = str(trainer.args.output_dir)
        found = [find_complete_checkpoint(output_dir)]
        for folder in reversed(sort_checkpoints(output_dir, PREFIX_CHECKPOINT_DIR)):
            if folder == found[0]:
                break
            path, number = Path(folder), 0
            while (aside := path.with_name(f"incomplete-{path.name}" + (f"-{number}" if number else ""))).exists():
                number += 1
            path.rename(aside)
    return broadcast_object_list(found)[0]


class _NothingLeft(Exception):
    """The checkpoint has made all steps. (The trainer looks at the number of steps only after making one more.)"""


class StopAtStepEnd(TrainerCallback):
    """Ends training with a checkpoint at the end of the step in which a signal arrives, on all processes.

    Args:
        trainer (`Trainer`): the trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.signal: int | None = None
        self.stopped = False
        self._previous: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receives the signals inside.

        Python hands them to the main thread only; elsewhere nothing changes. A signal that is ignored (Ctrl-C by what
        a shell script starts in the background) stays ignored.
        """
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGINT] if self.trainer.args.enable_jit_checkpoint else [signal.SIGINT, signal.SIGTERM]
            heard = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield
        finally:
            self._let_go()

    def leave(self) -> None:
        """Raises what the signal would have raised, if there was one."""
        if self.signal is None and not self.stopped:
            return
        place = (
            f"at step {self.trainer.state.global_step}; the same command goes on from {self.trainer.args.output_dir}"
        )
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(f"Stopped by Ctrl-C {place}.")
        logger.warning("Stopped by SIGTERM %s.", place)
        raise SystemExit(128 + signal.SIGTERM)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _NothingLeft

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        stop = self.signal is not None
        if accelerator.num_processes > 1:
            if stop:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()
        if stop:
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            # The epoch is not over; the checkpoint is written.
            control.should_save = control.should_evaluate = False

    def _receive(self, number: int, frame: Any) -> None:
        self.signal = number
        self._let_go()
        name = signal.Signals(number).name
        # Not through `logging` or `print`, which the signal may have interrupted.
        os.write(2, f"\n{name}: writing a checkpoint at the end of this step; once more stops at once.\n".encode())

    def _let_go(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
