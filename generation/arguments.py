"""The arguments of `generate()` that are ours, and what is refused by name before any work is done."""

from typing import Any

import torch
from multiverse.cache_argument import CACHE_ARGUMENT
from multiverse.kernels.dispatch import DECODE_ATTENTION
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from .packed_linear import can_pack, worth_packing
from .streaming import BranchStreamer

#: Arguments of `generate()` that are ours, with their defaults. They live in `generation_config`.
GENERATION_DEFAULTS: dict[str, Any] = {
    "parallel": True,
    "max_paths": 64,
    "max_depth": 8,
    "max_path_tokens": None,
    "max_sequential_steps": None,
    "max_kv_slots": None,
    "seed": None,
    "decode_attention": "auto",
    "pack_linears": None,
    "static_shapes": None,
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
    "max_kv_slots",
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
_ENGINE_ONLY = ("max_path_tokens", "max_sequential_steps", "max_kv_slots", "seed")


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


def packs_linears(model: Any, wanted: bool | None, max_new_tokens: int) -> bool:
    """Whether to pack the linear layers."""
    if wanted is None:
        return max_new_tokens >= _LEAST_TOKENS_TO_PACK and worth_packing(model)
    if wanted and not can_pack():
        raise ValueError("`pack_linears` is True, but this build of torch has no oneDNN. Leave it out.")
    return wanted


def fills_steps(wanted: bool | None, device: torch.device) -> bool:
    """Whether decode steps are filled up to static shapes: a CPU would only compute what nobody wants."""
    return device.type != "cpu" if wanted is None else wanted


def check_generate_arguments(
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

    def setting(name: str) -> Any:
        """What the call says, else its configuration, else the model's."""
        return kwargs.get(name, getattr(config, name, getattr(defaults, name, None)))

    for name in _POSITIVE:
        value = setting(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    parallel = setting("parallel")
    if parallel is not None and not isinstance(parallel, bool):
        raise ValueError(f"`parallel` must be True or False, got {parallel!r}.")
    seed = setting("seed")
    seeds = seed if isinstance(seed, list | tuple) else [] if seed is None else [seed]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in seeds):
        raise ValueError(f"`seed` must be an integer, a list with one per row, or None, got {seed!r}.")
    for name in ("pack_linears", "static_shapes"):
        value = setting(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True, False or None, got {value!r}.")
    attention = setting("decode_attention")
    if attention is not None and attention not in DECODE_ATTENTION:
        raise ValueError(f"`decode_attention` must be one of {DECODE_ATTENTION}, got {attention!r}.")
    implementation = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
    implementation = implementation or defaults.cache_implementation
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f"`cache_implementation` is {implementation!r}; branches share one growing cache. Leave it at its default."
        )


def in_stock_loop(config: GenerationConfig, kwargs: dict[str, Any]) -> bool:
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
    if config.parallel:  # type: ignore[attr-defined]
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
    past = kwargs.get(CACHE_ARGUMENT)
    if mode is GenerationMode.ASSISTED_GENERATION and past is not None and past.get_seq_length():
        raise ValueError(
            f"`past_key_values` holds {past.get_seq_length()} tokens, but {loop} (`{name}`) in transformers skips "
            f"what stands between them and the last token. Pass an empty cache, or leave `{name}` out."
        )
    if isinstance(kwargs.get("streamer"), BranchStreamer):
        raise ValueError(
            f"`streamer` is a {type(kwargs['streamer']).__name__}, which watches branches grow, and {loop} "
            f"(`{name}`) opens none. Pass an ordinary streamer such as `TextStreamer`, or leave it out."
        )
    return True


def check_input_preparation(model: Any) -> None:
    """Refuses a model whose inputs somebody else prepares: the engine asks nobody, and would leave the change out.

    PEFT's prompt learning (prefix tuning, prompt tuning, P-tuning) puts its virtual tokens in there.
    """
    if getattr(model.prepare_inputs_for_generation, "__self__", None) is not model:
        raise ValueError(
            "`prepare_inputs_for_generation` of the model has been replaced, as PEFT does for prefix tuning, prompt "
            "tuning and P-tuning, and branches would be decoded without what it adds. Use an adapter of the weights, "
            "such as LoRA."
        )


def check_decoding(config: GenerationConfig, synced_gpus: bool) -> None:
    """Refuses prepared options that the engine does not honour, rather than dropping them in silence."""
    refused = {
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
