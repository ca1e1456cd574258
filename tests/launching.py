"""Processes: what `accelerate launch` makes of the shipped configurations, and test files that run as scripts."""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

CONFIGS = Path(__file__).parent.parent / "trainer" / "configs"

#: Starts new processes as forks of one that has done nothing but import what takes long.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["hypothesis", "pytest", "multiverse.trainer.sft"])
#: Seconds that a script may take.
_PATIENCE = 300


def launch_environment(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` adds to the environment of the processes it starts."""
    args = launch_command_parser().parse_args(["--config_file", str(file), "unused.py"])
    args, _, _ = _validate_launch_command(args)
    before = dict(os.environ)
    added = {name: value for name, value in prepare_multi_gpu_env(args).items() if before.get(name) != value}
    return {name: value for name, value in added.items() if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}


def run_script(script: str, *arguments: str | Path, processes: int = 1) -> tuple[list[int | None], str]:
    """Runs a file as a command in new processes, each on one thread. Several are told of each other as torchrun would
    tell them, and end when one of them fails.

    Args:
        script (`str`): the file.
        arguments (`str` or `Path`): of the command.
        processes (`int`): how many.

    Returns:
        `tuple[list[int | None], str]`: the exit codes, and what was printed.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    started = []
    with tempfile.NamedTemporaryFile("r") as printed:
        for rank in map(str, range(processes)):
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
            if processes > 1:
                environment |= {**group, "LOCAL_WORLD_SIZE": str(processes), "RANK": rank, "LOCAL_RANK": rank}
            command = [script, *map(str, arguments)]
            started.append(_PROCESSES.Process(target=_become, args=(command, environment, printed.name)))
            started[-1].start()
        end = time.monotonic() + _PATIENCE
        while running := [process for process in started if process.exitcode is None]:
            if time.monotonic() > end or any(process.exitcode for process in started):
                for process in running:
                    process.kill()
            wait([process.sentinel for process in running], timeout=1)
        return [process.exitcode for process in started], printed.read()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _become(command: list[str], environment: dict[str, str], printed: str) -> None:
    """Makes a forked process that of a command."""
    with open(printed, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect at the start of every run
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
