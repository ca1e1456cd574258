"""The shipped configurations of large runs: read by TRL's parser and accelerate's launcher, and planned."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from launching import CONFIGS, launch_environment
from multiverse import MultiverseConfig
from multiverse.cli import app
from multiverse.trainer.sft import MultiverseScriptArguments
from tiny import TOKEN_IDS
from transformers import Qwen2Config
from trl import ModelConfig, SFTConfig, TrlParser
from typer.testing import CliRunner


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fsdp2", DistributedType.FSDP), ("zero3", DistributedType.DEEPSPEED), ("ddp", DistributedType.MULTI_GPU)],
)
def test_accelerate_configurations_load(name: str, kind: DistributedType) -> None:
    cluster = load_config_from_file(str(CONFIGS / f"accelerate_{name}.yaml"))
    assert (cluster.distributed_type, cluster.num_processes, cluster.mixed_precision) == (kind, 8, "bf16")
    if name == "fsdp2":
        environment = launch_environment(CONFIGS / "accelerate_fsdp2.yaml")
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
        assert environment["FSDP_ACTIVATION_CHECKPOINTING"] == "false"
    if name == "zero3":
        assert cluster.deepspeed_config["zero_stage"] == 3
        assert cluster.deepspeed_config["zero3_save_16bit_model"]


def parsed(name: str) -> tuple[MultiverseScriptArguments, SFTConfig, ModelConfig]:
    parser = TrlParser([MultiverseScriptArguments, SFTConfig, ModelConfig])
    # bfloat16 is refused without a GPU unless the CPU is asked for.
    return parser.parse_args_and_config(["--config", str(CONFIGS / name), "--use_cpu", "true"])


def test_configuration_of_the_papers_run() -> None:
    _, config, model_config = parsed("qwen2_5_32b_full.yaml")
    assert config.num_train_epochs == 8
    assert config.learning_rate == 1e-5
    assert config.lr_scheduler_type == "cosine"
    assert config.get_warmup_steps(1000) == 50
    assert config.weight_decay == 1e-4
    assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)
    assert config.bf16
    assert config.activation_checkpointing
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 8 == 16
    assert not model_config.use_peft
    assert model_config.attn_implementation == "multiverse"


def test_configuration_of_one_gpu_with_lora() -> None:
    _, config, model_config = parsed("qwen2_5_7b_lora.yaml")
    assert model_config.use_peft
    assert (model_config.lora_r, model_config.lora_alpha, model_config.lora_dropout) == (16, 32, 0.0)
    assert model_config.lora_target_modules == "all-linear"
    assert model_config.dtype == "bfloat16"
    assert config.bf16
    assert config.activation_checkpointing


def qwen(size: str) -> MultiverseConfig:
    """Published shapes of Qwen2.5."""
    fields = {
        "7B": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "32B": {
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    }[size]
    return MultiverseConfig.from_base(Qwen2Config(vocab_size=152064, **fields))


@pytest.mark.parametrize(
    ("name", "size", "parameters", "launch"),
    [
        ("qwen2_5_7b_lora", "7B", 7_615_616_512, None),
        ("qwen2_5_32b_full", "32B", 32_763_876_352, "accelerate_fsdp2"),
        ("qwen2_5_32b_full", "32B", 32_763_876_352, "accelerate_zero3"),
    ],
)
def test_shipped_configurations_have_a_plan(
    name: str, size: str, parameters: int, launch: str | None, tmp_path: Path
) -> None:
    qwen(size).save_pretrained(tmp_path)
    options = [f"--accelerate_config={CONFIGS / launch}.yaml"] if launch else []
    arguments = ["train", "--plan", "--json", *options, "--config", str(CONFIGS / f"{name}.yaml")]
    result = CliRunner().invoke(app, [*arguments, "--model_name_or_path", str(tmp_path)])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    # Without a tokenizer, which would say that the matrices have rows to spare, the tags count as new ones.
    adapter = plan["trained_parameters"] if size == "7B" else 0
    assert plan["parameters"] - adapter == parameters + 2 * len(TOKEN_IDS) * qwen(size).hidden_size
    assert plan["device"] == "cuda"
    assert (plan["ranks"], plan["sharding"]) == ((8, launch.split("_")[1]) if launch else (1, "none"))
    if launch == "accelerate_fsdp2":
        # float32 weights, gradients, two moments, over eight ranks
        assert plan["weights"] + plan["gradients"] + plan["optimizer"] == pytest.approx(16 * parameters / 8, rel=1e-3)
        assert plan["mask"] < 1e6
