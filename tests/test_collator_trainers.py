"""The collator under trainers, with workers: the same losses and weights as without it, step by step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from batches import no_reading
from cases import quick_collection  # noqa: F401
from datasets import Dataset
from multiverse.trainer.collator import LayoutCollator, add_layouts
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from peft import LoraConfig
from training import RUN, documents_of, fresh, losses, sft_config, short_samples
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTTrainer

pytestmark = pytest.mark.usefixtures("quick_collection")  # trainers collect at the start of every run


def compared_runs(build: Callable[[int], Trainer]) -> tuple[Trainer, Trainer]:
    """Trains without layouts and, with two workers, with them; the losses and weights must be the same."""
    plain = build(0)
    plain.train()
    prepared = build(2)
    add_layouts(prepared)
    add_layouts(prepared)  # a second time changes nothing
    assert isinstance(prepared.data_collator, LayoutCollator)
    assert not isinstance(prepared.data_collator.collator, LayoutCollator)
    with no_reading():
        prepared.train()
    assert len(losses(plain)) == plain.args.max_steps
    assert losses(prepared) == losses(plain)
    expected = plain.model.state_dict()
    for name, weight in prepared.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    return plain, prepared


SFT_MODES = {
    "padded": {"eval_strategy": "steps", "eval_steps": 1},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 600, "gradient_checkpointing": True},
    "padding free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("mode", SFT_MODES)
def test_sft_with_workers_follows_the_same_trajectory(mode: str, tmp_path: Path) -> None:
    samples = short_samples()

    def build(workers: int) -> Trainer:
        model, tokenizer = fresh(scale=0.2)
        options = {"max_steps": 3, "per_device_train_batch_size": 2, **SFT_MODES[mode]}
        config = sft_config(tmp_path, dataloader_num_workers=workers, **options)
        held_out = samples if "eval_strategy" in options else None
        return SFTTrainer(model, config, train_dataset=samples, eval_dataset=held_out, processing_class=tokenizer)

    plain, prepared = compared_runs(build)
    evaluated = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (plain, prepared)
    ]
    assert evaluated[0] == evaluated[1]
    assert len(evaluated[0]) == (3 if mode == "padded" else 0)


def test_lora_with_checkpointing_follows_the_same_trajectory(tmp_path: Path) -> None:
    samples = short_samples()

    def build(workers: int) -> Trainer:
        model, tokenizer = fresh(scale=0.2)
        lora = add_tag_rows(LoraConfig(r=4, lora_alpha=8), model)
        config = sft_config(tmp_path, dataloader_num_workers=workers, gradient_checkpointing=True)
        trainer = SFTTrainer(model, config, train_dataset=samples, processing_class=tokenizer, peft_config=lora)
        give_wrapped_head_its_bias(model)
        return trainer

    compared_runs(build)


def test_dpo_follows_the_same_trajectory(tmp_path: Path) -> None:
    samples = short_samples()
    answers = samples["completion"]
    pairs = Dataset.from_dict({"prompt": samples["prompt"], "chosen": answers, "rejected": [*answers[1:], answers[0]]})

    def build(workers: int) -> Trainer:
        (model, tokenizer), (reference, _) = fresh(scale=0.2), fresh(scale=0.2, seed=1)
        config = DPOConfig(
            **{**RUN, "output_dir": str(tmp_path), "max_length": 4096, "dataloader_num_workers": workers}
        )
        return DPOTrainer(model, reference, config, train_dataset=pairs, processing_class=tokenizer)

    compared_runs(build)


def test_the_plain_trainer_trains_evaluates_and_predicts_the_same(tmp_path: Path) -> None:
    _, tokenizer = fresh()
    documents = documents_of(tokenizer, short_samples())
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in documents]

    def build(workers: int) -> Trainer:
        model, _ = fresh(scale=0.2)
        config = TrainingArguments(str(tmp_path), **{**RUN, "dataloader_num_workers": workers})
        # A plain list: the trainer wraps the collator to take columns out of the features.
        return Trainer(model, config, DataCollatorForSeq2Seq(tokenizer), train_dataset=rows, eval_dataset=rows)

    plain, prepared = compared_runs(build)
    with no_reading():
        found = prepared.predict(rows)
    expected = plain.predict(rows)
    assert (found.predictions == expected.predictions).all()
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]
