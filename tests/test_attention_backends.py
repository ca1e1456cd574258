"""Models under the attention implementations that take a `PathMask`, and the choice among backends."""

from functools import partial

import pytest
import torch
from forward import NESTED, OPEN_BLOCK, TWO_PATHS, WORDS, logits_of, pad, restarting, row
from multiverse.kernels import dense, dispatch
from multiverse.kernels.dense import DenseMask
from multiverse.kernels.dispatch import (
    AUTOMATIC,
    FLASH,
    PATH_MASK_ATTENTION,
    TRITON,
    automatic_backend,
    resolve_decode_attention,
)
from multiverse.kernels.flash_varlen import flash_varlen_attention
from test_kernels_flash_varlen import slow_varlen
from tiny import ARCHITECTURES, tiny_config, tiny_model
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}

every_path_mask_attention = pytest.mark.parametrize("attention", [AUTOMATIC, FLASH])


@pytest.fixture(autouse=True)
def flash_attention_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow function of flash-attn's contract in its place: the package needs a GPU."""
    monkeypatch.setattr(dispatch, "flash_varlen_attention", partial(flash_varlen_attention, varlen=slow_varlen))


def pair_of_models(attention: str, architecture: str = "llama", dtype: torch.dtype = torch.float64, **fields):
    """The same weights under `attention` and under `sdpa`."""
    model, other = (tiny_model(architecture, dtype, **fields) for _ in range(2))
    # Not `set_attn_implementation`, which asks for the package flash-attn.
    model.config._attn_implementation = attention
    return model, other


@every_path_mask_attention
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ids", [NESTED, TWO_PATHS, OPEN_BLOCK, WORDS], ids=["nested", "two", "open", "untagged"])
def test_logits_are_those_of_the_dense_mask(attention: str, architecture: str, ids: list[int]) -> None:
    model, other = pair_of_models(attention, architecture)
    assert torch.allclose(logits_of(model, row(ids)), logits_of(other, row(ids)), atol=1e-6)


@every_path_mask_attention
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [(NESTED, WORDS), (WORDS, WORDS[:5])], ids=["tagged", "untagged"])
def test_padding_changes_nothing(attention: str, side: str, rows: tuple) -> None:
    model, other = pair_of_models(attention)
    ids, mask = pad(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = logits_of(model, ids, attention_mask=mask, position_ids=positions)
    for found, real, alone in zip(logits, mask.bool(), rows, strict=True):
        assert torch.allclose(found[real], logits_of(other, row(alone))[0], atol=1e-6)


@every_path_mask_attention
@pytest.mark.parametrize("rows", [(NESTED, WORDS, TWO_PATHS), (WORDS, WORDS[:3])], ids=["tagged", "untagged"])
def test_packed_documents_are_by_themselves(attention: str, rows: tuple) -> None:
    model, other = pair_of_models(attention)
    ids = row([token for each in rows for token in each])
    logits = logits_of(model, ids, position_ids=restarting(rows))
    alone = torch.cat([logits_of(other, row(each)) for each in rows], dim=1)
    assert torch.allclose(logits, alone, atol=1e-6)


@every_path_mask_attention
@pytest.mark.parametrize("ids", [NESTED, WORDS], ids=["nested", "untagged"])
@pytest.mark.parametrize("cut", [1, 6, 9])
def test_cached_chunks_give_the_logits_of_one_pass(attention: str, ids: list[int], cut: int) -> None:
    model, other = pair_of_models(attention)
    cache = DynamicCache(config=model.config)
    parts = [logits_of(model, row(part), past_key_values=cache) for part in (ids[:cut], ids[cut:-1], ids[-1:])]
    assert torch.allclose(torch.cat(parts, dim=1), logits_of(other, row(ids)), atol=1e-6)


@pytest.mark.parametrize("ids", [TWO_PATHS, WORDS], ids=["two", "untagged"])
def test_training_step_through_the_triton_kernels(ids: list[int]) -> None:
    """Loss and every gradient, with gradient checkpointing too."""
    model, other = pair_of_models(TRITON, dtype=torch.float32, **SMALL)
    batch, mask = pad([ids, ids[:20]], "right")
    labels = batch.masked_fill(mask == 0, -100)
    results = []
    for each in (model, other):
        each.train()
        each.gradient_checkpointing_enable()
        loss = each(input_ids=batch, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in each.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        assert (found - expected).abs().max() <= 1e-5 * max(float(expected.abs().max()), 1.0)


@pytest.mark.parametrize("attention", ["sdpa", AUTOMATIC])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step_in_blocks_of_queries(
    attention: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "QUERY_BLOCK", 7)
    model, other = pair_of_models(attention)
    other.set_attn_implementation("eager")
    batch, mask = pad([NESTED, TWO_PATHS], "right")
    labels = batch.masked_fill(mask == 0, -100)
    results = []
    for each in (model, other):
        each.train()
        if checkpointing:
            each.gradient_checkpointing_enable()
        loss = each(input_ids=batch, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in each.parameters()]))
    # Eager attention of transformers takes its softmax in float32.
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        assert (found - expected).abs().max() <= 1e-6 * max(float(expected.abs().max()), 1.0)


@pytest.fixture
def blocked_calls(monkeypatch: pytest.MonkeyPatch) -> list[DenseMask]:
    """The masks of all calls of `dense_sdpa` that `sdpa` makes."""
    masks: list[DenseMask] = []
    plain = dispatch.dense_sdpa

    def spy(query, key, value, mask, scale=None):
        masks.append(mask)
        return plain(query, key, value, mask, scale)

    monkeypatch.setattr(dispatch, "dense_sdpa", spy)
    return masks


