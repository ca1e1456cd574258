"""The memory plan of small training runs against the memory they really take: growth of the resident set.

`python -m benchmarks.memory_plan`. Linux only: it reads and resets the high-water mark of the process in /proc. Every
run is a few steps of the stock SFTTrainer in a process of its own, after a run of a much smaller model (so that what
Python and PyTorch load on first use is not counted). glibc is told to take every tensor from the system and to give it
back when it is freed, so that the resident set is what is alive, without the fragments that its heap would keep.
"""

import ctypes
import gc
import multiprocessing
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import torch
import typer
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, disable_progress_bars
from multiverse import TAGS, MultiverseConfig, MultiverseForCausalLM
from multiverse.trainer.memory_plan import MemoryPlan, plan_memory
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import LlamaConfig, PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen3Config
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from benchmarks.mask_memory import resident
from benchmarks.measure import load_of_others, store

SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TOKEN_IDS = {tag: 2 + number for number, tag in enumerate(TAGS)}


@dataclass(frozen=True)
class Run:
    """What is trained, and how.

    Attributes:
        training, model (`dict[str, Any]`): arguments of `SFTConfig` and `ModelConfig`.
        architecture (`str`), vocabulary (`int`), tied (`bool`): of the model.
        length (`int`): tokens of a micro-batch.
        ranks (`int`): processes that FSDP2 shards the run over.
        layers (`int`), steps (`int`): of the model and of the run.
    """

    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    vocabulary: int = 4096
    tied: bool = False
    length: int = 1536
    ranks: int = 1
    layers: int = 8
    steps: int = 3


