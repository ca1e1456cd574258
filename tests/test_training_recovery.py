"""Runs that are cut off and go on: by SIGKILL, by Ctrl-C and SIGTERM, alone and on two processes.

Run as a script, this file is the command that is killed and started again.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import quick_collection  # noqa: F401
from launching import run_script
from multiverse.trainer.callbacks import HeldOutAnswers, StopOnNonFinite
from multiverse.trainer.metrics import watch
from multiverse.trainer.recovery import find_complete_checkpoint, train_resumably, why_incomplete
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import Trainer, TrainerCallback
from watched_runs import losses, messages, tiny_trainer

pytestmark = pytest.mark.usefixtures("quick_collection")  # trainers collect at the start of every run

#: In the middle of an epoch of four.
STEPS = 7
RUN = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS}
QUESTIONS = [{"prompt": messages(number), "number": number} for number in range(3)]


def run(folder: Path, *callbacks: TrainerCallback, **options) -> Trainer:
    """Trains in `folder`, or goes on there."""
    trainer = tiny_trainer(folder, callbacks=list(callbacks), **{**RUN, **options})
    train_resumably(trainer)
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, list[float]]:
    """The folder and the losses of a run that nobody disturbed, on one thread as in the processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    found = losses(run(folder))
    torch.set_num_threads(threads)
    assert len(set(found)) == STEPS
    return folder, found


