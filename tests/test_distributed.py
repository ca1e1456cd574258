"""Two processes train as one: DDP, and FSDP2 with sharded checkpoints; what would be wrong in silence is refused.

accelerate shards on accelerators only and runs DDP on CPUs instead. The worker at the end of this file tells it after
the process group is made that its processes have GPUs: that one word is all that is not as on GPUs. Everything else is
accelerate's, transformers' and TRL's own code on a gloo mesh, set up by the shipped configuration through accelerate's
own launcher.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.big_modeling import _attach_context_parallel_hooks
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy, merge_fsdp_weights
from cases import quick_collection  # noqa: F401
from datasets import Dataset
from launching import CONFIGS, launch_environment, run_script
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.memory_plan import plan_memory
from multiverse.trainer.parallelism import check_parallelism, gather_trained_head, save_consolidated
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from peft import LoraConfig, PeftModel
from tiny import ARCHITECTURES, goal, tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer

pytestmark = pytest.mark.usefixtures("quick_collection")  # trainers collect at the start of every run

STEPS, SAVED = 4, 2


def start_model(folder: Path) -> None:
    """A tiny plain checkpoint, and rows of short problems with their labels."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = tiny_config("llama", len(tokenizer), initializer_range=0.05)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = MultiverseForCausalLM(config)
    add_multiverse_tokens(model, tokenizer)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    rows = []
    for problem in generate_problems(16, seed=3, options=ProblemOptions(paths=(2, 3), terms=(2, 3), nested=0.3)):
        ids = tokenizer.encode(problem.question) + tokenizer.encode(problem.parallel()) + [tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": ids})
    (folder / "rows.json").write_text(json.dumps(rows))


def trainer_for(
    folder: Path, output: str, batch_size: int, lora: bool = False, sharded: bool = False, **options: Any
) -> SFTTrainer:
    """The stock trainer on the tiny model, with a global batch of 4."""
    config = SFTConfig(
        output_dir=str(folder / output),
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        **{
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_length": 4096,
            **options,
        },
    )
    check_parallelism(config)
    model = MultiverseForCausalLM.from_pretrained(folder / "start")
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    rows = Dataset.from_list(json.loads((folder / "rows.json").read_text()))
    if sharded:
        pretend_gpus()
    torch.manual_seed(0)  # LoRA's first matrices
    peft_config = add_tag_rows(LoraConfig(r=4, lora_alpha=8), model) if lora else None
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    give_wrapped_head_its_bias(model)
    return trainer


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_two_processes(folder: Path, part: str) -> dict[str, Any]:
    """Runs the worker below in two processes and returns what its first one reports."""
    codes, printed = run_script(__file__, folder, part, processes=2)
    assert codes == [0, 0], printed[-12000:]
    return json.loads((folder / f"{part}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same training in one process, and in two by DDP, by FSDP2, and by FSDP2 resumed in new processes."""
    folder = tmp_path_factory.mktemp("runs")
    start_model(folder)
    environment = launch_environment(CONFIGS / "accelerate_fsdp2.yaml")
    # Compared are trajectories in float32; the launcher's word on precision goes before the training arguments'.
    environment["ACCELERATE_MIXED_PRECISION"] = "no"
    (folder / "fsdp2.json").write_text(json.dumps(environment))
    alone = trainer_for(folder, "alone", batch_size=4)
    alone.train()
    lora = trainer_for(folder, "alone-lora", batch_size=4, lora=True)
    lora.train()
    return {
        "folder": folder,
        "lora": losses(lora),
        "lora_model": lora.model.eval(),
        "alone": losses(alone),
        "model": alone.model.eval(),
        **in_two_processes(folder, "first"),
        **in_two_processes(folder, "second"),
    }


def test_two_processes_have_the_losses_of_one(runs: dict[str, Any]) -> None:
    assert len(runs["alone"]) == STEPS
    assert runs["alone"][0] - runs["alone"][-1] > 0.01
    assert runs["ddp"] == pytest.approx(runs["alone"], abs=1e-4)
    assert runs["fsdp2"] == pytest.approx(runs["alone"], abs=1e-4)
    # The first steps are the ones before the checkpoint, in processes that have ended.
    assert runs["resumed"] == pytest.approx(runs["alone"], abs=1e-4)
    assert runs["resumed"][:SAVED] == runs["fsdp2"][:SAVED]


def test_fsdp2_really_shards_and_the_plan_knows_its_bytes(runs: dict[str, Any]) -> None:
    assert runs["distributed_type"] == "FSDP"
    assert runs["groups"] == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=64)
    plan = plan_memory(
        config, ModelConfig(), base=runs["model"].config, ranks=2, sharding="fsdp2", device="cpu", mask_levels=1
    )
    assert runs["weight_bytes"] == plan.weights
    assert runs["optimizer_bytes"] == plan.optimizer
    assert plan.weights < 0.55 * 4 * plan.parameters


def test_sharded_checkpoint_holds_shards_and_can_be_merged(runs: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = runs["folder"] / "fsdp2" / f"checkpoint-{STEPS}"
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2
    assert not list(checkpoint.glob("*.safetensors"))
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path))
    runs["model"].config.save_pretrained(tmp_path)
    assert_same_model(MultiverseForCausalLM.from_pretrained(tmp_path), runs["model"])


@pytest.mark.parametrize("name", ["fsdp2", "resumed"])
def test_what_is_saved_at_the_end_generates_as_the_model_of_one_process(runs: dict[str, Any], name: str) -> None:
    saved = MultiverseForCausalLM.from_pretrained(runs["folder"] / f"{name}-whole").eval()
    assert_same_model(saved, runs["model"])
    prompt = torch.tensor([json.loads((runs["folder"] / "rows.json").read_text())[0]["input_ids"][:60]])
    options = {"max_new_tokens": 80, "do_sample": False, "return_dict_in_generate": True}
    outputs = [model.generate(prompt, **options) for model in (saved, runs["model"])]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].sequences.shape[1] > prompt.shape[1]


