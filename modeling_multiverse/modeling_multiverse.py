"""`MultiverseForCausalLM`: Qwen2, Qwen3 and Llama with Multiverse Attention.

Only the difference from the parent classes stands here. Weights keep their names and their layout, so every plain
checkpoint of the three architectures loads as it is, and untagged text gives exactly what the base model gives.

Structure is built in the backbone rather than in `MultiverseForCausalLM.forward`: TRL's fused LM head calls the
backbone by itself and would walk past anything the causal-LM class adds.
"""

import sys
from typing import Any

import torch
from multiverse.generation.mixin import MultiverseGenerationMixin
from multiverse.kernels.dense import DenseMask
from multiverse.kernels.dispatch import (
    PATH_MASK_ATTENTION,
    SUPPORTED_ATTENTION,
    takes_dense_mask,
    unsupported_attention_message,
)
from multiverse.kernels.path_mask import PathMask
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .cache_argument import CACHE_ARGUMENT, take_cache
from .checkpoint_tags import HUB_ARGUMENTS, with_tags_of_checkpoint
from .configuration_multiverse import (
    MultiverseConfig,
    MultiverseLlamaConfig,
    MultiverseQwen2Config,
    MultiverseQwen3Config,
)
from .masking_multiverse import (
    CachedStructure,
    explicit_mask,
    has_block,
    read_tokens,
    structured_inputs,
    untagged_path_mask,
)
from .prepared_layout import PreparedLayout


