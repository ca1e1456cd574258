"""Reinforcement learning of a Multiverse model with TRL's stock `GRPOTrainer`.

Completions are sampled with all paths side by side (`MultiverseRollouts`), tokens that the engine forces stay out of
the loss, and the rewards are a right answer, a sound format and a short critical path (`rewards.py`). Every option of
`GRPOConfig` and `ModelConfig` works as in TRL's own script, and a YAML file can hold them (`--config`).

```bash
# the project's synthetic problems, whose form is left to the model
python -m multiverse.trainer.grpo --model_name_or_path runs/warm-start --synthetic_samples 200 \\
    --scale_rewards none --output_dir runs/grpo

# a dataset with the columns `prompt` and `answer` (and `reference_steps`, where sequential solutions are known)
python -m multiverse.trainer.grpo --model_name_or_path runs/warm-start --use_peft \\
    --dataset_name you/your-problems --scale_rewards none --output_dir runs/grpo
```
"""

from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, load_dataset
from multiverse import MultiverseForCausalLM
from multiverse.trainer.choice import rollout_row
from multiverse.trainer.peft_support import add_tag_rows, give_wrapped_head_its_bias
from multiverse.trainer.recovery import resume_option, train_resumably
from multiverse.trainer.rewards import (
    REWARD_WEIGHTS,
    AccelerationReward,
    AnswerReward,
    FormatReward,
    RewardFunction,
    check_reward_options,
)
from multiverse.trainer.rollouts import MultiverseRollouts
from multiverse.trainer.sft import load_model_and_tokenizer
from multiverse.trainer.synthetic import ProblemOptions, train_and_test
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from trl.import_utils import is_math_verify_available
from trl.rewards import accuracy_reward