_WHOLE, _CHECKPOINTED = {"gradient_checkpointing": False}, {"gradient_checkpointing": True}
_LORA = {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
#: Few words or little text make other moments of a step the peak than the LM head's.
RUNS: dict[str, Run] = {
    "full": Run(_WHOLE),
    "full, checkpointing": Run(_CHECKPOINTED),
    "full, bfloat16 autocast": Run({**_WHOLE, "bf16": True}, architecture="qwen2"),
    "full, tied, 2 accumulated": Run({**_CHECKPOINTED, "gradient_accumulation_steps": 2}, tied=True),
    "LoRA": Run(_WHOLE, _LORA),
    "LoRA, checkpointing": Run(_CHECKPOINTED, _LORA),
    "LoRA, bfloat16 weights, dropout": Run(
        {**_WHOLE, "bf16": True}, {**_LORA, "dtype": "bfloat16", "lora_dropout": 0.05}, "qwen2"
    ),
    "LoRA, eager attention": Run(_WHOLE, {**_LORA, "attn_implementation": "eager"}, "qwen3"),
    "full, few words": Run(_WHOLE, vocabulary=256),
    "LoRA, checkpointing, few words": Run(_CHECKPOINTED, _LORA, vocabulary=256),
    "full, short text": Run(_WHOLE, vocabulary=256, length=96),
    "full, short text, AdamW in a loop": Run({**_WHOLE, "optim": "adamw_torch"}, vocabulary=256, length=96),
    "full, checkpointing, FSDP2": Run(_CHECKPOINTED, ranks=2),
    "full, few words, FSDP2": Run(_WHOLE, vocabulary=256, ranks=2),
    "full, checkpointing, 32,768 tokens": Run(_CHECKPOINTED, vocabulary=256, length=32_768, layers=2, steps=1),
}


def tagged_row(length: int, vocabulary: int) -> list[int]:
    """A text of `length` tokens with a block of four paths of equal length."""
    words = torch.Generator().manual_seed(0)

    def text(count: int) -> list[int]:
        return torch.randint(20, vocabulary, (count,), generator=words).tolist()

    def tagged(tag: str, inside: list[int]) -> list[int]:
        return [TOKEN_IDS[f"<{tag}>"], *inside, TOKEN_IDS[f"</{tag}>"]]

    stretch = (length - 64) // 5
    goal = tagged("Goal", [token for _ in range(4) for token in tagged("Outline", text(3))])
    paths = [token for _ in range(4) for token in tagged("Path", text(stretch))]
    block = tagged("Parallel", [*goal, *paths, *tagged("Conclusion", text(8))])
    return [*text(length - len(block)), *block]


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Something with a padding token; the rows are ids already."""
    words = {f"w{number}": number for number in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w20")), pad_token="w0", eos_token="w1"
    )


def arguments(run: Run, folder: str) -> tuple[SFTConfig, ModelConfig]:
    """The configurations of a run."""
    sharded = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
    config = SFTConfig(
        output_dir=folder,
        fsdp=run.ranks > 1,
        fsdp_config=dict(sharded) if run.ranks > 1 else None,
        use_cpu=True,
        max_steps=run.steps,
        per_device_train_batch_size=1,
        max_length=run.length,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=run.steps,
        **{"bf16": False, **run.training},
    )
    return config, ModelConfig(**run.model)


def model_configuration(run: Run) -> MultiverseConfig:
    """Of the model of a run."""
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[run.architecture]
    shape = {**SHAPE, "vocab_size": run.vocabulary, "num_hidden_layers": run.layers, "tie_word_embeddings": run.tied}
    config = MultiverseConfig.from_base(config_class(**shape, head_dim=64))
    config.multiverse_token_ids = dict(TOKEN_IDS)
    return config


def train(run: Run) -> None:
    """A few steps of the stock trainer on rows of one length."""
    with tempfile.TemporaryDirectory() as folder:
        config, model_config = arguments(run, folder)
        base = model_configuration(run)
        base._attn_implementation = model_config.attn_implementation or "sdpa"
        torch.set_default_dtype(getattr(torch, str(model_config.dtype)))
        model = MultiverseForCausalLM(base)
        torch.set_default_dtype(torch.float32)
        lora = get_peft_config(model_config)
        if run.ranks > 1:
            # accelerate shards on accelerators only, by the kind of the processes' devices.
            PartialState().distributed_type = DistributedType.MULTI_GPU
        row = tagged_row(run.length, run.vocabulary)
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row}] * 2 * run.steps * run.ranks),
            processing_class=tokenizer(run.vocabulary),
            peft_config=None if lora is None else add_tag_rows(lora, model),
        )
        give_wrapped_head_its_bias(model)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measure(name: str) -> dict[str, int]:
    """Bytes that the resident set grew by at most. For a process of its own."""
    warnings.simplefilter("ignore")
    disable_progress_bars()
    torch.set_num_threads(1)
    run = RUNS[name]
    train(replace(run, length=192, layers=1))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    train(run)
    return {"growth": resident("VmHWM") - before, "before": before}


def measure_ranks(name: str) -> dict[str, int]:
    """As `measure`, of the rank that grew most, in as many processes as the run has ranks."""
    launch = LaunchConfig(1, 1, RUNS[name].ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=uuid4().hex)
    return max(elastic_launch(launch, measure)(name).values(), key=lambda measured: measured["growth"])


def planned(run: Run) -> MemoryPlan:
    """The plan of a run."""
    with tempfile.TemporaryDirectory() as folder:
        config, model_config = arguments(run, folder)
        base = model_configuration(run)
        return plan_memory(config, model_config, base=base, ranks=run.ranks, device="cpu")


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Some of: {'; '.join(RUNS)}.")] = None,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results"),
) -> None:
    """Small runs, full and LoRA, planned and measured."""
    # Read by glibc when the processes below start.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=110)
    table = Table(title="steps of small models, CPU, 1 thread")
    for column in ("run", "parameters", "trained", "planned MB", "measured MB", "off by", "peak at"):
        table.add_column(column, justify="left" if column in ("run", "peak at") else "right")
    rows, busy = [], []
    for name in only or RUNS:
        busy.append(load_of_others())
        if RUNS[name].ranks > 1:
            measured = measure_ranks(name)
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured = pool.apply(measure, (name,))
        plan = planned(RUNS[name])
        rows.append({"run": name, **asdict(RUNS[name]), **measured, "plan": plan.to_dict()})
        table.add_row(
            name,
            f"{plan.parameters:,}",
            f"{plan.trained_parameters:,}",
            f"{plan.peak / 1e6:.1f}",
            f"{measured['growth'] / 1e6:.1f}",
            f"{plan.peak / measured['growth'] - 1:+.1%}",
            plan.peak_moment,
        )
    console.print(table)
    store("memory_plan", rows, output, busy, console)


if __name__ == "__main__":
    typer.run(main)
