"""Fine-tunes a Qwen2, Qwen3 or Llama checkpoint into a Multiverse model with TRL's stock `SFTTrainer`.

Every option of `SFTConfig`, `ModelConfig` and `ScriptArguments` works as in TRL's own script, a YAML file can hold
them (`--config`), and `accelerate launch` or `torchrun` starts it on many devices. What is added: the tags, the tag
rows of LoRA, the masking of forced tokens, formatting and the curriculum, and a run that can be watched and stopped.
A command that was interrupted goes on from its last checkpoint when it is run again.

```bash
# LoRA on the project's synthetic problems
python -m multiverse.trainer.sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft \\
    --synthetic_samples 2000 --output_dir runs/qwen-multiverse

# any conversational dataset whose answers carry the tags
python -m multiverse.trainer.sft --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --dataset_name you/your-multiverse-data --output_dir runs/qwen-multiverse
```
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.callbacks import HeldOutAnswers, StopOnNonFinite
from multiverse.trainer.checks import check_trainer
from multiverse.trainer.collator import add_layouts
from multiverse.trainer.curriculum import install_curriculum
from multiverse.trainer.labels import mask_forced_labels
from multiverse.trainer.metrics import watch
from multiverse.trainer.parallelism import check_parallelism, gather_trained_head, save_consolidated
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from multiverse.trainer.recovery import resume_option, train_resumably
from multiverse.trainer.synthetic import read_answer
from multiverse.trainer.training_data import DataArguments, check_data_arguments, load_data
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)


@dataclass
class MultiverseScriptArguments(DataArguments):
    """TRL's script arguments and what a Multiverse run adds to them."""

    adapter_path: str | None = field(
        default=None, metadata={"help": "Go on training this LoRA adapter instead of a new one."}
    )
    mask_forced_tokens: bool = field(
        default=True, metadata={"help": "Leave the tokens that the decoder forces out of the loss."}
    )
    allow_pieces: bool = field(
        default=False,
        metadata={
            "help": "Accept packing and cutting whose pieces begin inside a block; tags are ordinary tokens there."
        },
    )
    prepare_layouts: bool = field(
        default=False, metadata={"help": "Read the tags where batches are made (see dataloader_num_workers)."}
    )
    auto_resume: bool = field(
        default=True, metadata={"help": "Go on from the newest complete checkpoint in output_dir, if there is one."}
    )
    answer_samples: int = field(
        default=0, metadata={"help": "Held-out prompts that the model answers while it is trained."}
    )
    answer_steps: int = field(
        default=0, metadata={"help": "Steps from one round of answers to the next; 0: at every evaluation."}
    )
    answer_tokens: int = field(default=1024, metadata={"help": "Longest of these answers, in tokens of all branches."})


def load_model_and_tokenizer(
    path: str, **model_arguments: Any
) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerBase]:
    """Loads a plain or Multiverse checkpoint with its tokenizer and makes sure that both know the tags.

    Args:
        path (`str`): Hub id or folder.
        model_arguments: passed to `MultiverseForCausalLM.from_pretrained`.
    """
    model = MultiverseForCausalLM.from_pretrained(path, **model_arguments)
    shared = {name: model_arguments[name] for name in ("revision", "token", "subfolder") if name in model_arguments}
    tokenizer = AutoTokenizer.from_pretrained(path, **shared)
    add_multiverse_tokens(model, tokenizer)
    return model, tokenizer


def build_trainer(
    model: MultiverseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetDict,
    script: MultiverseScriptArguments,
    config: SFTConfig,
    model_config: ModelConfig,
    callbacks: list[TrainerCallback] | None = None,
) -> SFTTrainer:
    """A stock `SFTTrainer` for `model`, ready to train.

    Raises:
        ValueError: for parallelism, packing and answers that a model with branches cannot be trained with.
    """
    peft_config = get_peft_config(model_config) if script.adapter_path is None else None
    if peft_config is not None:
        add_tag_rows(peft_config, model)
    trained: MultiverseForCausalLM | PeftModel = model
    if script.adapter_path is not None:
        trained = PeftModel.from_pretrained(model, script.adapter_path, is_trainable=True)
    evaluated = config.eval_strategy != "no"
    trainer = SFTTrainer(
        model=trained,
        args=config,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if evaluated else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    give_wrapped_head_its_bias(model)
    check_parallelism(trainer.accelerator)
    check_trainer(trainer, script.allow_pieces)
    gather_trained_head(trainer)
    if script.mask_forced_tokens:
        trainer.train_dataset = mask_forced_labels(trainer.train_dataset, model.config, config.dataset_num_proc)
        if evaluated:
            trainer.eval_dataset = mask_forced_labels(trainer.eval_dataset, model.config, config.dataset_num_proc)
    if script.curriculum:
        install_curriculum(
            trainer,
            script.curriculum_shares or "linear",
            epochs=script.curriculum_epochs,
            unpaired="raise" if script.malformed == "raise" else "drop",
        )
    if script.prepare_layouts:
        add_layouts(trainer)
    watch(trainer)
    trainer.add_callback(StopOnNonFinite(trainer))
    if script.answer_samples:
        trainer.add_callback(_answers(trainer, dataset, script))
    return trainer


def _check_answers(script: MultiverseScriptArguments) -> None:
    """Refuses numbers that no round of answers can be made with."""
    for name, least in (("answer_samples", 0), ("answer_steps", 0), ("answer_tokens", 1)):
        value = getattr(script, name)
        if value < least:
            raise ValueError(f"`{name}` is {value}. Give {least} or more.")


def _answers(trainer: SFTTrainer, dataset: DatasetDict, script: MultiverseScriptArguments) -> HeldOutAnswers:
    split = script.dataset_test_split
    if split not in dataset:
        raise ValueError(
            f"`answer_samples` is {script.answer_samples}, but the dataset has no split {split!r} to take prompts "
            "from. Name one with `dataset_test_split`."
        )
    rows = dataset[split].select(range(min(script.answer_samples, len(dataset[split]))))

    def same_number(text: str, row: Any) -> bool:
        expected = read_answer(row["completion"][-1]["content"])
        return expected is not None and read_answer(text) == expected

    # Whether an answer of a user's own is right is not for us to say.
    judge = same_number if script.synthetic_samples > 0 else None
    return HeldOutAnswers(
        trainer, list(rows), judge, every=script.answer_steps or None, max_new_tokens=script.answer_tokens
    )


def main(script: MultiverseScriptArguments, config: SFTConfig, model_config: ModelConfig) -> SFTTrainer:
    """Trains and saves; the checkpoint reloads with `MultiverseForCausalLM.from_pretrained` (or PEFT, for LoRA)."""
    check_parallelism(config)
    check_data_arguments(script)
    _check_answers(script)
    arguments = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        "quantization_config": get_quantization_config(model_config),
    }
    model, tokenizer = load_model_and_tokenizer(
        str(model_config.model_name_or_path), **{name: value for name, value in arguments.items() if value is not None}
    )
    dataset = load_data(script, config.seed, tokenizer, config.dataset_num_proc)
    trainer = build_trainer(model, tokenizer, dataset, script, config, model_config)
    train_resumably(trainer, resume_option(config.resume_from_checkpoint, script.auto_resume))
    save_consolidated(trainer, config.output_dir)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


if __name__ == "__main__":
    parser = TrlParser([MultiverseScriptArguments, SFTConfig, ModelConfig])  # type: ignore[list-item]
    main(*parser.parse_args_and_config())