#: Ways to judge an answer: the number after `Answer:` (column `answer`), or mathematics (column `solution`).
ANSWER_REWARDS: dict[str, RewardFunction] = {"number": AnswerReward(), "math": accuracy_reward}


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """TRL's script arguments and what a Multiverse run adds to them."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or local path of the dataset."})
    answer_reward: str = field(
        default="number", metadata={"help": "How answers are judged.", "choices": list(ANSWER_REWARDS)}
    )
    synthetic_samples: int = field(
        default=0, metadata={"help": "Train on this many generated problems instead of a dataset."}
    )
    synthetic_first: int = field(
        default=0, metadata={"help": "Leave out the first problems, those that a warm start has seen."}
    )
    synthetic_prompt: str = field(
        default="free",
        metadata={"help": "Form that the prompt asks for.", "choices": ["free", "parallel", "sequential"]},
    )
    synthetic_paths: list[int] = field(
        default_factory=lambda: [3, 5], metadata={"help": "Fewest and most sums of a problem."}
    )
    synthetic_terms: list[int] = field(
        default_factory=lambda: [5, 8], metadata={"help": "Fewest and most terms of a sum."}
    )
    synthetic_nested: float = field(default=0.0, metadata={"help": "Share of problems with a nested sum."})
    synthetic_test_samples: int = field(
        default=120, metadata={"help": "Held-out problems; no training problem is one of them."}
    )
    adapter_path: str | None = field(
        default=None, metadata={"help": "Go on training this LoRA adapter instead of a new one."}
    )
    tag_rows_only: bool = field(
        default=False,
        metadata={"help": "Of that adapter, train the tags' rows alone: when to fork, and nothing of how to work."},
    )
    merge_adapters: bool = field(
        default=True, metadata={"help": "Add LoRA matrices to float32 weights while completions are made."}
    )
    auto_resume: bool = field(
        default=True, metadata={"help": "Go on from the newest complete checkpoint in output_dir, if there is one."}
    )


def check_arguments(script: GRPOScriptArguments, config: GRPOConfig) -> None:
    """Refuses before any work is done what could not end well; fills in `config.reward_weights`.

    Raises:
        ValueError: unless exactly one of `dataset_name` and `synthetic_samples` is given, and for reward options under
            which a fast answer may be worth more than a right one.
        ImportError: if answers cannot be judged without a package that is missing.
    """
    if (script.dataset_name is None) == (script.synthetic_samples <= 0):
        raise ValueError(
            f"Give either `dataset_name` (got {script.dataset_name!r}) or a positive `synthetic_samples` (got "
            f"{script.synthetic_samples})."
        )
    if script.synthetic_first < 0:
        raise ValueError(f"`synthetic_first` must not be negative, got {script.synthetic_first}.")
    if script.tag_rows_only and script.adapter_path is None:
        raise ValueError("`tag_rows_only` is about an adapter. Name one as `adapter_path`, or leave it out.")
    if script.answer_reward == "math" and not is_math_verify_available():
        raise ImportError("`answer_reward` is 'math', which needs a package: `pip install math-verify`.")
    _check_rewards(config)


def load_data(arguments: GRPOScriptArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> DatasetDict:
    """The prompts of the run and what the rewards need, in train and test splits.

    Raises:
        ValueError: for problem options that cannot be met.
    """
    if arguments.dataset_name is not None:
        loaded = load_dataset(arguments.dataset_name, name=arguments.dataset_config)
        return loaded if isinstance(loaded, DatasetDict) else DatasetDict({arguments.dataset_train_split: loaded})
    options = ProblemOptions(
        paths=(arguments.synthetic_paths[0], arguments.synthetic_paths[-1]),
        terms=(arguments.synthetic_terms[0], arguments.synthetic_terms[-1]),
        nested=arguments.synthetic_nested,
    )
    first = arguments.synthetic_first
    train, test = train_and_test(
        first + arguments.synthetic_samples, arguments.synthetic_test_samples, seed, options, options
    )
    splits = {arguments.dataset_train_split: train[first:], arguments.dataset_test_split: test}
    return DatasetDict(
        {
            name: Dataset.from_list([rollout_row(each, arguments.synthetic_prompt, tokenizer) for each in problems])
            for name, problems in splits.items()
        }
    )


def build_trainer(
    model: MultiverseForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetDict,
    script: GRPOScriptArguments,
    config: GRPOConfig,
    model_config: ModelConfig,
    answer: RewardFunction | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> GRPOTrainer:
    """A stock `GRPOTrainer` for `model`, ready to train.

    Args:
        answer (`RewardFunction`, *optional*): judges answers in the place of `script.answer_reward`.

    Raises:
        ValueError: for reward options under which a fast answer may be worth more than a right one, and for a
            reference (`beta`) without branches.
    """
    _check_rewards(config)
    if config.beta != 0 and script.adapter_path is None and not model_config.use_peft:
        raise ValueError(
            f"`beta` is {config.beta}, but the trainer would load its reference as a plain model, without branches. "
            "Train an adapter (`use_peft`, `adapter_path`), whose start is the reference, or set `beta` to 0."
        )
    peft_config = get_peft_config(model_config) if script.adapter_path is None else None
    if peft_config is not None:
        add_tag_rows(peft_config, model)
    trained: MultiverseForCausalLM | PeftModel = model
    if script.adapter_path is not None:
        trained = PeftModel.from_pretrained(model, script.adapter_path, is_trainable=True)
        if script.tag_rows_only:
            train_tag_rows_only(trained)
    answer = answer or ANSWER_REWARDS[script.answer_reward]
    trainer = GRPOTrainer(
        model=trained,
        reward_funcs=[answer, FormatReward(), AccelerationReward(answer, config.max_completion_length)],
        args=config,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
        rollout_func=MultiverseRollouts(script.merge_adapters),
    )
    give_wrapped_head_its_bias(model)
    complete_reference_adapter(trainer.model)
    return trainer


def train_tag_rows_only(model: PeftModel) -> None:
    """Freezes all of an adapter but the rows of the tags: what is learnt is when to fork.

    With few completions an update the noise of policy gradients soon costs what the other weights know.

    Raises:
        ValueError: if the adapter has no such rows.
    """
    rows = [name for name, _ in model.named_parameters() if "trainable_tokens_delta" in name]
    if not rows:
        raise ValueError(
            "`tag_rows_only`: the adapter trains no rows of tags. Train it with `multiverse.trainer.sft`, or with "
            "`add_tag_rows` in its configuration."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rows)


def complete_reference_adapter(model: MultiverseForCausalLM | PeftModel) -> None:
    """Gives the adapter `ref` the trained tag rows of the adapter that it stands for.

    With `beta` above 0 the trainer copies an adapter that is trained further under this name, for the KL term, but
    overlooks rows of the embedding: the reference would read the tags as an untrained model does (trl 1.16.0).
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer) and "ref" in module.trainable_tokens_delta:
            module.trainable_tokens_delta["ref"].data.copy_(module.trainable_tokens_delta["default"].data)


def _check_rewards(config: GRPOConfig) -> None:
    if config.reward_weights is None:
        config.reward_weights = list(REWARD_WEIGHTS)
    check_reward_options(config)


def main(script: GRPOScriptArguments, config: GRPOConfig, model_config: ModelConfig) -> GRPOTrainer:
    """Trains and saves; the checkpoint reloads with `MultiverseForCausalLM.from_pretrained` (or PEFT, for LoRA)."""
    check_arguments(script, config)
    arguments = {
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
        "quantization_config": get_quantization_config(model_config),
    }
    model, tokenizer = load_model_and_tokenizer(
        str(model_config.model_name_or_path), **{name: value for name, value in arguments.items() if value is not None}
    )
    dataset = load_data(script, tokenizer, config.seed)
    trainer = build_trainer(model, tokenizer, dataset, script, config, model_config)
    train_resumably(trainer, resume_option(config.resume_from_checkpoint, script.auto_resume))
    trainer.save_model(config.output_dir)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


if __name__ == "__main__":
    parser = TrlParser([GRPOScriptArguments, GRPOConfig, ModelConfig])  # type: ignore[list-item]
    main(*parser.parse_args_and_config())
