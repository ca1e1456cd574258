"""GRPO runs of tiny models: a trainer over a fixed vocabulary, its rollouts, and what it computes from them."""

from pathlib import Path

import torch
from datasets import Dataset
from decoding import PROMPTS
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from multiverse.trainer.rollouts import MultiverseRollouts
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import EOS, PAD, TOKEN_IDS, VOCABULARY, WORDS, tiny_config, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

#: Prompts of different lengths, three of them inside a block.
MIXED = [PROMPTS[name] for name in ("plain", "inside a later path", "after a goal", "inside a nested path")]
#: Makes random models fork and end.
FORK = [[[token_id], 2.5] for token_id in TOKEN_IDS.values()] + [[[EOS], 2.0]]
WORD_OF_ID = {token_id: word for word, token_id in WORDS.items()}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """The fixed vocabulary of `tiny_model` as a tokenizer of words between blanks."""
    spare = {f"w{token_id}": token_id for token_id in range(VOCABULARY) if token_id not in WORD_OF_ID}
    tokenizer = Tokenizer(models.WordLevel({**WORDS, **spare}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token=f"w{PAD}")


def lengths(completion_ids, **columns) -> list[float]:
    """A reward that differs within a group."""
    return [len(ids) / 100 for ids in completion_ids]


def grpo_config(folder: Path, rows: int, **options) -> GRPOConfig:
    """Options of a short run on the CPU with one generation batch of `rows` completions."""
    return GRPOConfig(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "num_generations": 2,
            "per_device_train_batch_size": rows,
            "max_completion_length": 60,
            "shuffle_dataset": False,
            "scale_rewards": "none",
            "generation_kwargs": {"sequence_bias": FORK},
            **options,
        },
    )


def word_trainer(
    folder: Path, prompts: list[str], model=None, rewards=lengths, columns=None, **options
) -> GRPOTrainer:
    """A trainer of a tiny model over prompts in its fixed vocabulary."""
    rows = [{"prompt": prompt, **(columns or {})} for prompt in prompts]
    trainer = GRPOTrainer(
        tiny_model() if model is None else model,
        rewards,
        grpo_config(folder, 2 * len(prompts), **options),
        Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        rollout_func=MultiverseRollouts(),
    )
    # Set in the loop of training, which these tests look into.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def rollouts(trainer: GRPOTrainer, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the trainer makes of the first generation batch."""
    torch.manual_seed(seed)
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def recomputed(trainer: GRPOTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities as the trainer computes them for its loss, shape `(rows, completion)`."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    return found[0]


def trained_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bool mask of the completion tokens in the loss."""
    return (inputs["completion_mask"] * inputs["tool_mask"]).bool()


def fresh(architecture: str = "llama", **fields) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerFast]:
    """A tiny model with its tags and a byte-level tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = tiny_config(architecture, len(tokenizer), **fields)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = MultiverseForCausalLM(config)
    add_multiverse_tokens(model, tokenizer)
    return model, tokenizer


def with_adapter(model: MultiverseForCausalLM, dropout: float = 0.0) -> PeftModel:
    """A LoRA model whose matrices and tag rows say something."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False)
    adapted = get_peft_model(model, add_tag_rows(lora, model))
    give_wrapped_head_its_bias(model)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "trainable_tokens" in name:
                weight += 0.3 * torch.randn_like(weight)
    return adapted
