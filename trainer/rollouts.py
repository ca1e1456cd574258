"""Rollouts of TRL's stock `GRPOTrainer` by the branch engine: paths are sampled side by side.

`GRPOTrainer(..., rollout_func=MultiverseRollouts())` is all that a script needs. Left to itself the trainer calls the
model's `generate()` too, but then takes the tokens that the engine forced for the model's own and trains on them, and
counts the padding behind a row that a limit has closed as part of its answer.

The trainer gets its log-probabilities from one forward pass over prompt and completion in linear order, padded on both
sides. The backbone reads the layout from the ids, so they are those that the tokens were drawn with (LAYOUT.md,
sections 4 and 5). The trainer predicts every token from the one before it in linear order. At the beginning of a path
that is a sibling's last token, but what the engine writes there is forced; the token before a sampled one is always of
the same branch.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from multiverse.generation.output import MultiverseGenerateOutput
from multiverse.layout import BranchLayout
from multiverse.problems import Problem
from multiverse.tags import check_token_ids
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.generation import GenerationMode
from trl import GRPOTrainer, is_conversational
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation

_EXACT = (torch.float32, torch.float64)


class MultiverseRollouts:
    """A `rollout_func` of `GRPOTrainer`: one completion for every prompt it is given.

    The trainer hands every process its slice of the generation batch, in which a prompt already stands
    `num_generations` times (its documentation says otherwise). Sampling follows the trainer's own `generation_config`,
    which holds `temperature`, `top_p`, `top_k`, `min_p`, `max_completion_length` (tokens of all branches) and
    `generation_kwargs`; the latter also takes the engine's arguments, such as `max_path_tokens`. The seeds of a batch
    are drawn from torch's generator, which the trainer seeds by process and restores when it resumes. Dropout is off
    while completions are made, in training as in evaluation.

    The reward functions get two columns beside those of the dataset: `reports` (a `RequestReport` per completion) and
    `structure_problems` (a list of `Problem` per completion, empty for a sound one).

    Tags that would break the structure are never sampled, and the trainer's log-probabilities know nothing of that, as
    they know nothing of `top_p`: where a model would write such tags, sampling is slightly off its policy.

    Args:
        merge_adapters (`bool`): whether LoRA matrices are added to the weights while completions are made, which saves
            their products in every step. The weights are put back bit by bit from a copy afterwards. Weights that are
            not in float32 (or float64) are left alone: rounded to fewer bits, the sum would lose small updates.
    """

    def __init__(self, merge_adapters: bool = True) -> None:
        self.merge_adapters = merge_adapters

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """Samples one completion per prompt.

        Args:
            prompts (`list`): texts, or lists of messages; chat templates are applied here.
            trainer (`GRPOTrainer`): gives the model, the tokenizer and the sampling options.

        Returns:
            `dict`, every value a list with one entry per prompt: `prompt_ids`, `completion_ids`, `env_mask` (1 for a
            token that the model was asked for, 0 for a forced one, which the loss leaves out), `logprobs` (0.0 where
            `env_mask` is 0), `reports`, `structure_problems`. At a temperature other than 1, `logprobs` is `None`, as
            it is when the trainer generates by itself: the engine reports the model's own distribution, the trainer
            compares with the scaled one, and falls back on what it computes.

        Raises:
            ValueError: for options of the trainer under which branches cannot be decoded, and a model without tags.
        """
        check_trainer(trainer)
        model_config: Any = getattr(trainer.model, "config", None)
        token_ids = check_token_ids(getattr(model_config, "multiverse_token_ids", None))
        prompt_ids = _tokenise(prompts, trainer)
        checkpointing: Any = trainer.args.gradient_checkpointing_kwargs
        with (
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gradient_checkpointing_kwargs=checkpointing,
            ) as model,
            _evaluating(model),
            merged_adapters(model, self.merge_adapters),
        ):
            output = _generate(model, prompt_ids, trainer)
        start = max(map(len, prompt_ids))
        completion_ids, env_mask, logprobs = [], [], []
        for row, report in enumerate(output.reports):
            made = slice(start, start + report.generated_tokens)
            sampled = output.sampled[row, made]
            completion_ids.append(output.sequences[row, made].tolist())
            env_mask.append(sampled.int().tolist())
            logprobs.append(output.logprobs[row, made].masked_fill(~sampled, 0.0).tolist())
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "env_mask": env_mask,
            "logprobs": logprobs if trainer.temperature == 1 else None,
            "reports": output.reports,
            "structure_problems": [
                new_problems(prompt, completion, token_ids)
                for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
            ],
        }


def check_trainer(trainer: GRPOTrainer) -> None:
    """Refuses what would decode without branches, or not at all.

    Raises:
        ValueError: naming the option.
    """
    if trainer.use_vllm:
        raise ValueError(
            "`use_vllm` is True, but vLLM has no branches and would write the paths of a block one after the other, "
            "each seeing its siblings. Set it to False: `generate()` of the model makes the rollouts."
        )
    if trainer.use_transformers_continuous_batching:
        raise ValueError(
            "`use_transformers_continuous_batching` is True, but its paged cache cannot fork. Set it to False: the "
            "prompts of a generation batch share every step anyway."
        )
    if trainer.tools:
        raise ValueError(
            f"`tools` holds {len(trainer.tools)} tools, whose results the trainer writes into answers without knowing "
            "of branches. Leave `tools` and `environment_factory` out."
        )
    backend = DistributedBackend(trainer.accelerator)
    if backend.is_fsdp or backend.is_zero3:
        name = "FSDP" if backend.is_fsdp else "DeepSpeed ZeRO-3"
        raise ValueError(
            f"The model is sharded by {name} (`fsdp`, `deepspeed`), where every process must run the same number of "
            "steps, and completions take as many as they need. Use DDP or ZeRO-2, with LoRA where memory is short."
        )
    mode = trainer.generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"`generation_kwargs` asks for {mode.value.replace('_', ' ')}, which says nothing of forced tokens. Leave "
            "it to sampling."
        )


def new_problems(prompt_ids: list[int], completion_ids: list[int], token_ids: dict[str, int]) -> list[Problem]:
    """What is malformed in prompt and completion together but was not so in the prompt alone.

    Args:
        prompt_ids, completion_ids (`list[int]`): one sequence in two parts.
        token_ids (`dict[str, int]`): id of every tag.
    """
    before = BranchLayout.from_token_ids(prompt_ids, token_ids).problems
    after = BranchLayout.from_token_ids([*prompt_ids, *completion_ids], token_ids).problems
    return [problem for problem in after if problem not in before]


@contextmanager
def merged_adapters(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Adds the active adapters of a PEFT model to its weights, and puts the weights back as they were.

    Taking the adapters off again by subtraction, as PEFT does, would leave the rounding of every rollout in weights
    that are meant to stay frozen; so a copy is kept, as large as the adapted layers.

    Args:
        model (`nn.Module`): anything but a PEFT model with full-precision weights is left alone.
        wanted (`bool`): `False` does nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # By identity: a tied head has the weight of the embedding.
    weights = {id(weight): weight for layer in layers for weight in layer.get_base_layer().parameters(recurse=False)}
    exact = all(type(weight.data) is torch.Tensor and weight.dtype in _EXACT for weight in weights.values())
    if not wanted or not isinstance(model, PeftModel) or not layers or not exact:
        yield
        return
    kept = [(weight, weight.detach().clone()) for weight in weights.values()]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        for weight, original in kept:
            weight.data.copy_(original)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        # The trainer tells training from evaluation by it.
        model.train(training)


def _tokenise(prompts: list[Any], trainer: GRPOTrainer) -> list[list[int]]:
    """Prompts as the trainer itself would tokenise them."""
    tokenizer: Any = trainer.processing_class
    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer(text=prompts)["input_ids"]
    template_arguments: Any = trainer.chat_template_kwargs
    return tokenizer.apply_chat_template(
        prompts,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_arguments,
    )["input_ids"]


def _generate(model: nn.Module, prompt_ids: list[list[int]], trainer: GRPOTrainer) -> MultiverseGenerateOutput:
    """Decodes all prompts in one batch, padded on the left."""
    length = max(map(len, prompt_ids))
    config = copy.deepcopy(trainer.generation_config)
    config.return_dict_in_generate = True
    tokenizer: Any = trainer.processing_class
    padding = tokenizer.pad_token_id
    input_ids = torch.tensor([[padding] * (length - len(ids)) + ids for ids in prompt_ids])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    device = trainer.accelerator.device
    return model.generate(  # type: ignore[operator]
        input_ids=input_ids.to(device), attention_mask=mask.to(device), generation_config=config
    )