@pytest.fixture
def one_thread():
    """Sums in the order of the undisturbed run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- which checkpoint is complete


def cut(file: Path) -> None:
    """Leaves the first half of a file, as a kill may."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_file_cut_off_is_passed_over(name, uninterrupted, tmp_path, caplog):
    for step in (4, 6, STEPS):
        shutil.copytree(uninterrupted[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert find_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")
    cut(tmp_path / "checkpoint-7" / name)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert find_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "checkpoint-7" in told[0]
    assert name in told[0]
    assert "trainer_state.json" in told[1]


def test_every_other_sign_of_an_incomplete_checkpoint(uninterrupted, tmp_path):
    def fresh() -> Path:
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
        return Path(shutil.copytree(uninterrupted[0] / "checkpoint-2", tmp_path / "checkpoint-2"))

    assert why_incomplete(fresh()) is None
    folder = fresh()
    (folder / "checkpoint-is-incomplete.txt").touch()
    assert "checkpoint-is-incomplete.txt" in why_incomplete(folder)
    folder = fresh()
    (folder / "model.safetensors").unlink()
    assert why_incomplete(folder) == "no weights"

    # An adapter's, in the folder or in one of its own.
    (folder / "adapter_model.safetensors").write_bytes(
        (uninterrupted[0] / "checkpoint-2/model.safetensors").read_bytes()
    )
    assert why_incomplete(folder) is None
    (folder / "other").mkdir()
    (folder / "adapter_model.safetensors").rename(folder / "other" / "adapter_model.safetensors")
    assert why_incomplete(folder) is None
    cut(folder / "other" / "adapter_model.safetensors")
    assert why_incomplete(folder) == "adapter_model.safetensors is cut off"

    # Weights in two files, one of which was not written any more.
    folder = fresh()
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    assert why_incomplete(folder) == f"{second} is missing"
    shutil.copy(folder / first, folder / second)
    assert why_incomplete(folder) is None

    # Sharded weights and optimizer.
    folder = fresh()
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.pt").unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").touch()
        assert why_incomplete(folder) == f"{name}/.metadata is missing"
        (folder / name / ".metadata").touch()
    assert why_incomplete(folder) is None


def test_without_a_checkpoint_there_is_none_to_go_on_from(tmp_path):
    assert find_complete_checkpoint(tmp_path) is None
    assert find_complete_checkpoint(tmp_path / "not made yet") is None


def test_a_named_checkpoint_must_be_complete(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    cut(folder / "optimizer.pt")
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint`.*optimizer.pt is cut off"):
        train_resumably(trainer, str(folder))
    assert trainer.state.global_step == 0


# ---- signals


class Signals(TrainerCallback):
    """Sends this process a signal, once or twice, in the middle of a step."""

    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize(
    ("number", "error", "strategy"),
    [(signal.SIGINT, KeyboardInterrupt, "steps"), (signal.SIGTERM, SystemExit, "epoch")],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_loses_no_step(number, error, strategy, uninterrupted, tmp_path, one_thread, capfd):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    # Evaluations that are due would keep the checkpoint waiting.
    options = {"save_strategy": strategy, "eval_strategy": strategy, "eval_steps": 3}
    signals = Signals(number, step=3)
    trainer = tiny_trainer(tmp_path, callbacks=[signals], **{**RUN, **options})
    with pytest.raises(error) as caught:
        train_resumably(trainer)
    assert error is KeyboardInterrupt or caught.value.code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert trainer.state.global_step == 3
    assert not any(entry["step"] == 3 for entry in trainer.state.log_history if "eval_loss" in entry)
    assert find_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert signal.Signals(number).name in capfd.readouterr().err
    assert not any(type(each).__name__ == "StopAtStepEnd" for each in trainer.callback_handler.callbacks)

    resumed = run(tmp_path)
    assert resumed.state.global_step == STEPS
    assert losses(resumed) == uninterrupted[1]


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    trainer = tiny_trainer(tmp_path, callbacks=[Signals(signal.SIGINT, step=3, times=2)], **RUN)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_resumably(trainer)
    assert signal.getsignal(signal.SIGINT) is handler
    assert trainer.state.global_step == 2
    assert find_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_an_ignored_ctrl_c_stays_ignored(tmp_path):
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = tiny_trainer(tmp_path, callbacks=[Signals(signal.SIGINT, step=1)], **{**RUN, "max_steps": 2})
        train_resumably(trainer)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.state.global_step == 2


def test_sigterm_is_left_to_transformers_where_it_was_asked_to_handle_it(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        trainer = tiny_trainer(tmp_path, enable_jit_checkpoint=True, max_steps=1)
        theirs = signal.getsignal(signal.SIGTERM)
        seen = []

        class Looks(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs) -> None:
                seen.append(signal.getsignal(signal.SIGTERM))

        trainer.add_callback(Looks())
        train_resumably(trainer)
        assert seen == [theirs]
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_finished_run_is_not_trained_any_further(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted[0], tmp_path / "run")
    again = run(folder)
    assert again.state.global_step == STEPS
    assert losses(again) == uninterrupted[1]
    assert not again.is_in_train
    assert find_complete_checkpoint(folder) == str(folder / f"checkpoint-{STEPS}")
    stored = load_file(folder / f"checkpoint-{STEPS}" / "model.safetensors")
    weights = again.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in stored.items())


# ---- processes


def test_a_killed_run_ends_where_an_undisturbed_one_does(uninterrupted, tmp_path):
    codes, printed = run_script(__file__, "killed", tmp_path)
    assert codes == [-signal.SIGKILL], printed
    assert not (tmp_path / "losses.json").exists()
    # A later kill, in the middle of the next checkpoint.
    torn = shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-6")
    (torn / "trainer_state.json").unlink()
    cut(torn / "optimizer.pt")

    codes, printed = run_script(__file__, "train", tmp_path)
    assert codes == [0], printed
    assert "checkpoint-6 is incomplete" in printed
    assert (tmp_path / "incomplete-checkpoint-6").is_dir()
    # From the checkpoint on, not from the beginning.
    assert [line for line in printed.splitlines() if line.startswith("step")] == [
        f"step {step}" for step in range(5, STEPS + 1)
    ]
    assert json.loads((tmp_path / "losses.json").read_text()) == uninterrupted[1]


class TellsSteps(TrainerCallback):
    """Prints every step."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        print(f"step {state.global_step}", flush=True)


class Kill(TrainerCallback):
    """Kills the process after the fifth step."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, *callbacks: TrainerCallback) -> None:
    """A run that leaves its losses."""
    trainer = run(folder, TellsSteps(), *callbacks)
    (folder / "losses.json").write_text(json.dumps(losses(trainer)))


def killed(folder: Path) -> None:
    """A run that does not come to its end."""
    train(folder, Kill())


class OnlyOneProcess(TrainerCallback):
    """What a script may do on one process alone: log, and be sent a signal."""

    trainer: Trainer | None = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1 and args.process_index == 0:
            due = control.should_log
            self.trainer.log({"note": 1.0})
            control.should_log = due

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2 and args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)


def distributed(folder: Path) -> None:
    """Two processes with everything that looks after a run; the second is sent a signal at its third step."""
    alone = OnlyOneProcess()
    trainer = watched(folder, alone, per_device_train_batch_size=1)
    alone.trainer = trainer
    code = None
    try:
        train_resumably(trainer)
    except SystemExit as stop:
        code = stop.code
    result = {"code": code, "step": trainer.state.global_step, "logs": trainer.state.log_history}
    (folder / f"process-{trainer.args.process_index}.json").write_text(json.dumps(result))
    answer_at_once(folder / "sharded", shard)


def shard(trainer: Trainer) -> None:
    """Spreads the weights over the processes, as FSDP2 does. (On CPUs accelerate does not take it up by itself.)"""
    mesh = init_device_mesh("cpu", (trainer.args.world_size,))
    for part in (*trainer.model.model.layers, trainer.model):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(trainer.model, "generate")
    trainer.is_fsdp_enabled = True


def answer_at_once(folder: Path, prepare: Callable[[Trainer], None]) -> list[dict]:
    """Answers of a model that was not trained."""
    trainer = tiny_trainer(folder)
    callback = HeldOutAnswers(trainer, QUESTIONS, every=1, max_new_tokens=24, batch_size=2)
    prepare(trainer)
    callback.on_step_end(trainer.args, trainer.state, trainer.control)
    return answers(folder) if trainer.state.is_world_process_zero else []


def answers(folder: Path) -> list[dict]:
    """What a callback has stored."""
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def watched(folder: Path, *callbacks: TrainerCallback, **options) -> Trainer:
    """A trainer without dropout, with everything that looks after a run."""
    trainer = tiny_trainer(folder, dropout=0.0, callbacks=list(callbacks), **{**RUN, "save_steps": 100, **options})
    watch(trainer)
    trainer.add_callback(StopOnNonFinite(trainer))
    right = HeldOutAnswers(trainer, QUESTIONS, lambda text, row: row["number"] > 0, every=2, max_new_tokens=8)
    trainer.add_callback(right)
    return trainer


def test_two_processes_log_one_number_and_stop_together(tmp_path):
    codes, printed = run_script(__file__, "distributed", tmp_path / "two", processes=2)
    assert codes == [0, 0], printed
    found = [json.loads((tmp_path / "two" / f"process-{rank}.json").read_text()) for rank in range(2)]
    for result in found:
        assert (result["code"], result["step"]) == (143, 3)
    assert find_complete_checkpoint(tmp_path / "two") == str(tmp_path / "two" / "checkpoint-3")

    # One process that makes the same steps.
    alone = watched(tmp_path / "one", per_device_train_batch_size=2)
    alone.train()
    numbers = ["loss_tags", "loss_content", "parallel_share", "branches_per_sample", "malformed_samples"]
    expected = next(entry for entry in alone.state.log_history if "loss" in entry)
    for result in found:
        trained = [entry for entry in result["logs"] if "loss" in entry]
        assert len(trained) == 3
        assert {name: trained[0][name] for name in numbers} == pytest.approx(
            {name: expected[name] for name in numbers}, abs=1e-5
        )
        assert all(entry["tokens_per_second"] > 0 for entry in trained)
        (answered,) = [entry for entry in result["logs"] if "eval_generation_failed" in entry]
        assert answered["eval_generation_failed"] == 0
        assert answered["eval_generation_accuracy"] == pytest.approx(2 / 3)
    for ours, theirs in zip(*([e for e in result["logs"] if "loss" in e] for result in found), strict=True):
        assert {name: ours[name] for name in numbers} == {name: theirs[name] for name in numbers}
        assert ours["tokens_per_second"] == theirs["tokens_per_second"]
    answered = answers(tmp_path / "two")
    assert [record["row"] for record in answered] == [0, 1, 2]
    twins = [record for record in answers(tmp_path / "one") if record["step"] == 2]
    assert [record["text"] for record in answered] == [record["text"] for record in twins]
    assert answers(tmp_path / "two" / "sharded") == answer_at_once(tmp_path / "whole", lambda trainer: None)


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    {"train": train, "killed": killed, "distributed": distributed}[sys.argv[1]](Path(sys.argv[2]))
