"""`MultiverseConfig`: a Qwen2, Qwen3 or Llama configuration that also names the control tags."""

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from .checkpoint_tags import with_tags_of_checkpoint


@strict
class MultiverseConfig(PreTrainedConfig):
    r"""
    Configuration of a Multiverse model: the base architecture's own fields plus the four below.

    This class is the front door: `MultiverseConfig.from_base(config)` and `MultiverseConfig.from_pretrained(...)` give
    the class of the base architecture (`MultiverseQwen2Config`, `MultiverseQwen3Config`, `MultiverseLlamaConfig`), all
    of them subclasses of this one.

    Args:
        multiverse_token_ids (`dict[str, int]`, *optional*):
            Id of every control tag of `multiverse.TAGS`. Written by `multiverse.add_multiverse_tokens`, and by
            `from_pretrained` where the checkpoint's own tokenizer knows them; while it is `None` the model behaves
            exactly as its base.
        multiverse_separator_ids (`list[int]`, *optional*):
            Tokens that stand between two tags in the training data (one newline in the published data). The decoder
            forces them around path headers.
        multiverse_label_ids (`dict[str, int]`, *optional*):
            Ids of the pieces that outline labels such as `1:` and `2.3:` are written with.
    """

    model_type = "multiverse"

    multiverse_token_ids: dict[str, int] | None = None
    multiverse_separator_ids: list[int] | None = None
    multiverse_label_ids: dict[str, int] | None = None

    # No field: TRL reads it off every configuration, and transformers looks into it where there is one.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    # Puts the package's code, and a model card where there is none, into the folder of a configuration; the package
    # sets it. The same class out of a checkpoint's own code has none: transformers copies the files that it came from.
    folder_writer: ClassVar[Callable[..., Any] | None] = None

    @classmethod
    def from_base(cls, config: PreTrainedConfig) -> "MultiverseConfig":
        """Turns the configuration of a plain checkpoint into the Multiverse one of the same architecture.

        Raises:
            ValueError: if the architecture is not supported.
        """
        # By model type too: a configuration that came through remote code has a class of its own.
        ours = {each.model_type for each in CONFIG_CLASSES.values()}
        if isinstance(config, MultiverseConfig) or config.model_type in ours:
            return config  # type: ignore[return-value]
        config_class = CONFIG_CLASSES.get(config.model_type)
        if config_class is None:
            raise ValueError(
                f"`config.model_type` is {config.model_type!r}, which has no Multiverse class. Supported base "
                f"architectures: {sorted(CONFIG_CLASSES)}."
            )
        fields = config.to_dict()
        for key in ("model_type", "architectures", "auto_map", "transformers_version"):
            fields.pop(key, None)
        converted = config_class(**fields)
        converted._name_or_path = config._name_or_path
        # `dtype` is how the checkpoint was saved, the attention choice is how the caller wants to run it: keep both.
        converted._attn_implementation = config._attn_implementation
        return converted

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in the parent, with a card, and code that others load the checkpoint with (`trust_remote_code=True`)."""
        name = type(self).__name__.removesuffix("Config")
        if self.write_beside(save_directory):
            self.auto_map = {  # type: ignore[misc]
                "AutoConfig": f"configuration_multiverse.{name}Config",
                "AutoModel": f"modeling_multiverse.{name}Model",
                "AutoModelForCausalLM": f"modeling_multiverse.{name}ForCausalLM",
            }
        super().save_pretrained(save_directory, *args, **kwargs)

    def write_beside(self, folder: str | os.PathLike, name: str | None = None) -> bool:
        """Lets `folder_writer` write code and card, under the name of the model; returns whether there was anything to
        write: subclasses of users are theirs to publish."""
        if MultiverseConfig.folder_writer is None or type(self) not in CONFIG_CLASSES.values():
            return False
        MultiverseConfig.folder_writer(folder, self, name)
        return True

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in the parent, but the plain configuration of the same architecture counts as one of this class."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if CONFIG_CLASSES.get(config_dict.get("model_type", "")) is cls:
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As `AutoConfig.from_pretrained`, for plain and Multiverse checkpoints of the supported architectures.

        Tags that a plain checkpoint's own tokenizer knows are named as `MultiverseForCausalLM.from_pretrained` does.
        """
        if cls is not MultiverseConfig:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        loaded = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = cls.from_base(loaded[0] if isinstance(loaded, tuple) else loaded)
        config = with_tags_of_checkpoint(config, pretrained_model_name_or_path, **kwargs)
        return (config, loaded[1]) if isinstance(loaded, tuple) else config


@strict
class MultiverseQwen2Config(MultiverseConfig, Qwen2Config):
    """`Qwen2Config` plus the fields of [`MultiverseConfig`]."""

    model_type = "multiverse_qwen2"


@strict
class MultiverseQwen3Config(MultiverseConfig, Qwen3Config):
    """`Qwen3Config` plus the fields of [`MultiverseConfig`]."""

    model_type = "multiverse_qwen3"


@strict
class MultiverseLlamaConfig(MultiverseConfig, LlamaConfig):
    """`LlamaConfig` plus the fields of [`MultiverseConfig`]."""

    model_type = "multiverse_llama"


#: Multiverse configuration class of every supported base `model_type`.
CONFIG_CLASSES: dict[str, type[MultiverseConfig]] = {
    "qwen2": MultiverseQwen2Config,
    "qwen3": MultiverseQwen3Config,
    "llama": MultiverseLlamaConfig,
}
