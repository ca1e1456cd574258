"""`model.generate()` for Multiverse models.

transformers prepares everything as usual (configuration, processors, criteria, limits, padding); only the inner loop
is ours. It is reached through `_sample`, which `generate()` looks up on the class.
"""

from collections.abc import Callable
from typing import Any

import torch
from multiverse.forced import HeaderTokens
from multiverse.tags import check_token_ids
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .engine import Engine
from .output import MultiverseGenerateOutput, collect_output
from .processors import RowPrefixConstraint, processors_of_row
from .request import RequestRules

#: Arguments of `generate()` that are ours, with their defaults. They live in `generation_config`.
GENERATION_DEFAULTS: dict[str, Any] = {"parallel": True, "max_path_tokens": None}

_POSITIVE = ("max_new_tokens", "max_length", "max_path_tokens", "num_return_sequences")


class MultiverseGenerationMixin(GenerationMixin):
    """Greedy and multinomial decoding in which the paths of a block run side by side.

    Arguments of `generate()` beyond transformers' own, also as attributes of `generation_config`:

    - `parallel` (`bool`, default `True`): `False` decodes the same layout one path at a time.
    - `max_path_tokens` (`int`, *optional*): a path that holds this many tokens itself is closed.

    `max_new_tokens` counts every token made, in all branches, forced ones included. Tags that would break the
    structure where they stand are never sampled. With `return_dict_in_generate=True` the result is a
    [`MultiverseGenerateOutput`].
    """

    _supported_generation_modes = [GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH]  # noqa: RUF012

    def set_generation_defaults(self) -> None:
        """Gives `generation_config` the engine's fields where it lacks them (a checkpoint of a plain model)."""
        for name, default in GENERATION_DEFAULTS.items():
            if not hasattr(self.generation_config, name):
                setattr(self.generation_config, name, default)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`; see the class for the additional arguments.

        Raises:
            ValueError: before any work is done, for empty or malformed input, limits that are not positive, and
                decoding modes that cannot fork (beam search, assisted and contrastive decoding, paged caches).
        """
        self.set_generation_defaults()
        given = inputs if inputs is not None else kwargs.get("input_ids")
        _check_generate_arguments(given, generation_config, kwargs, self.generation_config)
        if prefix_allowed_tokens_fn is not None and self.config.multiverse_token_ids:
            constraint = RowPrefixConstraint(prefix_allowed_tokens_fn)
            logits_processor = LogitsProcessorList([*(logits_processor or []), constraint])
            prefix_allowed_tokens_fn = None
        return super().generate(
            inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, **kwargs
        )

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Leaves masks to the backbone, which knows the branches (transformers would prepare a plain causal one)."""
        return attention_mask

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> MultiverseGenerateOutput | torch.LongTensor:
        """Runs the branch engine; a model without tags decodes as its base class does."""
        if not self.config.multiverse_token_ids:
            return super()._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        _check_decoding(generation_config, synced_gpus, model_kwargs)
        eos_criteria = [criteria for criteria in stopping_criteria if isinstance(criteria, EosTokenCriteria)]
        eos = {int(token) for criteria in eos_criteria for token in criteria.eos_token_id.flatten()}
        handled = (EosTokenCriteria, MaxLengthCriteria)
        rules = RequestRules(
            token_ids=check_token_ids(self.config.multiverse_token_ids),
            header=HeaderTokens(self.config.multiverse_separator_ids, self.config.multiverse_label_ids),
            eos_token_ids=frozenset(eos),
            max_new_tokens=(stopping_criteria.max_length or generation_config.max_length) - input_ids.shape[1],
            max_path_tokens=generation_config.max_path_tokens,
        )
        mask = model_kwargs.get("attention_mask")
        real = torch.ones_like(input_ids, dtype=torch.bool).cpu() if mask is None else mask.bool().cpu()
        prompts = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), real, strict=True)]
        if not all(prompts):
            raise ValueError("`attention_mask` hides every token of a row. Give each row at least one prompt token.")
        engine = Engine(
            self,
            prompts,
            rules,
            [
                processors_of_row(logits_processor, row, input_ids.shape[1] - len(prompt))
                for row, prompt in enumerate(prompts)
            ],
            StoppingCriteriaList(criteria for criteria in stopping_criteria if not isinstance(criteria, handled)),
            do_sample=generation_config.do_sample,
            parallel=generation_config.parallel,
            keep_logits=bool(generation_config.return_dict_in_generate and generation_config.output_logits),
            streamer=streamer,
        )
        requests = engine.run()
        pad_token_id = generation_config.pad_token_id
        if pad_token_id is None:
            pad_token_id = min(eos) if eos else 0
        output = collect_output(input_ids, real, requests, int(pad_token_id), engine.keep_logits)
        return output if generation_config.return_dict_in_generate else output.sequences


def _check_generate_arguments(
    inputs: Any, config: GenerationConfig | None, kwargs: dict[str, Any], defaults: GenerationConfig
) -> None:
    """Refuses what cannot work, by name, before transformers starts."""
    if inputs is None and kwargs.get("inputs_embeds") is None:
        raise ValueError("`input_ids` is missing: the engine reads the structure of the prompt from its token ids.")
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("`inputs_embeds` carries no tags to read a structure from. Pass `input_ids` instead.")
    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2:
        shape = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise ValueError(f"`input_ids` must be a tensor of shape (batch, length), got {shape}.")
    if inputs.shape[0] == 0 or inputs.shape[1] == 0:
        raise ValueError(
            f"`input_ids` is empty, shape {tuple(inputs.shape)}. Give every row at least one prompt token."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != inputs.shape[0] or mask.shape[1] != inputs.shape[1]):
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(inputs.shape)}, with 0 for padding, got "
            f"{tuple(mask.shape)}."
        )
    if kwargs.get("position_ids") is not None:
        raise ValueError("`position_ids` cannot be given to `generate()`: they follow from the tags. Leave them out.")
    for name in _POSITIVE:
        value = kwargs.get(name, getattr(config, name, getattr(defaults, name, None)))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    parallel = kwargs.get("parallel", getattr(config, "parallel", defaults.parallel))
    if parallel is not None and not isinstance(parallel, bool):
        raise ValueError(f"`parallel` must be True or False, got {parallel!r}.")
    implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    implementation = implementation or defaults.cache_implementation
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation` is {implementation!r}; branches share one growing cache. Leave it at its default."
        )


def _check_decoding(config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """Refuses prepared options that the engine does not honour, rather than dropping them in silence."""
    cache = model_kwargs.get("past_key_values")
    refused = {
        "past_key_values": cache is not None and cache.get_seq_length() > 0,
        "use_cache=False": config.use_cache is False,
        "synced_gpus": synced_gpus,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
        "output_scores": bool(config.output_scores),
        "guidance_scale": config.guidance_scale not in (None, 1, 1.0),
        # Both compare a branch with the prompts of the whole batch.
        "encoder_repetition_penalty": config.encoder_repetition_penalty not in (None, 1, 1.0),
        "encoder_no_repeat_ngram_size": bool(config.encoder_no_repeat_ngram_size),
        "prefill_chunk_size": config.prefill_chunk_size is not None,
    }
    for name, present in refused.items():
        if present:
            raise ValueError(
                f"`{name}` is not supported while a block may fork. Leave it out, or decode with a plain base model."
            )