def test_all_layers_and_the_recomputed_ones_share_one_mask(blocked_calls: list[DenseMask]) -> None:
    model = tiny_model(dtype=torch.float32, num_hidden_layers=3).train()
    model.gradient_checkpointing_enable()
    loss = model(input_ids=row(NESTED), labels=row(NESTED)).loss
    (additive,) = blocked_calls[0]._additive.values()
    loss.backward()
    assert len(blocked_calls) == 6
    assert all(mask is blocked_calls[0] for mask in blocked_calls)
    assert [id(each) for each in blocked_calls[0]._additive.values()] == [id(additive)]


@pytest.mark.parametrize("how", ["dropout", "compiled", "cached token", "untagged"])
def test_sdpa_goes_to_transformers_where_blocks_do_not_serve(
    how: str, blocked_calls: list[DenseMask], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = pair_of_models("sdpa")
    ids, cache = WORDS if how == "untagged" else NESTED, None
    if how == "dropout":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train()
    elif how == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif how == "cached token":
        cache = DynamicCache(config=model.config)
        logits_of(model, row(ids[:-1]), past_key_values=cache)
        blocked_calls.clear()
    logits = logits_of(model, row(ids if cache is None else ids[-1:]), past_key_values=cache)
    assert not blocked_calls
    expected = logits_of(other, row(ids))[:, -logits.shape[1] :]
    assert bool(blocked_calls) == (how in ("dropout", "cached token"))
    assert torch.allclose(logits, expected, atol=1e-6) == (how != "dropout")


def test_sdpa_of_other_models_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM(tiny_config("llama")).eval()
    ids, mask = pad([WORDS, WORDS[:5]], "left")
    found = logits_of(plain, ids, attention_mask=mask)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    assert torch.equal(found, logits_of(plain, ids, attention_mask=mask))


@pytest.mark.parametrize("attention", PATH_MASK_ATTENTION)
def test_what_it_cannot_do_is_refused_by_name(attention: str) -> None:
    model, _ = pair_of_models(attention, dtype=torch.float32)
    ids = row(NESTED)
    four = torch.ones(1, 1, len(NESTED), len(NESTED), dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="`attention_mask`"):
        model(input_ids=ids, attention_mask=four, position_ids=torch.arange(len(NESTED))[None])
    for given in (NESTED, WORDS):
        with pytest.raises(ValueError, match="`past_key_values`"):
            model(input_ids=row(given), past_key_values=StaticCache(config=model.config, max_cache_len=200))
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        model.train()(input_ids=ids)


@pytest.mark.parametrize("attention", PATH_MASK_ATTENTION)
@pytest.mark.parametrize("ids", [NESTED, WORDS], ids=["nested", "untagged"])
def test_sliding_windows_are_refused_and_not_left_out(attention: str, ids: list[int]) -> None:
    model, _ = pair_of_models(attention, "qwen2")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding-window"):
        model(input_ids=row(ids))


@pytest.mark.parametrize("attention", [AUTOMATIC, TRITON])
def test_other_models_are_sent_elsewhere(attention: str) -> None:
    plain = LlamaForCausalLM(tiny_config("llama"))
    plain.set_attn_implementation(attention)
    with pytest.raises(ValueError, match=f"`attn_implementation` '{attention}'"):
        plain(input_ids=row(WORDS))


@pytest.mark.parametrize("attention", PATH_MASK_ATTENTION)
def test_embeddings_without_tokens_are_plain_text(attention: str) -> None:
    if attention == TRITON:
        model, other = pair_of_models(attention, dtype=torch.float32, **SMALL)
    else:
        model, other = pair_of_models(attention, dtype=torch.float32)
    embeddings = model.get_input_embeddings()(row(WORDS)).detach()
    assert torch.allclose(model(inputs_embeds=embeddings).logits, other(inputs_embeds=embeddings).logits, atol=1e-5)


def test_automatic_backend_goes_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "runs_triton", lambda device: device.type == "cuda")
    assert automatic_backend(GPU) == "triton"
    assert automatic_backend(CPU) == "dense"
    monkeypatch.setattr(dispatch, "runs_triton", lambda device: False)
    assert automatic_backend(GPU) == "dense"


@pytest.mark.parametrize(
    ("asked", "own", "device", "triton", "expected"),
    [
        ("auto", "sdpa", CPU, False, "folded"),
        ("auto", "sdpa", GPU, True, "path_decode"),
        ("auto", "sdpa", GPU, False, "folded"),
        ("auto", AUTOMATIC, CPU, False, "folded"),
        ("auto", AUTOMATIC, GPU, True, "path_decode"),
        ("auto", TRITON, GPU, True, "path_decode"),
        ("auto", FLASH, GPU, True, "path_decode"),
        ("auto", "eager", GPU, True, "eager"),
        ("auto", "flex_attention", CPU, False, "flex_attention"),
        ("model", "sdpa", GPU, True, "sdpa"),
        ("model", AUTOMATIC, CPU, False, "folded"),
        ("folded", "eager", GPU, True, "folded"),
        # Asked for by name, it is not replaced where it cannot run: its first step raises.
        ("path_decode", "sdpa", CPU, False, "path_decode"),
        ("model", TRITON, CPU, False, "path_decode"),
    ],
)
def test_decode_backend(
    asked: str, own: str, device: torch.device, triton: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "runs_triton", lambda device: triton)
    assert resolve_decode_attention(asked, own, device) == expected
