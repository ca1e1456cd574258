"""What `accelerate launch` makes of the shipped configurations."""

import os
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

CONFIGS = Path(__file__).parent.parent / "trainer" / "configs"


def launch_environment(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` adds to the environment of the processes it starts."""
    args = launch_command_parser().parse_args(["--config_file", str(file), "unused.py"])
    args, _, _ = _validate_launch_command(args)
    before = dict(os.environ)
    added = {name: value for name, value in prepare_multi_gpu_env(args).items() if before.get(name) != value}
    return {name: value for name, value in added.items() if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}
