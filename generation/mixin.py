"""`model.generate()` for Multiverse models.

transformers prepares everything as usual (configuration, processors, criteria, limits, padding); only the inner loop
is ours. It is reached through `_sample`, which `generate()` looks up on the class.
"""

from collections.abc import Callable
from typing import Any

import torch
from multiverse.forced import HeaderTokens
from multiverse.masking_multiverse import SUPPORTED_ATTENTION, CachedStructure, unsupported_attention_message
from multiverse.tags import check_token_ids
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from .attachment import attached
from .attention import DECODE_ATTENTION
from .engine import Engine, EngineOptions
from .output import MultiverseGenerateOutput, collect_output
from .packed_linear import can_pack, worth_packing
from .processors import RowPrefixConstraint, processors_of_row
from .request import Request, RequestRules
from .sampling import SamplingOptions
from .streaming import BranchStreamer

#: Arguments of `generate()` that are ours, with their defaults. They live in `generation_config`.
GENERATION_DEFAULTS: dict[str, Any] = {
    "parallel": True,
    "max_paths": 64,
    "max_depth": 8,
    "max_path_tokens": None,
    "max_sequential_steps": None,
    "seed": None,
    "decode_attention": "auto",
    "pack_linears": None,
}

#: Checking the packed weights takes about as long as making a token or two.
_LEAST_TOKENS_TO_PACK = 32

_POSITIVE = (
    "max_new_tokens",
    "max_length",
    "max_paths",
    "max_depth",
    "max_path_tokens",
    "max_sequential_steps",
    "num_return_sequences",
)

#: Loops of transformers' own that write one token after another, and the arguments that ask for them.
_STOCK_MODES: dict[GenerationMode, tuple[str, ...]] = {
    GenerationMode.BEAM_SEARCH: ("num_beams",),
    GenerationMode.BEAM_SAMPLE: ("num_beams",),
    GenerationMode.ASSISTED_GENERATION: ("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens"),
}

#: Likewise, for loops that transformers has given away to remote code.
_REMOTE_MODES: dict[GenerationMode, tuple[str, ...]] = {
    GenerationMode.CONTRASTIVE_SEARCH: ("penalty_alpha",),
    GenerationMode.DOLA_GENERATION: ("dola_layers",),
    GenerationMode.GROUP_BEAM_SEARCH: ("num_beam_groups",),
    GenerationMode.CONSTRAINED_BEAM_SEARCH: ("constraints", "force_words_ids"),
}

#: Arguments of ours that a loop of transformers' own would drop in silence.
_ENGINE_ONLY = ("max_path_tokens", "max_sequential_steps", "seed")