class MultiverseModelMixin:
    """Gives a decoder backbone its branch-aware mask and positions, from `input_ids` alone.

    - A batch without a block runs the parent's forward untouched: same cost, same numbers.
    - With a block, mask and positions follow LAYOUT.md, for padded, packed and cached input.
    - A 4D `attention_mask` takes precedence: the caller then gives `position_ids` too.
    - `past_key_values` may come as `cache`, where transformers calls it so.
    - A `PreparedLayout` in the keyword arguments stands for the tags, which are then not read.
    """

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        past_key_values = take_cache(kwargs, past_key_values)
        if past_key_values is None and "path_plan" in kwargs:
            raise ValueError(
                f"`{CACHE_ARGUMENT}`, which `generate()` has passed, did not arrive at the backbone. Generate with a "
                "model whose `forward` nobody has replaced, or install an older transformers."
            )
        state = None
        layout = PreparedLayout.taken_from(kwargs)
        if layout is not None:
            layout.check(self.config, input_ids, attention_mask, past_key_values)
        given = (attention_mask, position_ids, kwargs.get("cu_seq_lens_q"))
        takes_path_mask = self.config._attn_implementation in PATH_MASK_ATTENTION and "path_plan" not in kwargs
        if takes_path_mask and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 2:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, but {self.config._attn_implementation!r} "
                "builds its own from the tags. Pass a 2D mask of the padding, or use `attn_implementation='sdpa'`."
            )
        if input_ids is None and CachedStructure.of(past_key_values).machines is not None:
            raise ValueError(
                "`inputs_embeds` carries no tags, but `past_key_values` holds blocks to go on from. Pass `input_ids`."
            )
        # A step of the engine brings its own structure.
        if input_ids is not None and self.config.multiverse_token_ids and "path_plan" not in kwargs:
            _refuse_split_sequences()
            state = CachedStructure.of(past_key_values)
            attention_mask, position_ids = self._apply_structure(
                state, input_ids, attention_mask, position_ids, past_key_values, kwargs.get("cu_seq_lens_q"), layout
            )
        if attention_mask is not given[0] and takes_dense_mask(self.config._attn_implementation, attention_mask):
            kwargs["dense_mask"] = DenseMask(attention_mask[:, 0])
        if takes_path_mask:
            self._refuse_sliding_windows()
            path_mask = attention_mask
            if not isinstance(path_mask, PathMask) and layout is not None:
                path_mask = layout.path_mask()
            elif not isinstance(path_mask, PathMask):
                path_mask = self._untagged_path_mask(
                    input_ids if inputs_embeds is None else inputs_embeds,
                    attention_mask,
                    position_ids,
                    past_key_values,
                    kwargs.get("cu_seq_lens_q"),
                )
            kwargs["path_mask"] = path_mask
            # Four dimensions stand for a mask that has been prepared, so that the parent prepares none.
            attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=path_mask.device)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE_ARGUMENT: past_key_values},
            **kwargs,
        )
        if state is not None:
            # A cache that the parent made itself is found in its output (a tuple under `return_dict=False`).
            candidates = outputs if isinstance(outputs, tuple) else outputs.values()
            caches = [each for each in (past_key_values, *candidates) if isinstance(each, Cache)]
            if caches and layout is not None and layout.tagged:
                # Who goes on from a cache needs more of the structure than the layout holds.
                read_tokens(self.config.multiverse_token_ids, state, input_ids, *given)
            for cache in caches:
                setattr(cache, CachedStructure.ATTRIBUTE, state)
        return outputs

    def _refuse_sliding_windows(self) -> None:
        if "sliding_attention" in (getattr(self.config, "layer_types", None) or ()):
            raise ValueError(
                "`config.layer_types` holds sliding-window layers, which Multiverse Attention does not define. Load "
                "the model with `use_sliding_window=False`."
            )

    def _untagged_path_mask(
        self,
        inputs: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        cumulative_lengths: torch.Tensor | None,
    ) -> PathMask:
        """The mask of text without blocks, for attention that takes a `PathMask`."""
        if inputs is None:
            raise ValueError("`input_ids` is missing. Pass it, or `inputs_embeds`.")
        batch_size, new = inputs.shape[:2]
        cached = room = 0
        if past_key_values is not None:
            cached = int(past_key_values.get_seq_length())
            room = past_key_values.get_mask_sizes(new, 0)[0] - new
        if room > cached:
            raise ValueError(
                f"`past_key_values` is a {type(past_key_values).__name__} with room beyond the slots in use, which "
                f"{self.config._attn_implementation!r} cannot leave out. Pass a `DynamicCache`."
            )
        return untagged_path_mask(
            batch_size, new, cached, attention_mask, position_ids, cumulative_lengths, inputs.device
        )

    def _apply_structure(
        self,
        state: CachedStructure,
        input_ids: torch.LongTensor,
        attention_mask: Any,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        cumulative_lengths: torch.Tensor | None,
        layout: PreparedLayout | None,
    ) -> tuple[Any, torch.LongTensor | None]:
        """Returns the mask and positions for the parent's forward and records the new tokens in `state`."""
        if layout is not None:
            tagged = layout.tagged
        else:
            tagged = state.machines is not None or has_block(input_ids, self.config.multiverse_token_ids)
        rank = attention_mask.dim() if isinstance(attention_mask, torch.Tensor) else 4
        if attention_mask is not None and rank != 2:
            if rank != 4:
                raise ValueError(
                    f"`attention_mask` must have 2 dimensions (batch, length) or 4 (batch, 1, queries, slots), got "
                    f"shape {tuple(attention_mask.shape)}."
                )
            if tagged and position_ids is None:
                raise ValueError(
                    "`position_ids` is None next to a 4D `attention_mask` on tagged text. Pass both, for example from "
                    "`BranchLayout.from_token_ids`, or neither and let the model build them."
                )
            state.external, state.length = True, state.length + input_ids.shape[1]
            if isinstance(attention_mask, torch.Tensor):
                attention_mask = explicit_mask(self.config._attn_implementation, attention_mask, self.dtype)
            return attention_mask, position_ids
        if tagged and state.external:
            raise ValueError(
                "`past_key_values` was filled under a 4D `attention_mask`, so its branches are unknown. Pass a 4D "
                "`attention_mask` and `position_ids` again, or start from an empty cache."
            )
        if not tagged:
            state.length += input_ids.shape[1]
            state.next_positions = None
            if position_ids is not None:
                state.next_positions = position_ids[:, -1].expand(input_ids.shape[0]) + 1
            return attention_mask, position_ids
        if self.config._attn_implementation not in SUPPORTED_ATTENTION:
            raise ValueError(unsupported_attention_message(self.config._attn_implementation))
        self._refuse_sliding_windows()
        if layout is not None:
            mask = layout.attention_mask(self.config, attention_mask, self.dtype)
            return mask, layout.position_ids
        return structured_inputs(
            self.config,
            state,
            input_ids,
            attention_mask,
            position_ids,
            cumulative_lengths,
            past_key_values,
            self.dtype,
        )


