"""Loading and saving: plain checkpoints in, Multiverse checkpoints out and in again, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from cases import every_architecture
from multiverse import (
    MultiverseConfig,
    MultiverseForCausalLM,
    MultiverseLlamaConfig,
    MultiverseLlamaForCausalLM,
    MultiverseLlamaModel,
    MultiverseQwen2Config,
    MultiverseQwen2ForCausalLM,
    MultiverseQwen2Model,
    MultiverseQwen3Config,
    MultiverseQwen3ForCausalLM,
    MultiverseQwen3Model,
)
from tiny import ARCHITECTURES, DIGITS, FIRST_WORD, NEWLINE, TOKEN_IDS, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

BASES = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM}
CONFIGS = {"qwen2": MultiverseQwen2Config, "qwen3": MultiverseQwen3Config, "llama": MultiverseLlamaConfig}
BACKBONES = {"qwen2": MultiverseQwen2Model, "qwen3": MultiverseQwen3Model, "llama": MultiverseLlamaModel}
MODELS = {
    "qwen2": MultiverseQwen2ForCausalLM,
    "qwen3": MultiverseQwen3ForCausalLM,
    "llama": MultiverseLlamaForCausalLM,
}
UNSUPPORTED = {
    "gpt2": GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64),
    "mistral": MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    ),
}

tied_and_untied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
every_unsupported = pytest.mark.parametrize("config", list(UNSUPPORTED.values()), ids=list(UNSUPPORTED))
every_wrong_pair = pytest.mark.parametrize(("architecture", "other"), list(itertools.permutations(ARCHITECTURES, 2)))

WORDS = torch.arange(FIRST_WORD, FIRST_WORD + 12)[None]
_TAGS = ("<Parallel>", "<Goal>", "<Outline>", "</Outline>", "</Goal>", "<Path>", "</Path>", "<Path>", "</Path>")
_TAGS += ("<Conclusion>", "</Conclusion>", "</Parallel>")
TAGGED = torch.tensor([[token_id for tag in _TAGS for token_id in (TOKEN_IDS[tag], NEWLINE, FIRST_WORD + len(tag))]])


def plain_checkpoint(folder: Path, architecture: str, **fields) -> PreTrainedModel:
    """Saves a plain model with random weights (norms and biases included) and returns it."""
    torch.manual_seed(0)
    base = BASES[architecture](tiny_config(architecture, **fields)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    base.save_pretrained(folder)
    return base


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=input_ids).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    assert torch.isfinite(one).all()
    return (one - other).abs().max().item()


def assert_same_weights(one: PreTrainedModel, other: PreTrainedModel) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


# --- Plain checkpoints -----------------------------------------------------------------------------------------------


@every_architecture
@tied_and_untied
def test_plain_checkpoint_loads_as_it_is(tmp_path: Path, architecture: str, tied: bool) -> None:
    base = plain_checkpoint(tmp_path, architecture, tie_word_embeddings=tied)
    model, report = MultiverseForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(model) is MODELS[architecture]
    assert type(model.model) is BACKBONES[architecture]
    assert type(model.config) is type(model.model.config) is CONFIGS[architecture]
    assert model.config.model_type == f"multiverse_{architecture}"
    assert model.config.multiverse_token_ids is None
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same_weights(model, base)
    base = BASES[architecture].from_pretrained(tmp_path)
    assert difference(logits_of(model, WORDS), logits_of(base, WORDS)) == 0.0


@every_architecture
def test_class_of_the_architecture_loads_its_plain_checkpoint(tmp_path: Path, architecture: str) -> None:
    base = plain_checkpoint(tmp_path, architecture)
    model = MODELS[architecture].from_pretrained(tmp_path)
    assert type(model) is MODELS[architecture]
    assert_same_weights(model, base)


@every_architecture
def test_sharded_plain_checkpoint_loads(tmp_path: Path, architecture: str) -> None:
    base = plain_checkpoint(tmp_path / "whole", architecture)
    base.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same_weights(MultiverseForCausalLM.from_pretrained(tmp_path / "sharded"), base)


@every_architecture
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_chosen_as_in_the_base_class(tmp_path: Path, architecture: str, dtype: torch.dtype | None) -> None:
    plain_checkpoint(tmp_path, architecture)
    arguments = {} if dtype is None else {"dtype": dtype}
    model = MultiverseForCausalLM.from_pretrained(tmp_path, **arguments)
    base = BASES[architecture].from_pretrained(tmp_path, **arguments)
    assert model.dtype == base.dtype
    assert_same_weights(model, base)


@every_architecture
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementation_can_be_chosen(tmp_path: Path, architecture: str, attention: str) -> None:
    plain_checkpoint(tmp_path, architecture)
    model = MultiverseForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == model.model.config._attn_implementation == attention


@every_architecture
def test_configuration_fields_can_be_overridden_as_in_the_base_class(tmp_path: Path, architecture: str) -> None:
    plain_checkpoint(tmp_path, architecture)
    for model_class in (BASES[architecture], MultiverseForCausalLM, MODELS[architecture]):
        model = model_class.from_pretrained(tmp_path, attention_dropout=0.25)
        assert model.config.attention_dropout == 0.25


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_sliding_windows_can_be_turned_off_as_the_error_message_says(tmp_path: Path, architecture: str) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    base = plain_checkpoint(tmp_path, architecture, **fields)
    assert "sliding_attention" in base.config.layer_types
    model = MultiverseForCausalLM.from_pretrained(tmp_path, use_sliding_window=False)
    model.config.multiverse_token_ids = dict(TOKEN_IDS)
    assert logits_of(model, TAGGED).shape == (*TAGGED.shape, 64)


@every_architecture
def test_configuration_object_can_be_given(tmp_path: Path, architecture: str) -> None:
    base = plain_checkpoint(tmp_path, architecture)
    for config in (base.config, MultiverseConfig.from_base(base.config)):
        model = MultiverseForCausalLM.from_pretrained(tmp_path, config=config)
        assert type(model) is MODELS[architecture]
        assert_same_weights(model, base)


@every_architecture
def test_generation_settings_of_the_checkpoint_are_kept(tmp_path: Path, architecture: str) -> None:
    base = plain_checkpoint(tmp_path, architecture)
    base.generation_config.update(do_sample=True, top_k=7)
    base.generation_config.save_pretrained(tmp_path)
    assert MultiverseForCausalLM.from_pretrained(tmp_path).generation_config.top_k == 7


@every_architecture
def test_engine_settings_survive_saving_whatever_the_model_came_from(tmp_path: Path, architecture: str) -> None:
    plain_checkpoint(tmp_path / "plain", architecture)
    for before, after in (("plain", "first"), ("first", "second")):
        model = MultiverseForCausalLM.from_pretrained(tmp_path / before)
        if before == "plain":
            assert model.generation_config.parallel is True
            model.generation_config.update(parallel=False, max_path_tokens=20, max_depth=2)
        settings = [getattr(model.generation_config, name) for name in ("parallel", "max_path_tokens", "max_depth")]
        assert settings == [False, 20, 2]
        model.save_pretrained(tmp_path / after)


@every_architecture
def test_configuration_keeps_every_field_of_its_base(architecture: str) -> None:
    base = tiny_config(architecture, rms_norm_eps=1e-3, tie_word_embeddings=True, attention_dropout=0.1)
    before = base.to_dict()
    converted = MultiverseConfig.from_base(base)
    assert type(converted) is CONFIGS[architecture]
    assert base.to_dict() == before
    found = converted.to_dict()
    changed = {key for key in before if found.get(key) != before[key]}
    assert changed == {"model_type"}
    assert {key for key in found if key not in before} == {
        "multiverse_token_ids",
        "multiverse_separator_ids",
        "multiverse_label_ids",
    }
    assert MultiverseConfig.from_base(converted) is converted


@every_architecture
@pytest.mark.parametrize(
    "load",
    [
        lambda folder, architecture: MultiverseForCausalLM.from_pretrained(folder),
        lambda folder, architecture: MODELS[architecture].from_pretrained(folder),
        lambda folder, architecture: MultiverseConfig.from_pretrained(folder),
        # What PEFT does when it saves an adapter, to see whether the vocabulary has grown.
        lambda folder, architecture: CONFIGS[architecture].from_pretrained(folder),
    ],
    ids=["front door", "class", "configuration", "configuration class"],
)
def test_plain_checkpoint_loads_without_a_warning(
    tmp_path: Path, architecture: str, load, warnings_of_transformers: list[str]
) -> None:
    plain_checkpoint(tmp_path, architecture)
    loaded = load(tmp_path, architecture)
    assert (loaded if isinstance(loaded, PreTrainedConfig) else loaded.config).model_type.startswith("multiverse_")
    assert warnings_of_transformers == []


@every_wrong_pair
def test_configuration_of_another_architecture_is_still_warned_of(
    tmp_path: Path, architecture: str, other: str, warnings_of_transformers: list[str]
) -> None:
    tiny_config(architecture).save_pretrained(tmp_path)
    CONFIGS[other].from_pretrained(tmp_path)
    assert any("to instantiate a model of type" in message for message in warnings_of_transformers)


# --- Multiverse checkpoints ------------------------------------------------------------------------------------------


@every_architecture
@tied_and_untied
@pytest.mark.parametrize("loader", [MultiverseForCausalLM, AutoModelForCausalLM], ids=["front", "auto"])
def test_saved_model_is_the_same_after_loading(
    tmp_path: Path, architecture: str, tied: bool, loader, warnings_of_transformers: list[str]
) -> None:
    model = tiny_model(architecture, torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded, again = loader.from_pretrained(tmp_path), MODELS[architecture].from_pretrained(tmp_path)
    assert warnings_of_transformers == []
    assert type(loaded) is MODELS[architecture]
    assert type(loaded.model) is BACKBONES[architecture]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert_same_weights(loaded, model)
    for input_ids in (WORDS, TAGGED):
        assert difference(logits_of(loaded, input_ids), logits_of(again, input_ids)) == 0.0
        # Weights mapped from a file lie at other addresses, which can change the last bit of a product.
        assert difference(logits_of(loaded, input_ids), logits_of(model, input_ids)) <= 1e-5


@every_architecture
def test_auto_model_loads_the_backbone(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture, torch.float32)
    model.save_pretrained(tmp_path)
    loaded, whole = AutoModel.from_pretrained(tmp_path).eval(), MultiverseForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is BACKBONES[architecture]
    assert_same_weights(loaded, model.model)
    with torch.no_grad():
        found = loaded(input_ids=TAGGED).last_hidden_state
        assert difference(found, whole.model(input_ids=TAGGED).last_hidden_state) == 0.0


@every_architecture
@pytest.mark.parametrize("loader", [AutoConfig, MultiverseConfig, "class"], ids=["auto", "front", "own"])
def test_saved_configuration_is_the_same_after_loading(tmp_path: Path, architecture: str, loader) -> None:
    model = tiny_model(architecture, torch.float32)
    model.save_pretrained(tmp_path)
    loader = CONFIGS[architecture] if loader == "class" else loader
    config = loader.from_pretrained(tmp_path)
    assert type(config) is CONFIGS[architecture]
    assert config.model_type == f"multiverse_{architecture}"
    assert config.architectures == [MODELS[architecture].__name__]
    assert config.multiverse_token_ids == TOKEN_IDS
    assert config.multiverse_separator_ids == [NEWLINE]
    assert config.multiverse_label_ids == model.config.multiverse_label_ids
    assert config.multiverse_label_ids.items() >= DIGITS.items()


@every_architecture
def test_weights_are_saved_as_safetensors_only(tmp_path: Path, architecture: str) -> None:
    tiny_model(architecture, torch.float32).save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors"} <= files
    assert not {name for name in files if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"multiverse_{architecture}"


@every_architecture
def test_plain_checkpoint_with_tags_survives_saving_twice(tmp_path: Path, architecture: str) -> None:
    plain_checkpoint(tmp_path / "plain", architecture)
    model = MultiverseForCausalLM.from_pretrained(tmp_path / "plain")
    model.config.multiverse_token_ids = dict(TOKEN_IDS)
    expected = logits_of(model, TAGGED)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        model = MultiverseForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.multiverse_token_ids == TOKEN_IDS
        assert difference(logits_of(model, TAGGED), expected) <= 1e-5


# --- New models ------------------------------------------------------------------------------------------------------


@every_architecture
@tied_and_untied
def test_model_from_configuration_is_of_its_architecture(architecture: str, tied: bool) -> None:
    config = tiny_config(architecture, tie_word_embeddings=tied)
    converted = MultiverseConfig.from_base(config)
    base = BASES[architecture](config)
    for model in (
        MultiverseForCausalLM(config),
        MultiverseForCausalLM(config=config),
        MultiverseForCausalLM(converted),
        MODELS[architecture](config),
        AutoModelForCausalLM.from_config(converted),
    ):
        assert type(model) is MODELS[architecture]
        assert isinstance(model, MultiverseForCausalLM)
        assert isinstance(model, BASES[architecture])
        assert type(model.config) is CONFIGS[architecture]
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        assert shapes == {name: weight.shape for name, weight in base.state_dict().items()}
    assert config.model_type == architecture


# --- What is refused -------------------------------------------------------------------------------------------------


@every_unsupported
def test_unsupported_architecture_raises(tmp_path: Path, config: PreTrainedConfig) -> None:
    config.save_pretrained(tmp_path)
    for attempt in (
        lambda: MultiverseForCausalLM.from_pretrained(tmp_path),
        lambda: MultiverseForCausalLM.from_pretrained(tmp_path, config=config),
        lambda: MultiverseForCausalLM(config),
        lambda: MultiverseConfig.from_base(config),
        lambda: MultiverseConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=rf"`config\.model_type` is '{config.model_type}'.*qwen2"):
            attempt()


@every_wrong_pair
@pytest.mark.parametrize("saved", ["plain", "multiverse"])
def test_checkpoint_of_another_architecture_raises(tmp_path: Path, architecture: str, other: str, saved: str) -> None:
    if saved == "plain":
        plain_checkpoint(tmp_path, architecture)
    else:
        tiny_model(architecture, torch.float32).save_pretrained(tmp_path)
    message = rf"`pretrained_model_name_or_path` .*{architecture}.*{MODELS[other].__name__}"
    with pytest.raises(ValueError, match=message):
        MODELS[other].from_pretrained(tmp_path)


@every_wrong_pair
def test_configuration_of_another_architecture_raises(architecture: str, other: str) -> None:
    with pytest.raises(ValueError, match="`config"):
        MODELS[other](tiny_config(architecture))


@pytest.mark.parametrize("config", [None, "Qwen/Qwen2.5-0.5B", {}], ids=str)
def test_what_is_no_configuration_raises(config) -> None:
    with pytest.raises(ValueError, match="`config` must be a transformers configuration"):
        MultiverseForCausalLM(config)
