"""Set-ups that stock trainers accept and would train wrongly: each is refused, by name; and what must keep working."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from multiverse import MultiverseForCausalLM
from multiverse.trainer.checks import check_trainer
from multiverse.trainer.sft import load_model_and_tokenizer
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from peft import PromptTuningConfig
from tiny import tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

COMMON: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}


def rows(preference: bool = False) -> Dataset:
    made = []
    for problem in generate_problems(2, 5, ProblemOptions(terms=(2, 3))):
        row = problem.messages("parallel")
        if preference:
            other = problem.messages("sequential")["completion"]
            row = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
        made.append(row)
    return Dataset.from_list(made)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Multiverse checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tiny_tokenizer()
    config = tiny_config("llama", vocabulary=len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    model, tokenizer = load_model_and_tokenizer(str(folder / "plain"))
    model.save_pretrained(folder / "tagged")
    tokenizer.save_pretrained(folder / "tagged")
    return str(folder)


def sft(checkpoint: str, folder: Path, peft_config: Any = None, **options: Any) -> SFTTrainer:
    model, tokenizer = load_model_and_tokenizer(f"{checkpoint}/tagged")
    config = SFTConfig(output_dir=str(folder), max_length=2048, **COMMON, **options)
    return SFTTrainer(model, config, train_dataset=rows(), processing_class=tokenizer, peft_config=peft_config)


def test_ordinary_set_ups_pass(checkpoint: str, tmp_path: Path) -> None:
    check_trainer(sft(checkpoint, tmp_path))
    check_trainer(sft(checkpoint, tmp_path, packing=True, packing_strategy="bfd"))
    check_trainer(sft(checkpoint, tmp_path, packing=True, packing_strategy="wrapped"), allow_pieces=True)


def test_prompt_tuning_is_refused(checkpoint: str, tmp_path: Path) -> None:
    trainer = sft(checkpoint, tmp_path, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="`peft_config`"):
        check_trainer(trainer)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy`"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "`packing_strategy`"),
        ({"truncation_mode": "keep_end"}, "`truncation_mode`"),
    ],
)
def test_samples_cut_at_their_beginning_are_refused(
    checkpoint: str, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    trainer = sft(checkpoint, tmp_path, **options)
    with pytest.raises(ValueError, match=name):
        check_trainer(trainer)


def dpo(source: str, folder: Path, **options: Any) -> DPOTrainer:
    model, tokenizer = load_model_and_tokenizer(source)
    model.config._name_or_path = source
    config = DPOConfig(output_dir=str(folder), max_length=2048, per_device_train_batch_size=2, **COMMON)
    return DPOTrainer(model, args=config, train_dataset=rows(True), processing_class=tokenizer, **options)


def test_preference_training_takes_its_reference_from_a_multiverse_checkpoint(checkpoint: str, tmp_path: Path) -> None:
    trainer = dpo(f"{checkpoint}/tagged", tmp_path)
    assert isinstance(trainer.ref_model, MultiverseForCausalLM)
    check_trainer(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch)
    # Policy and reference are the same model, so both answers have a margin of 0.
    assert float(loss) == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)


def test_reference_without_branches_is_refused(checkpoint: str, tmp_path: Path) -> None:
    trainer = dpo(f"{checkpoint}/plain", tmp_path)
    with pytest.raises(ValueError, match="`ref_model`"):
        check_trainer(trainer)


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_the_model_itself_refuses_pieces_of_a_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Split:
        cp_size = sp_size = 1

    setattr(Split, name, 2)
    model = tiny_model()
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", Split)
    with pytest.raises(ValueError, match=name):
        model(torch.tensor([tiny_ids("a b c")]))


def test_pipeline_stages_are_refused_before_loading() -> None:
    with pytest.raises(ValueError, match="pp_size"):
        MultiverseForCausalLM.from_pretrained("not there", distributed_config={"pp_size": 2})


def test_autocast_reaches_the_attention_of_path_masks() -> None:
    """Weights in float32 under bfloat16 autocast, TRL's default: queries come in another dtype than values."""
    ids = torch.tensor([tiny_ids("a <Parallel> <Goal> <Outline> b </Outline> </Goal> <Path> c </Path>")])
    found = {}
    for attention in ("sdpa", "multiverse"):
        model = tiny_model(dtype=torch.float32, attention=attention)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[attention] = model(ids).logits.float()
    # Both round to bfloat16, with 8 bits, at the same places.
    torch.testing.assert_close(found["multiverse"], found["sdpa"], atol=0.02, rtol=0.02)