class MultiverseForCausalLM(MultiverseGenerationMixin):
    """Front door and common parent of all Multiverse causal language models.

    `MultiverseForCausalLM.from_pretrained(path)` takes a plain Qwen2, Qwen3 or Llama checkpoint or a Multiverse one,
    and `MultiverseForCausalLM(config)` builds one with new weights; both give the class of the base architecture.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from multiverse import MultiverseForCausalLM, add_multiverse_tokens
    >>> model = MultiverseForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    >>> add_multiverse_tokens(model, tokenizer)
    ```
    """

    def __new__(cls, config: PreTrainedConfig | None = None, *args: Any, **kwargs: Any) -> "MultiverseForCausalLM":
        if cls is MultiverseForCausalLM:
            cls = _model_class(MultiverseConfig.from_base(_checked_config(config)))
        return super().__new__(cls)

    def __init__(self, config: PreTrainedConfig) -> None:
        config = MultiverseConfig.from_base(_checked_config(config))
        if config.model_type != self.config_class.model_type:
            raise ValueError(
                f"`config` is a {config.model_type} configuration, which {type(self).__name__} cannot hold. Use "
                "`MultiverseForCausalLM(config)`, which picks the class."
            )
        # What the three parents' constructors do, with our backbone in the place of theirs: calling them first would
        # allocate every weight twice, and swapping the class of a built backbone loses its output recorders.
        PreTrainedModel.__init__(self, config)
        self.model = self._backbone_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.set_generation_defaults()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, for plain and Multiverse checkpoints alike.

        A plain checkpoint whose own tokenizer knows the twelve tags, as that of Multiverse-32B does, comes with them:
        `config.multiverse_token_ids` and its companions are filled from the tokenizer's files.

        Raises:
            ValueError: if the checkpoint's architecture has no Multiverse class, or `distributed_config` asks for
                pipeline stages.
        """
        _refuse_pipeline_stages(kwargs.get("distributed_config"))
        config, code_revision = kwargs.pop("config", None), kwargs.pop("code_revision", None)
        if not isinstance(config, PreTrainedConfig):
            passed = {name: kwargs[name] for name in _CONFIG_ARGUMENTS if name in kwargs}
            if code_revision is not None:
                passed["code_revision"] = code_revision
            config = AutoConfig.from_pretrained(config or pretrained_model_name_or_path, **passed)
            if kwargs.get("use_sliding_window") is False:
                # Derived when the checkpoint was saved, and stored beside it.
                config.layer_types = ["full_attention"] * config.num_hidden_layers
            # As in the base class, keyword arguments that are fields of the configuration override it.
            for name in [name for name in kwargs if name in config.to_dict() and name not in _MODEL_ARGUMENTS]:
                setattr(config, name, kwargs.pop(name))
        config = MultiverseConfig.from_base(config)
        model_class = _model_class(config)
        if cls is MultiverseForCausalLM:
            return model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        if cls is not model_class and not issubclass(cls, model_class):
            raise ValueError(
                f"`pretrained_model_name_or_path` is a {config.model_type} checkpoint, which {cls.__name__} cannot "
                "hold. Use `MultiverseForCausalLM.from_pretrained`, which picks the class."
            )
        config = with_tags_of_checkpoint(config, pretrained_model_name_or_path, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        # A plain checkpoint brings its own generation configuration, in the place of the constructor's.
        (loaded[0] if isinstance(loaded, tuple) else loaded).set_generation_defaults()
        return loaded

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """As in the parent, with our card in the place of the empty one that transformers writes for a new repo."""
        self.config.write_beside(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


#: `from_pretrained` arguments that are the configuration's too.
_CONFIG_ARGUMENTS = (*HUB_ARGUMENTS, "gguf_file", "trust_remote_code")


#: Fields of a configuration that `from_pretrained` takes for itself.
_MODEL_ARGUMENTS = ("attn_implementation", "dtype", "quantization_config", "torch_dtype", "use_safetensors")


class MultiverseQwen2Model(MultiverseModelMixin, Qwen2Model):
    """Qwen2 backbone with Multiverse Attention."""

    config_class = MultiverseQwen2Config


class MultiverseQwen3Model(MultiverseModelMixin, Qwen3Model):
    """Qwen3 backbone with Multiverse Attention."""

    config_class = MultiverseQwen3Config


class MultiverseLlamaModel(MultiverseModelMixin, LlamaModel):
    """Llama backbone with Multiverse Attention."""

    config_class = MultiverseLlamaConfig


class MultiverseQwen2ForCausalLM(MultiverseForCausalLM, Qwen2ForCausalLM):
    """Qwen2 (and Qwen2.5) as a Multiverse model."""

    config_class = MultiverseQwen2Config
    _backbone_class = MultiverseQwen2Model


class MultiverseQwen3ForCausalLM(MultiverseForCausalLM, Qwen3ForCausalLM):
    """Qwen3 as a Multiverse model."""

    config_class = MultiverseQwen3Config
    _backbone_class = MultiverseQwen3Model


class MultiverseLlamaForCausalLM(MultiverseForCausalLM, LlamaForCausalLM):
    """Llama as a Multiverse model."""

    config_class = MultiverseLlamaConfig
    _backbone_class = MultiverseLlamaModel


#: Configuration class, backbone and causal LM of every supported architecture.
ARCHITECTURES: tuple[tuple[type[MultiverseConfig], type, type[MultiverseForCausalLM]], ...] = (
    (MultiverseQwen2Config, MultiverseQwen2Model, MultiverseQwen2ForCausalLM),
    (MultiverseQwen3Config, MultiverseQwen3Model, MultiverseQwen3ForCausalLM),
    (MultiverseLlamaConfig, MultiverseLlamaModel, MultiverseLlamaForCausalLM),
)


def _refuse_split_sequences() -> None:
    """accelerate's context and sequence parallelism hand every rank a piece of the text, and drop the mask."""
    # A piece may hold paths and not the `<Parallel>` before them, so tags cannot decide. accelerate is optional: where
    # nobody has imported it, nothing is split.
    state = sys.modules.get("accelerate.state")
    parallelism = None if state is None else state.AcceleratorState._shared_state.get("parallelism_config")
    for name in ("cp_size", "sp_size"):
        if parallelism is not None and getattr(parallelism, name) > 1:
            raise ValueError(
                f"`parallelism_config.{name}` is {getattr(parallelism, name)}: it splits sequences over ranks and "
                "drops the attention mask, so that the paths of a block would see each other. Set it to 1."
            )