def assert_same_model(one: MultiverseForCausalLM, other: MultiverseForCausalLM) -> None:
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=0, msg=lambda text, at=name: f"{at}: {text}")


def test_lora_with_trained_tag_rows(runs: dict[str, Any]) -> None:
    assert runs["ddp_lora"] == pytest.approx(runs["lora"], abs=1e-4)
    assert runs["fsdp2_lora"] == pytest.approx(runs["lora"], abs=1e-4)
    base = MultiverseForCausalLM.from_pretrained(runs["folder"] / "start")
    saved = PeftModel.from_pretrained(base, runs["folder"] / "fsdp2-lora-whole").eval()
    ids = torch.tensor([json.loads((runs["folder"] / "rows.json").read_text())[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, runs["lora_model"](ids).logits, atol=1e-4, rtol=0)
    assert "`model.config.tie_word_embeddings`" in runs["refused_tied"]


def test_tensor_parallelism_gives_the_same_logits_and_gradients(runs: dict[str, Any]) -> None:
    assert runs["tensor_parallel"]["logits"] < 1e-5
    assert runs["tensor_parallel"]["sharded"]
    assert runs["tensor_parallel"]["same_text"]
    assert runs["tensor_parallel"]["gradient"] < 1e-5


def test_fsdp_that_would_not_shard_is_refused(runs: dict[str, Any]) -> None:
    assert "`fsdp`" in runs["refused"]
    assert "MULTI_CPU" in runs["refused"]


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    check_parallelism(accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`WORLD_SIZE` is 2"):
        check_parallelism(accelerator)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrapping_policy_finds_the_decoder_layers(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launch_environment(CONFIGS / "accelerate_fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    with torch.device("meta"):
        model = MultiverseForCausalLM(tiny_config(architecture, num_hidden_layers=3))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = [name for name, module in model.named_modules() if policy(module)]
    assert wrapped == [f"model.layers.{layer}" for layer in range(3)]


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_split_sequences_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`parallelism_config\.{name}` is 2"):
        check_parallelism(ParallelismConfig(**{name: 2, "dp_shard_size": 1}))
    lines = (CONFIGS / "accelerate_fsdp2.yaml").read_text() + f"parallelism_config:\n  parallelism_config_{name}: 2\n"
    (tmp_path / "launch.yaml").write_text(lines)
    for variable, value in launch_environment(tmp_path / "launch.yaml").items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"`parallelism_config\.{name}` is 2"):
        check_parallelism()
    with pytest.raises(ValueError, match=rf"`parallelism_config\.{name}` is 2"):
        check_parallelism(SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_other_parallelism_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_parallelism()
    check_parallelism(ParallelismConfig(dp_shard_size=4, tp_size=2))
    for variable, value in launch_environment(CONFIGS / "accelerate_fsdp2.yaml").items():
        monkeypatch.setenv(variable, value)
    check_parallelism()


def test_what_context_parallelism_does_to_a_mask_is_worth_refusing() -> None:
    ids = torch.tensor([tiny_ids(f"a b {goal(['1', '2'])} <Path> 1 c </Path> <Path> 2 d </Path> <Conclusion> e")])
    model = tiny_model(attention="eager")  # as `sdpa` on a GPU; on a CPU that has the mask in one more argument
    with torch.no_grad():
        right = model(ids).logits
        _attach_context_parallel_hooks(model)
        wrong = model(ids).logits
    assert (right - wrong).abs().max() > 1e-2


# The worker: everything below runs in two processes.


def pretend_gpus() -> None:
    """Lets accelerate shard on CPUs: it looks at the kind of the processes' devices before it sets FSDP up."""
    from accelerate import PartialState

    PartialState().distributed_type = DistributedType.MULTI_GPU


def first(folder: Path) -> dict[str, Any]:
    """DDP; FSDP2 refused, as it would be DDP; FSDP2 with checkpoints."""
    report: dict[str, Any] = {}
    ddp = trainer_for(folder, "ddp", batch_size=2)
    check_parallelism(ddp.accelerator)
    assert ddp.accelerator.num_processes == 2
    ddp.train()
    report["ddp"] = losses(ddp)
    lora = trainer_for(folder, "ddp-lora", batch_size=2, lora=True, gradient_checkpointing=True)
    gather_trained_head(lora)  # of no effect here
    lora.train()
    report["ddp_lora"] = losses(lora)
    os.environ.update(json.loads((folder / "fsdp2.json").read_text()))
    try:
        check_parallelism(trainer_for(folder, "refused", batch_size=2).accelerator)
    except ValueError as error:
        report["refused"] = str(error)
    trainer = fsdp2_trainer(folder)
    trainer.train()
    sharded = [module for module in trainer.model.named_modules() if "FSDP" in type(module[1]).__name__]
    report["groups"] = sorted(name for name, module in sharded if owns_group(module))
    report["distributed_type"] = trainer.accelerator.distributed_type.value
    report["weight_bytes"] = sum(parameter.to_local().nbytes for parameter in trainer.model.parameters())
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    report["optimizer_bytes"] = sum(getattr(value, "_local_tensor", value).nbytes for value in states)
    save_consolidated(trainer, str(folder / "fsdp2-whole"))
    return {**report, "fsdp2": losses(trainer)}


def second(folder: Path) -> dict[str, Any]:
    """FSDP2 resumed from the checkpoint in the middle; the result under tensor parallelism."""
    os.environ.update(json.loads((folder / "fsdp2.json").read_text()))
    trainer = fsdp2_trainer(folder)
    trainer.train(resume_from_checkpoint=str(folder / "fsdp2" / f"checkpoint-{SAVED}"))
    save_consolidated(trainer, str(folder / "resumed-whole"))
    report = {"resumed": losses(trainer)}
    lora = trainer_for(folder, "fsdp2-lora", batch_size=2, lora=True, sharded=True, gradient_checkpointing=True)
    gather_trained_head(lora)
    lora.train()
    save_consolidated(lora, str(folder / "fsdp2-lora-whole"))
    report["fsdp2_lora"] = losses(lora)
    lora.model.config.tie_word_embeddings = True
    try:
        gather_trained_head(lora)
    except ValueError as error:
        report["refused_tied"] = str(error)
    return {**report, "tensor_parallel": tensor_parallel(folder)}


def fsdp2_trainer(folder: Path) -> SFTTrainer:
    saving = {"save_strategy": "steps", "save_steps": SAVED}
    return trainer_for(folder, "fsdp2", batch_size=2, sharded=True, gradient_checkpointing=True, **saving)


def owns_group(module: torch.nn.Module) -> bool:
    group = module._get_fsdp_state()._fsdp_param_group
    return group is not None and group.modules[0] is module


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Largest differences of a model with its heads split over both processes from the whole one."""
    from transformers.distributed import DistributedConfig

    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
    ids = torch.tensor([json.loads((folder / "rows.json").read_text())[0]["input_ids"]])
    whole = MultiverseForCausalLM.from_pretrained(folder / "start")
    split = MultiverseForCausalLM.from_pretrained(
        folder / "start", distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    )
    with torch.no_grad():
        texts = [model.eval().generate(ids[:, :60], max_new_tokens=20, do_sample=False) for model in (whole, split)]
    outputs = [model(ids, labels=ids) for model in (whole, split)]
    for output in outputs:
        output.loss.backward()
    weights = [model.model.layers[0].self_attn.q_proj.weight for model in (whole, split)]
    gradients = [weight.grad.full_tensor() if hasattr(weight, "full_tensor") else weight.grad for weight in weights]
    return {
        "logits": float((outputs[0].logits - outputs[1].logits).abs().max()),
        "same_text": torch.equal(*texts),
        "sharded": weights[1].to_local().shape[0] * 2 == weights[0].shape[0],
        "gradient": float((gradients[0] - gradients[1]).abs().max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=["first", "second"])
    arguments = parser.parse_args()
    result = {"first": first, "second": second}[arguments.part](arguments.folder)
    if torch.distributed.get_rank() == 0:
        (arguments.folder / f"{arguments.part}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
