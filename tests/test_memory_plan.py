"""The memory plan against real parameters, gradients and optimiser states; the command that prints it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from multiverse import MultiverseConfig, MultiverseForCausalLM
from multiverse.cli import app
from multiverse.trainer import train_command
from multiverse.trainer.memory_plan import MemoryPlan, plan_memory
from multiverse.trainer.train_command import sharding_of
from planned import training_model, with_lora
from tiny import ARCHITECTURES, TOKEN_IDS, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig
from typer.testing import CliRunner


def sft(tmp_path: Path, **options: Any) -> SFTConfig:
    return SFTConfig(output_dir=str(tmp_path), **{"use_cpu": True, "bf16": False, "max_length": 32, **options})


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the states after a step of everything that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [True, False])
def test_parameters_gradients_and_optimiser_states(
    architecture: str, tied: bool, dtype: str, lora: bool, tmp_path: Path
) -> None:
    model = training_model(architecture, getattr(torch, dtype), tie_word_embeddings=tied)
    config = MultiverseConfig.from_base(model.config)
    model_config = ModelConfig(
        dtype=dtype, use_peft=lora, lora_r=4, lora_target_modules="all-linear" if lora else None
    )
    plan = plan_memory(sft(tmp_path), model_config, base=config, device="cpu")
    if lora:
        model = with_lora(model)
    parameters = list(model.parameters())
    trained = [each for each in parameters if each.requires_grad]
    assert plan.parameters == sum(each.numel() for each in parameters)
    assert plan.trained_parameters == sum(each.numel() for each in trained)
    assert plan.weights == sum(each.nbytes for each in parameters)
    assert plan.gradients == sum(each.nbytes for each in trained)
    assert plan.optimizer == state_bytes(model, torch.optim.AdamW(trained))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch_fused", lambda weights: torch.optim.AdamW(weights, fused=True)),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
        ("sgd", torch.optim.SGD),
    ],
)
def test_states_of_other_optimisers(name: str, make: Callable[..., torch.optim.Optimizer], tmp_path: Path) -> None:
    model = training_model()
    plan = plan_memory(sft(tmp_path, optim=name), ModelConfig(), base=model.config, device="cpu")
    assert plan.optimizer == state_bytes(model, make(model.parameters()))


def test_a_model_without_tags_gets_their_rows(tmp_path: Path) -> None:
    plain = tiny_config("qwen2", vocabulary=50)
    plan = plan_memory(sft(tmp_path), ModelConfig(), base=MultiverseConfig.from_base(plain), tokenizer_length=45)
    grown = MultiverseForCausalLM(tiny_config("qwen2", vocabulary=45 + len(TOKEN_IDS)))
    assert plan.parameters == sum(each.numel() for each in grown.parameters())


def planned(tmp_path: Path, model_config: ModelConfig | None = None, **options: Any) -> MemoryPlan:
    settings = {name: options.pop(name) for name in ("ranks", "sharding", "device") if name in options}
    model_config = model_config or ModelConfig()
    options = {"per_device_train_batch_size": 1, **options}
    return plan_memory(sft(tmp_path, **options), model_config, base=training_model("qwen2").config, **settings)


def test_sharding_divides_what_it_shards(tmp_path: Path) -> None:
    whole = planned(tmp_path, device="cpu")
    parts = {name: planned(tmp_path, ranks=4, sharding=name) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    assert parts["ddp"].weights == parts["zero1"].weights == parts["zero2"].weights == whole.weights
    assert parts["ddp"].buffers == whole.gradients
    assert parts["zero1"].gradients == whole.gradients
    for name in ("zero3", "fsdp2"):
        assert whole.weights / 4 <= parts[name].weights < 1.1 * whole.weights / 4
    for name in ("zero2", "zero3", "fsdp2"):
        assert whole.gradients / 4 <= parts[name].gradients < 1.1 * whole.gradients / 4
    # float32 copy, two moments
    assert parts["zero1"].optimizer == parts["zero3"].optimizer == pytest.approx(12 * whole.parameters / 4, abs=12)
    assert whole.optimizer / 4 <= parts["fsdp2"].optimizer < 1.1 * whole.optimizer / 4


def test_mixed_precision_keeps_sharded_weights_in_float32(tmp_path: Path) -> None:
    plan = planned(tmp_path, ModelConfig(dtype="bfloat16"), bf16=True, ranks=2, sharding="fsdp2")
    assert plan.weights >= 4 * plan.parameters / 2
    alone = planned(tmp_path, ModelConfig(dtype="bfloat16"), bf16=True)
    assert alone.weights == 2 * alone.parameters


def test_packing_makes_one_row_of_a_batch(tmp_path: Path) -> None:
    padded = planned(tmp_path, per_device_train_batch_size=4, gradient_checkpointing=False, device="cpu")
    packed = planned(tmp_path, per_device_train_batch_size=4, gradient_checkpointing=False, packing=True, device="cpu")
    assert packed.mask == 4 * padded.mask


def test_checkpointing_and_accumulation_change_the_moments(tmp_path: Path) -> None:
    kept = planned(tmp_path, gradient_checkpointing=False, device="cpu")
    checkpointed = planned(tmp_path, gradient_checkpointing=True, device="cpu")
    assert checkpointed.activations < kept.activations
    moment = "backward, LM head"
    accumulated = planned(tmp_path, gradient_checkpointing=False, gradient_accumulation_steps=2, device="cpu")
    assert accumulated.moments[moment] - kept.moments[moment] == kept.gradients
    assert kept.peak == max(kept.moments.values())


def test_path_attention_has_no_quadratic_mask(tmp_path: Path) -> None:
    dense = planned(tmp_path, ModelConfig(attn_implementation="sdpa"), max_length=4096)
    path = planned(tmp_path, ModelConfig(attn_implementation="multiverse"), max_length=4096)
    assert path.mask == 4096 * 4 * 9
    assert dense.mask >= 4096 * 4096
    # On a CPU the same name runs over a dense mask.
    assert planned(tmp_path, ModelConfig(attn_implementation="multiverse"), max_length=4096, device="cpu").mask > 1e7


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(bits: int, tmp_path: Path) -> None:
    model_config = ModelConfig(
        dtype="bfloat16", use_peft=True, lora_target_modules="all-linear", **{f"load_in_{bits}bit": True}
    )
    plan, plain = (
        planned(tmp_path, each)
        for each in (model_config, ModelConfig(dtype="bfloat16", use_peft=True, lora_target_modules="all-linear"))
    )
    linear = [
        module.weight
        for name, module in training_model("qwen2").named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    elements = sum(weight.numel() for weight in linear)
    scales = elements / 64 * 4 if bits == 4 else sum(4 * weight.shape[0] for weight in linear)
    # LoRA's weights, too, are in 16 bits then.
    trained = 2 * plain.trained_parameters
    assert plan.gradients == plain.gradients - trained
    assert plain.weights - plan.weights == elements * (2 - bits / 8) - scales + trained


@pytest.mark.parametrize(
    ("options", "settings", "name"),
    [
        ({"max_length": None}, {}, "`max_length`"),
        ({"optim": "lomo"}, {}, "`optim`"),
        ({}, {"ranks": 0}, "`ranks`"),
        ({}, {"device": "tpu"}, "`device`"),
        ({}, {"sharding": "zero4"}, "`sharding`"),
        ({}, {"model_config": ModelConfig(attn_implementation="paged")}, "`attn_implementation`"),
        ({}, {"model_config": ModelConfig(load_in_4bit=True)}, "`load_in_4bit`"),
    ],
)
def test_what_cannot_be_planned_is_named(
    options: dict[str, Any], settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=name):
        planned(tmp_path, **options, **settings)


def plain_checkpoint(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    config = tiny_config("qwen3", vocabulary=len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_command_prints_a_table_and_reads_the_tokenizer(tmp_path: Path) -> None:
    folder = plain_checkpoint(tmp_path / "plain")
    arguments = ["train", "--plan", "--model_name_or_path", str(folder), "--output_dir", str(tmp_path), "--use_cpu"]
    result = CliRunner().invoke(app, [*arguments, "--max_length", "128"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    grown = MultiverseForCausalLM(tiny_config("qwen3", vocabulary=len(tiny_tokenizer()) + len(TOKEN_IDS)))
    assert f"{sum(each.numel() for each in grown.parameters()):,} parameters" in result.output
    for word in ("activations", "attention mask", "optimiser states", "peak"):
        assert word in result.output


def test_command_hands_everything_to_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    got: list[Any] = []
    monkeypatch.setattr(train_command, "main", lambda *configs: got.extend(configs))
    (tmp_path / "run.yaml").write_text("learning_rate: 3.0e-5\nmax_length: 77\nuse_cpu: true\nbf16: false\n")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--synthetic_samples", "5", "--output_dir", str(tmp_path)]
    result = CliRunner().invoke(
        app, ["train", *arguments, "--max_length=99", "--lora_target_modules", "q_proj", "v_proj"]
    )
    assert result.exit_code == 0, result.output
    script, config, model_config = got
    assert script.synthetic_samples == 5
    assert (config.learning_rate, config.max_length) == (3e-5, 99)
    assert model_config.lora_target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "2"], "--plan"),
        (["--plan", "--output_dir", "x", "--use_cpu", "--optim", "lomo"], "optim"),
        (["--plan", "--output_dir", "x", "--use_cpu", "--accelerate_config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_command_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    result = CliRunner().invoke(
        app, ["train", *arguments, "--model_name_or_path", str(tmp_path)], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 2
    assert words in result.output


def test_sharding_of_a_launch_configuration() -> None:
    def cluster(kind: str, **fields: Any) -> ClusterConfig:
        return ClusterConfig("LOCAL_MACHINE", kind, "bf16", False, False, **fields)

    assert sharding_of(cluster("NO")) == "none"
    assert sharding_of(cluster("MULTI_GPU")) == "ddp"
    assert sharding_of(cluster("FSDP", fsdp_config={"fsdp_version": 2})) == "fsdp2"
    assert sharding_of(cluster("DEEPSPEED", deepspeed_config={"zero_stage": 2})) == "zero2"
    with pytest.raises(ValueError, match="`fsdp_version`"):
        sharding_of(cluster("FSDP", fsdp_config={"fsdp_version": 1}))
    with pytest.raises(ValueError, match="`distributed_type`"):
        sharding_of(cluster("XLA"))


def test_other_commands_do_not_import_the_trainer() -> None:
    code = "import sys, multiverse.cli; print(sorted({'trl', 'peft', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
