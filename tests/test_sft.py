"""Stock SFTTrainer on Multiverse models: one loss in every batching mode, LoRA, saving, reloading, merging."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from multiverse import BranchLayout
from multiverse.forced import HeaderTokens, forced_token_mask
from multiverse.trainer.callbacks import HeldOutAnswers
from multiverse.trainer.labels import IGNORE_INDEX, mask_forced_labels
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from multiverse.trainer.sft import MultiverseScriptArguments, build_trainer, load_model_and_tokenizer, main
from multiverse.trainer.training_data import load_data
from peft import LoraConfig, PeftModel
from tiny import tiny_config, tiny_tokenizer
from training import fresh, sft_config, short_samples
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser


@pytest.fixture
def samples() -> Dataset:
    return short_samples()


def batch_loss(model, tokenizer, dataset: Dataset, folder: Path, **options) -> float:
    """Loss of all samples in one batch, as the stock trainer computes it."""
    trainer = SFTTrainer(model, sft_config(folder, **options), train_dataset=dataset, processing_class=tokenizer)
    trainer.train_dataset = mask_forced_labels(trainer.train_dataset, model.config)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 1
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model.eval(), batches[0]))


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_padded_packed_and_padding_free_batches_have_the_same_loss(architecture, samples, tmp_path):
    model, tokenizer = fresh(architecture)
    padded = batch_loss(model, tokenizer, samples, tmp_path)
    packed = batch_loss(model, tokenizer, samples, tmp_path, packing=True, packing_strategy="bfd")
    free = batch_loss(model, tokenizer, samples, tmp_path, padding_free=True, max_length=None)
    alone = []
    for row in range(len(samples)):
        trainer = SFTTrainer(
            model, sft_config(tmp_path), train_dataset=samples.select([row]), processing_class=tokenizer
        )
        labels = mask_forced_labels(trainer.train_dataset, model.config)[0]
        ids, targets = torch.tensor([labels["input_ids"]]), torch.tensor(labels["labels"])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        kept = targets[1:] != IGNORE_INDEX
        alone.append(-scores[kept, targets[1:][kept]])
    by_definition = float(torch.cat(alone).mean())
    assert padded == pytest.approx(by_definition, abs=1e-4)
    assert packed == pytest.approx(by_definition, abs=1e-4)
    assert free == pytest.approx(by_definition, abs=1e-4)


def test_the_trainer_really_trains_with_branches(samples, tmp_path):
    model, tokenizer = fresh(scale=0.3)
    trainer = SFTTrainer(model, sft_config(tmp_path), train_dataset=samples, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        branches = float(trainer.compute_loss(model.eval(), dict(batch)))
        model.config.multiverse_token_ids = None
        plain_causal = float(trainer.compute_loss(model, dict(batch)))
    assert abs(branches - plain_causal) > 1e-3


def test_completion_only_labels_leave_out_the_prompt_and_what_the_engine_forces(samples, tmp_path):
    model, tokenizer = fresh()
    trainer = SFTTrainer(model, sft_config(tmp_path), train_dataset=samples, processing_class=tokenizer)
    row = mask_forced_labels(trainer.train_dataset, model.config)[0]
    ids = row["input_ids"]
    prompt = tokenizer.apply_chat_template(samples[0]["prompt"], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    header = HeaderTokens(model.config.multiverse_separator_ids, model.config.multiverse_label_ids)
    forced = forced_token_mask(BranchLayout.from_token_ids(ids, model.config.multiverse_token_ids), ids, header)
    assert forced.sum() > 0
    for index, label in enumerate(row["labels"]):
        hidden = index < len(prompt) or bool(forced[index])
        assert label == (IGNORE_INDEX if hidden else ids[index])


def test_masking_respects_the_documents_of_a_packed_row(samples, tmp_path):
    model, tokenizer = fresh()
    plain = SFTTrainer(model, sft_config(tmp_path), train_dataset=samples, processing_class=tokenizer)
    single = mask_forced_labels(plain.train_dataset, model.config)
    config = sft_config(tmp_path, packing=True, packing_strategy="bfd")
    packed_trainer = SFTTrainer(model, config, train_dataset=samples, processing_class=tokenizer)
    packed = mask_forced_labels(packed_trainer.train_dataset, model.config)
    documents = {tuple(row["input_ids"]): row["labels"] for row in single}
    found = 0
    for row in packed:
        start = 0
        for length in row["seq_lengths"]:
            piece = slice(start, start + length)
            assert row["labels"][piece] == documents[tuple(row["input_ids"][piece])]
            start, found = start + length, found + 1
    assert found == len(samples)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_lora_trains_adapters_and_tag_rows_only_and_reloads_and_merges(tied, samples, tmp_path):
    model, tokenizer = fresh(tied=tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lora = add_tag_rows(LoraConfig(r=4, lora_alpha=8), model)
    trainer = SFTTrainer(
        model, sft_config(tmp_path / "run"), train_dataset=samples, processing_class=tokenizer, peft_config=lora
    )
    give_wrapped_head_its_bias(model)
    trainable = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert trainable
    assert all("lora_" in name or "trainable_tokens" in name for name in trainable)
    assert sum("trainable_tokens" in name for name in trainable) == (1 if tied else 2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))

    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        trained = trainer.model.eval()(ids).logits
    base, _ = fresh(tied=tied)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, before[name])
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, trained, atol=1e-5, rtol=0)
    merged = reloaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained, atol=1e-5, rtol=0)

    tags = sorted(model.config.multiverse_token_ids.values())
    rows = merged.get_input_embeddings().weight
    others = [row for row in range(rows.shape[0]) if row not in tags]
    assert torch.equal(rows[others], before["model.embed_tokens.weight"][others])
    assert not torch.equal(rows[tags], before["model.embed_tokens.weight"][tags])
    head = merged.get_output_embeddings().weight
    assert torch.equal(head[others], before["lm_head.weight"][others])
    assert not torch.equal(head[tags], before["lm_head.weight"][tags])


def test_the_script_trains_a_plain_checkpoint_that_reloads(samples, tmp_path):
    tokenizer = tiny_tokenizer()
    config = tiny_config("qwen3", vocabulary=len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    arguments = [
        "--model_name_or_path", str(tmp_path / "plain"), "--dtype", "float32", "--output_dir", str(tmp_path / "out"),
        "--synthetic_samples", "4", "--synthetic_test_samples", "2", "--synthetic_terms", "2", "3",
        "--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "4096", "--use_cpu", "true",
        "--bf16", "false", "--report_to", "none", "--save_strategy", "steps", "--save_steps", "1",
        "--gradient_checkpointing", "false", "--disable_tqdm", "true",
    ]  # fmt: skip
    parser = TrlParser((MultiverseScriptArguments, SFTConfig, ModelConfig))
    trainer = main(*parser.parse_args_and_config(arguments))
    assert trainer.state.global_step == 2
    model, _ = load_model_and_tokenizer(str(tmp_path / "out"))
    trained = trainer.model.state_dict()
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())
    assert type(model).__name__ == "MultiverseQwen3ForCausalLM"
    assert model.config.multiverse_token_ids == trainer.model.config.multiverse_token_ids

    resumed = main(*parser.parse_args_and_config([*arguments, "--resume_from_checkpoint", "true", "--max_steps", "3"]))
    assert resumed.state.global_step == 3


def test_the_script_answers_held_out_problems_and_judges_them(tmp_path):
    model, tokenizer = fresh()
    script = MultiverseScriptArguments(
        synthetic_samples=2, synthetic_test_samples=5, answer_samples=3, answer_steps=2, answer_tokens=6
    )
    data = load_data(script, 0, tokenizer, None)
    config = sft_config(tmp_path, max_steps=2, max_length=4096)
    trainer = build_trainer(model, tokenizer, data, script, config, ModelConfig())
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, HeldOutAnswers))
    trainer.train()
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [each["step"] for each in kept] == [2, 2, 2]
    assert any("eval_generation_accuracy" in entry for entry in trainer.state.log_history)

    row, other = data["test"][0], data["test"][1]
    own = row["completion"][-1]["content"]
    assert callback.judge(own, row)
    assert not callback.judge(own, other)
    assert not callback.judge("I do not know.", row)
    assert not callback.judge("I do not know.", {"completion": [{"content": "Nobody knows."}]})


def test_answers_to_a_dataset_of_ones_own_are_not_judged(samples, tmp_path):
    model, tokenizer = fresh()
    script = MultiverseScriptArguments(answer_samples=1, dataset_test_split="held_out")
    rows = DatasetDict({"train": samples, "held_out": samples})
    trainer = build_trainer(model, tokenizer, rows, script, sft_config(tmp_path), ModelConfig())
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, HeldOutAnswers))
    assert callback.judge is None
    with pytest.raises(ValueError, match=r"`answer_samples` is 1.*'held_out'"):
        build_trainer(*fresh(), DatasetDict({"train": samples}), script, sft_config(tmp_path), ModelConfig())


@pytest.mark.parametrize(("name", "value"), [("answer_samples", -1), ("answer_steps", -1), ("answer_tokens", 0)])
def test_impossible_rounds_of_answers_are_refused_before_anything_is_loaded(name, value, tmp_path):
    script = MultiverseScriptArguments(synthetic_samples=2, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` is {value}"):
        main(script, sft_config(tmp_path), ModelConfig(model_name_or_path="unused"))


def test_bad_script_arguments_are_named(tmp_path):
    model, _ = fresh()
    with pytest.raises(ValueError, match="`dataset_name`"):
        main(MultiverseScriptArguments(), sft_config(tmp_path), ModelConfig(model_name_or_path="unused"))
    with pytest.raises(ValueError, match="`dataset`"):
        mask_forced_labels(Dataset.from_list([{"text": "no ids"}]), model.config)
    model.config.multiverse_token_ids = None
    with pytest.raises(ValueError, match="multiverse_token_ids"):
        add_tag_rows(LoraConfig(), model)
