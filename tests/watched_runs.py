"""Short runs of the stock `Trainer` that processes of their own can make too: nothing here takes long to import."""

from pathlib import Path
from typing import Any

import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from tiny import tiny_config, tiny_tokenizer
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed

PROBLEMS = generate_problems(8, seed=3, options=ProblemOptions(paths=(2, 3), terms=(2, 3), nested=0.3))


def messages(number: int) -> list[dict[str, str]]:
    """The question of a problem."""
    return PROBLEMS[number].messages("parallel")["prompt"]


def tokenised(tokenizer: PreTrainedTokenizerBase, number: int) -> dict[str, list[int]]:
    """A problem and its answer, all of it to be learned."""
    row = PROBLEMS[number].messages("parallel")
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
    return {"input_ids": ids, "labels": ids}


class Padded:
    """Pads on the right."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def filled(lists: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([each + [value] * (width - len(each)) for each in lists])

        return {
            "input_ids": filled([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": filled([row["labels"] for row in rows], -100),
        }


def tiny_trainer(
    folder: str | Path,
    dropout: float = 0.1,
    callbacks: list[TrainerCallback] | None = None,
    model: Any = None,
    **options: Any,
) -> Trainer:
    """A trainer of a tiny model, the same at every call; dropout makes its losses depend on the random state.

    Args:
        folder (`str` or `Path`): its `output_dir`.
        dropout (`float`): of the attention.
        model (`Any`, *optional*): trained instead of a new one.
        options: of `TrainingArguments`.
    """
    set_seed(0)
    tokenizer = tiny_tokenizer()
    config = tiny_config("llama", len(tokenizer), attention_dropout=dropout, initializer_range=0.05)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    own = MultiverseForCausalLM(config)
    add_multiverse_tokens(own, tokenizer)
    arguments = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        **options,
    }
    rows = [tokenised(tokenizer, number) for number in range(len(PROBLEMS))]
    return Trainer(
        own if model is None else model,
        TrainingArguments(str(folder), **arguments),
        data_collator=Padded(tokenizer.pad_token_id),
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def losses(trainer: Trainer) -> list[float]:
    """What has been logged at every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
