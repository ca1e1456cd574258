"""Packed linear layers: the same numbers, never stale, gone when decoding is over."""

import pytest
import torch
from decoding import FORK_AND_END, MIXED, PROMPTS, check_parity, decode
from multiverse import MultiverseForCausalLM
from multiverse.generation import packed_linear
from multiverse.generation.packed_linear import can_pack, packed_forwards, worth_packing
from tiny import tiny_ids, tiny_model

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]

pytestmark = pytest.mark.skipif(not can_pack(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def pack_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_LEAST_ELEMENTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product on packed weights."""
    rows: list[int] = []
    plain = packed_linear._forward

    def forward(module, packed):
        run = plain(module, packed)

        def counted(inputs):
            rows.append(inputs.shape[-2])
            return run(inputs)

        return counted

    monkeypatch.setattr(packed_linear, "_forward", forward)
    return rows


def test_packed_layers_decode_the_same(calls: list[int]) -> None:
    model = tiny_model(dtype=torch.float32)
    packed = decode(model, ROWS, FORK_AND_END, pack_linears=True, max_new_tokens=90)
    # Four products in each attention, three in each MLP, and the head.
    assert len(calls) % (7 * model.config.num_hidden_layers + 1) == 0
    assert len(calls) > 500
    check_parity(model, packed, ROWS)
    plain = decode(model, ROWS, FORK_AND_END, pack_linears=False, max_new_tokens=90)
    assert packed.sequences.tolist() == plain.sequences.tolist()


def test_any_change_of_a_weight_is_noticed() -> None:
    model = tiny_model(dtype=torch.float32)
    layer = model.model.layers[1].mlp.up_proj
    inputs = torch.randn(3, layer.in_features)
    for change in ("data", "in place", "replaced", "none"):
        before = packed_forwards(model)[layer](inputs)
        if change == "data":
            layer.weight.data[3, 5] += 1.0  # what autograd's version counter does not see
        elif change == "in place":
            with torch.no_grad():
                layer.weight.mul_(1.5)
        elif change == "replaced":
            layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.25)
        after = packed_forwards(model)[layer](inputs)
        assert torch.allclose(after, layer(inputs), atol=1e-5)
        assert torch.equal(before, after) == (change == "none")


def test_model_is_itself_again_after_decoding() -> None:
    model = tiny_model(dtype=torch.float32)
    decode(model, ROWS, FORK_AND_END, pack_linears=True, max_new_tokens=40)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    model(input_ids=torch.tensor(ROWS[:1]), labels=torch.tensor(ROWS[:1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_long_inputs_take_the_plain_product() -> None:
    model = tiny_model(dtype=torch.float32)
    layer = model.lm_head
    inputs = torch.randn(1, 200, layer.in_features)
    assert torch.equal(packed_forwards(model)[layer](inputs), layer(inputs))


def test_only_what_can_be_packed_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not packed_forwards(tiny_model(dtype=torch.float64))
    assert not worth_packing(tiny_model(dtype=torch.float64))
    model: MultiverseForCausalLM = tiny_model(dtype=torch.float32)
    assert worth_packing(model)
    monkeypatch.setattr(packed_linear, "_free_memory", lambda: 1000)
    assert not worth_packing(model)


def test_request_for_packing_without_onednn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiverse.generation.arguments.can_pack", lambda: False)
    with pytest.raises(ValueError, match="`pack_linears`"):
        decode(tiny_model(dtype=torch.float32), ROWS, pack_linears=True)
