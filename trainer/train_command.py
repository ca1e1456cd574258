"""`multiverse train`: the training script under the project's command, and the plan of what it will take."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType
from multiverse.trainer.memory_plan import MemoryPlan, plan_memory
from multiverse.trainer.sft import MultiverseScriptArguments, main
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, TrlParser

_GB = 1e9


@dataclass
class PlannedConfig(SFTConfig):
    """The configuration of a run that is to happen elsewhere: a bfloat16 run on GPUs is planned on a CPU as well.

    Attributes:
        planned_device (`str`): where the run is to happen.
    """

    def __post_init__(self) -> None:
        self.planned_device = "cpu" if self.use_cpu else "cuda"
        self.use_cpu = True  # what this process has is not asked for
        super().__post_init__()


def run(arguments: Sequence[str]) -> None:
    """Trains.

    Args:
        arguments (`Sequence[str]`): command line of `multiverse.trainer.sft`, with `--config` for a YAML file.
    """
    parser = TrlParser([MultiverseScriptArguments, SFTConfig, ModelConfig])  # type: ignore[list-item]
    main(*parser.parse_args_and_config(arguments))


def plan(
    arguments: Sequence[str],
    ranks: int | None = None,
    sharding: str | None = None,
    accelerate_config: str | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> MemoryPlan:
    """Prints what a run would take, and loads no weights: a configuration and at most a tokenizer are read.

    Args:
        arguments (`Sequence[str]`): command line of `multiverse.trainer.sft`.
        ranks (`int`, *optional*), sharding (`str`, *optional*): as of `plan_memory`; by default what the file below
            says, or one process.
        accelerate_config (`str`, *optional*): file for `accelerate launch --config_file`.
        as_json (`bool`): whether to print JSON in the place of a table.
        console (`Console`, *optional*): where the table goes.

    Raises:
        ValueError: if the plan cannot be made; see `plan_memory`.
    """
    parser = TrlParser([MultiverseScriptArguments, PlannedConfig, ModelConfig])  # type: ignore[list-item]
    _, config, model_config = parser.parse_args_and_config(arguments)
    if accelerate_config is not None:
        cluster = load_config_from_file(accelerate_config)
        ranks = cluster.num_processes if ranks is None else ranks
        sharding = sharding_of(cluster) if sharding is None else sharding
    planned = plan_memory(
        config,
        model_config,
        ranks=ranks or 1,
        sharding=sharding,
        device=config.planned_device,
        tokenizer_length=_tokenizer_length(model_config),
    )
    if as_json:
        print(json.dumps(planned.to_dict(), indent=1))
    else:
        _print(planned, str(model_config.model_name_or_path), console or Console())
    return planned


def sharding_of(cluster: ClusterConfig) -> str:
    """How `accelerate launch` shares a run out with this configuration, in the words of `memory_plan.SHARDING`.

    Raises:
        ValueError: if it is FSDP1 or something else that is not planned here.
    """
    if cluster.distributed_type == DistributedType.FSDP:
        version = int(cluster.fsdp_config.get("fsdp_version", 1))
        if version != 2:
            raise ValueError(f"`fsdp_version` is {version} in the accelerate configuration; planned is 2 only.")
        return "fsdp2"
    if cluster.distributed_type == DistributedType.DEEPSPEED:
        stage = int(cluster.deepspeed_config.get("zero_stage", 0))
        return f"zero{stage}" if stage else "ddp"
    if cluster.distributed_type in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        return "ddp"
    if cluster.distributed_type == DistributedType.NO:
        return "none"
    raise ValueError(
        f"`distributed_type` {cluster.distributed_type.value} of the accelerate configuration has no plan."
    )


def _tokenizer_length(model_config: ModelConfig) -> int | None:
    try:
        path = str(model_config.model_name_or_path)
        return len(AutoTokenizer.from_pretrained(path, revision=model_config.model_revision))
    except (OSError, ValueError):
        return None  # a folder with nothing but a configuration is enough for a plan


def _print(planned: MemoryPlan, name: str, console: Console) -> None:
    where = f"{planned.ranks} x {planned.device}, {planned.sharding}" if planned.ranks > 1 else planned.device
    table = Table(title=f"{name}: memory of each rank ({where})", title_justify="left")
    table.add_column("what")
    table.add_column("GB", justify="right")
    for label, size in (
        (f"weights ({planned.parameters:,} parameters)", planned.weights),
        (f"gradients ({planned.trained_parameters:,} are trained)", planned.gradients),
        ("optimiser states", planned.optimizer),
        ("gathered layers, communication", planned.buffers),
        ("activations", planned.activations),
        ("attention mask", planned.mask),
    ):
        table.add_row(label, f"{size / _GB:.3f}")
    table.add_section()
    for moment, size in planned.moments.items():
        mark = "[bold]" if moment == planned.peak_moment else ""
        table.add_row(f"{mark}{moment}", f"{mark}{size / _GB:.3f}")
    table.add_section()
    table.add_row("[bold]peak", f"[bold]{planned.peak / _GB:.3f}")
    console.print(table)
    for note in planned.notes:
        console.print(f"[dim]{note}[/]")