class MultiverseGenerationMixin(GenerationMixin):
    """Greedy and multinomial decoding in which the paths of a block run side by side.

    Arguments of `generate()` beyond transformers' own, also as attributes of `generation_config`:

    - `parallel` (`bool`, default `True`): `False` decodes the same layout one path at a time.
    - `max_paths` (`int`, default 64): most paths of a request that run side by side; further ones wait their turn.
    - `max_depth` (`int`, default 8): most blocks around a token; deeper paths are not offered another block.
    - `max_path_tokens` (`int`, *optional*): a path that holds this many tokens itself is closed.
    - `max_sequential_steps` (`int`, *optional*): budget of the critical path; then everything open is closed.
    - `seed` (`int` or `list[int]`, *optional*): what a sampled request draws from, whatever else is in the batch; an
      `int` stands for itself, itself + 1, ... over the rows. Without it, seeds come from torch's global generator.
    - `decode_attention` (`str`, default `"auto"`): `"folded"` runs the branches and heads of a request as rows of one
      attention call, `"model"` the model's own implementation. Automatic: `"folded"` for a model under `sdpa`.
    - `pack_linears` (`bool`, *optional*): whether to decode on copies of the weights in oneDNN's layout, for models on
      a CPU. Automatic: where there is memory for them and enough tokens to gain from it.

    `max_new_tokens` counts every token made, in all branches, forced ones included. Tags that would break the
    structure where they stand are never sampled. With `return_dict_in_generate=True` the result is a
    [`MultiverseGenerateOutput`]. An exception in the middle of decoding (a streamer's, a criterion's, Ctrl-C) carries
    what was made until then, closed and well-formed, as its attribute `partial_output`.

    With `parallel=False`, beam search and beam sampling (`num_beams`), assisted decoding (`assistant_model`,
    `assistant_early_exit`) and prompt lookup (`prompt_lookup_num_tokens`) run in transformers' own loops, with its own
    outputs. The tags that the model writes have the meaning of LAYOUT.md there too, but that is all: nothing is forced
    and nothing banned, so path headers, separators, `<Conclusion>` and a sound structure are up to the model, and of
    the arguments above only `parallel` counts; `max_path_tokens`, `max_sequential_steps` and `seed` are refused.
    """

    def set_generation_defaults(self) -> None:
        """Gives `generation_config` the engine's fields where it lacks them (a checkpoint of a plain model)."""
        # Marked as derived from the model's configuration, it would lose them when it is saved and loaded again.
        self.generation_config._from_model_config = False
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
                decoding modes that cannot fork (beam search and assisted decoding without `parallel=False`,
                contrastive search, paged caches).
        """
        self.set_generation_defaults()
        given = inputs if inputs is not None else kwargs.get("input_ids")
        _check_generate_arguments(given, generation_config, kwargs, self.generation_config)
        if self.config.multiverse_token_ids:
            config, _ = self._prepare_generation_config(generation_config, **kwargs)
            if not _in_stock_loop(config, kwargs) and prefix_allowed_tokens_fn is not None:
                constraint = RowPrefixConstraint(prefix_allowed_tokens_fn)
                logits_processor = LogitsProcessorList([*(logits_processor or []), constraint])
                prefix_allowed_tokens_fn = None
        return super().generate(
            inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, **kwargs
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the paged cache of continuous batching knows no branches."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `init_continuous_batching`) needs a paged cache, which cannot "
            "fork. Give the prompts to `generate()` as one left-padded batch: its requests share every step."
        )

    def create_masks_for_generate(self, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Leaves masks to the backbone, which knows the branches (transformers would prepare a plain causal one)."""
        return attention_mask

    def _reorder_cache(self, past_key_values: Cache, beam_idx: torch.LongTensor) -> Cache:
        """Lets the recorded branches go with their rows (beam search calls this between steps).

        Args:
            beam_idx (`torch.LongTensor` of shape `(rows,)`): for every row the one that it goes on from.
        """
        CachedStructure.reorder(past_key_values, beam_idx)
        return past_key_values

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
        """Runs the branch engine; a model without tags, or one that drafts for another, does as its base class."""
        if not self.config.multiverse_token_ids or generation_config.is_assistant:
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
            max_depth=generation_config.max_depth,
            max_sequential_steps=generation_config.max_sequential_steps,
        )
        mask = model_kwargs.get("attention_mask")
        real = torch.ones_like(input_ids, dtype=torch.bool).cpu() if mask is None else mask.bool().cpu()
        prompts = [row[kept].tolist() for row, kept in zip(input_ids.cpu(), real, strict=True)]
        if not all(prompts):
            raise ValueError("`attention_mask` hides every token of a row. Give each row at least one prompt token.")
        as_dict = bool(generation_config.return_dict_in_generate)
        sampling = SamplingOptions(
            processors=[
                processors_of_row(logits_processor, row, input_ids.shape[1] - len(prompt))
                for row, prompt in enumerate(prompts)
            ],
            seeds=row_seeds(generation_config.seed, len(prompts)) if generation_config.do_sample else None,
            keep_logits=as_dict and bool(generation_config.output_logits),
            keep_scores=as_dict and bool(generation_config.output_scores),
            keep_logprobs=as_dict,
        )
        requests = [Request(prompt, rules) for prompt in prompts]
        criteria = StoppingCriteriaList(each for each in stopping_criteria if not isinstance(each, handled))
        pad_token_id = generation_config.pad_token_id
        if pad_token_id is None:
            pad_token_id = min(eos) if eos else 0

        def collected() -> MultiverseGenerateOutput:
            return collect_output(input_ids, real, requests, int(pad_token_id), sampling)

        with attached(self, pack=_packs(self, generation_config.pack_linears, rules.max_new_tokens)) as own:
            options = EngineOptions(
                implementation=_implementation(generation_config.decode_attention, own),
                width=generation_config.max_paths if generation_config.parallel else 1,
            )
            try:
                Engine(self, requests, sampling, criteria, options, streamer).run()
            except BaseException as error:
                # Ctrl-C included: hours of decoding must not be lost with it.
                for request in requests:
                    if not request.finished:
                        request.close("interrupted")
                error.partial_output = collected()  # type: ignore[attr-defined]
                raise
        return collected() if as_dict else collected().sequences


def row_seeds(seed: int | list[int] | None, rows: int) -> list[int]:
    """The seed of every row (see `MultiverseGenerationMixin`)."""
    if seed is None:
        return torch.randint(2**62, (rows,)).tolist()
    if isinstance(seed, int):
        return [seed + row for row in range(rows)]
    if len(seed) != rows:
        raise ValueError(
            f"`seed` holds {len(seed)} values for {rows} rows (`num_return_sequences` included). Give one seed per "
            "row, or a single integer."
        )
    return [int(each) for each in seed]