def _refuse_pipeline_stages(distributed: Any) -> None:
    stages = distributed.get("pp_size") if isinstance(distributed, dict) else getattr(distributed, "pp_size", None)
    if (stages or 1) > 1:
        raise ValueError(
            f"`distributed_config.pp_size` is {stages}, but later stages are not given the token ids that hold the "
            "structure. Use `tp_size` or `fsdp_size`."
        )


def _model_class(config: MultiverseConfig) -> type[MultiverseForCausalLM]:
    # By model type, not by class: a configuration that came through remote code has a class of its own.
    for config_class, _, model_class in ARCHITECTURES:
        if config.model_type == config_class.model_type:
            return model_class
    supported = [config_class.model_type for config_class, _, _ in ARCHITECTURES]
    raise ValueError(f"`config.model_type` is {config.model_type!r}; supported are {supported}.")


def _checked_config(config: Any) -> PreTrainedConfig:
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"`config` must be a transformers configuration, got {type(config).__name__}. To load a checkpoint use "
            "`MultiverseForCausalLM.from_pretrained(path)`."
        )
    return config


def register_auto_classes() -> None:
    """Makes AutoConfig, AutoModel and AutoModelForCausalLM know the three architectures."""
    for config_class, backbone_class, model_class in ARCHITECTURES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, backbone_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        # The Trainer's label smoothing looks here whether a model's labels are to be shifted, and nowhere else.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = model_class.__name__