def _packs(model: Any, wanted: bool | None, max_new_tokens: int) -> bool:
    """Whether to pack the linear layers."""
    if wanted is None:
        return max_new_tokens >= _LEAST_TOKENS_TO_PACK and worth_packing(model)
    if wanted and not can_pack():
        raise ValueError("`pack_linears` is True, but this build of torch has no oneDNN. Leave it out.")
    return wanted


def _implementation(decode_attention: str, own: str | None) -> str:
    """Attention of the decode steps: `"folded"`, or the name of the model's own implementation."""
    if decode_attention == "folded" or (decode_attention == "auto" and own == "sdpa"):
        return "folded"
    if own not in SUPPORTED_ATTENTION:
        raise ValueError(unsupported_attention_message(own))
    return own


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
    # Assisted decoding hands them to the model that drafts; where there are blocks, the backbone goes by its own.
    if kwargs.get("position_ids") is not None and not getattr(config, "is_assistant", False):
        raise ValueError("`position_ids` cannot be given to `generate()`: they follow from the tags. Leave them out.")
    for name in _POSITIVE:
        value = kwargs.get(name, getattr(config, name, getattr(defaults, name, None)))
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    parallel = kwargs.get("parallel", getattr(config, "parallel", defaults.parallel))
    if parallel is not None and not isinstance(parallel, bool):
        raise ValueError(f"`parallel` must be True or False, got {parallel!r}.")
    seed = kwargs.get("seed", getattr(config, "seed", defaults.seed))
    seeds = seed if isinstance(seed, list | tuple) else [] if seed is None else [seed]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in seeds):
        raise ValueError(f"`seed` must be an integer, a list with one per row, or None, got {seed!r}.")
    pack = kwargs.get("pack_linears", getattr(config, "pack_linears", defaults.pack_linears))
    if pack is not None and not isinstance(pack, bool):
        raise ValueError(f"`pack_linears` must be True, False or None, got {pack!r}.")
    attention = kwargs.get("decode_attention", getattr(config, "decode_attention", defaults.decode_attention))
    if attention is not None and attention not in DECODE_ATTENTION:
        raise ValueError(f"`decode_attention` must be one of {DECODE_ATTENTION}, got {attention!r}.")
    implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    implementation = implementation or defaults.cache_implementation
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation` is {implementation!r}; branches share one growing cache. Leave it at its default."
        )


def _in_stock_loop(config: GenerationConfig, kwargs: dict[str, Any]) -> bool:
    """Whether a loop of transformers' own decodes, from the whole configuration; refuses by name what cannot."""
    if config.is_assistant:
        return True
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    if mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        return False
    if getattr(config, "use_mtp", None):
        raise ValueError(
            "`use_mtp` is True, but no Multiverse architecture has heads that predict several tokens. Leave it out; "
            "`prompt_lookup_num_tokens` and `assistant_model` work with `parallel=False`."
        )
    values = {
        name: kwargs.get(name, getattr(config, name, None))
        for name in _STOCK_MODES.get(mode) or _REMOTE_MODES.get(mode, ())
    }
    name = next((name for name, value in values.items() if value is not None), mode.value)
    value = values.get(name)
    given = f"`{name}` is {type(value).__name__ if name == 'assistant_model' else repr(value)}"
    loop = mode.value.replace("_", " ")
    if mode not in _STOCK_MODES:
        raise ValueError(
            f"{given}: transformers has {loop} as remote code only, which does not know the branches of a model with "
            f"tags. Leave `{name}` out; `num_beams` works with `parallel=False`."
        )
    if config.parallel:
        raise ValueError(
            f"{given}, which asks for {loop}, and that cannot fork a block. Pass `parallel=False` with it to write "
            f"one token after another, or leave `{name}` out."
        )
    for own in _ENGINE_ONLY:
        if getattr(config, own, None) is not None:
            raise ValueError(
                f"`{own}` is {getattr(config, own)!r}, which {loop} (`{name}`) does not honour. Set it to "
                f"None, or leave `{name}` out."
            )
    if isinstance(kwargs.get("streamer"), BranchStreamer):
        raise ValueError(
            f"`streamer` is a {type(kwargs['streamer']).__name__}, which watches branches grow, and {loop} "
            f"(`{name}`) opens none. Pass an ordinary streamer such as `TextStreamer`, or leave it out."
        )
    return True


def _check_decoding(config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """Refuses prepared options that the engine does not honour, rather than dropping them in silence."""
    cache = model_kwargs.get("past_key_values")
    refused = {
        "past_key_values": cache is not None and cache.get_seq_length() > 0,
        "use_cache=False": config.use_cache is False,
        "synced_gpus": synced_gpus,
        "output_attentions": bool(config.output_attentions),
        "output_hidden_states": bool(config.output_hidden_states),
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
