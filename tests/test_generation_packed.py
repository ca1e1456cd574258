"""Packed linear layers: the same numbers, never stale, gone when decoding is over."""

import pytest
import torch
from decoding import FORK_AND_END, MIXED, PROMPTS, check_parity, decode
from multiverse import MultiverseForCausalLM
from multiverse.generation import packed_linear
from multiverse.generation.packed_linear import packed_forwards, worth_packing
from tiny import tiny_ids, tiny_model

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]

# By the build alone: where oneDNN is there but its operators have another name, the tests fail.
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def pack_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_LEAST_ELEMENTS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product on packed weights."""
    rows: list[int] = []
    plain = packed_linear._SharedInput._forward

    def forward(self, number, start, end):
        run = plain(self, number, start, end)

        def counted(inputs):
            rows.append(inputs.shape[-2])
            return run(inputs)

        return counted

    monkeypatch.setattr(packed_linear._SharedInput, "_forward", forward)
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
    for change in ("data", "in place", "rows", "replaced", "none"):
        before = packed_forwards(model)[layer](inputs)
        if change == "data":
            layer.weight.data[3, 5] += 1.0  # what autograd's version counter does not see
        elif change == "in place":
            with torch.no_grad():
                layer.weight.mul_(1.5)
        elif change == "rows":
            layer.weight.data[[0, 1]] = layer.weight.data[[1, 0]]
        elif change == "replaced":
            layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.25)
        after = packed_forwards(model)[layer](inputs)
        assert torch.allclose(after, layer(inputs), atol=1e-5)
        assert torch.equal(before, after) == (change == "none")


@pytest.mark.parametrize("order", ["qkv", "kqv", "vkq", "qk", "qqkv"])
def test_layers_that_share_an_input_give_their_own_product(order: str) -> None:
    """Whatever the order of the calls, and whatever comes between them."""
    model = tiny_model("qwen2", dtype=torch.float32)
    attention = model.model.layers[0].self_attn
    layers = {name: getattr(attention, f"{name}_proj") for name in "qkv"}
    for layer in layers.values():
        torch.nn.init.normal_(layer.bias)  # as a checkpoint of Qwen2 has them
    forwards = packed_forwards(model)
    inputs, others = torch.randn(2, 1, 3, attention.q_proj.in_features)
    for name in order:
        for given in (inputs, inputs, others, inputs):
            assert torch.allclose(forwards[layers[name]](given), layers[name](given), atol=1e-5)
    for name in order:
        assert torch.allclose(forwards[layers[name]](inputs), layers[name](inputs), atol=1e-5)


def test_layers_that_share_an_input_run_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = (model := tiny_model(dtype=torch.float32)).model.layers[0].self_attn
    forwards = packed_forwards(model)
    products: list[int] = []
    pointwise = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: products.append(args[0].shape[-2]) or pointwise(*args)
    )
    inputs = torch.randn(1, 3, attention.q_proj.in_features)
    outputs = [forwards[layer](inputs) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert products == [3]
    assert [output.shape[-1] for output in outputs] == [32, 16, 16]


@pytest.mark.parametrize(("vendor", "dtype", "packed"), [
    ("GenuineIntel", torch.float32, [3, 4]),
    ("GenuineIntel", torch.bfloat16, [1, 2, 3, 4]),
    ("AuthenticAMD", torch.float32, [1, 2, 3, 4]),
    ("", torch.float32, [1, 2, 3, 4]),
])  # fmt: skip
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of torch has no MKL")
def test_few_rows_are_packed_only_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, vendor: str, dtype: torch.dtype, packed: list[int]
) -> None:
    monkeypatch.setattr(packed_linear, "_vendor", lambda: vendor)
    attention = (model := tiny_model(dtype=dtype)).model.layers[0].self_attn
    forwards = packed_forwards(model)
    products: list[int] = []
    pointwise = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: products.append(args[0].shape[-2]) or pointwise(*args)
    )
    for rows in (1, 2, 3, 4):
        inputs = torch.randn(1, rows, attention.q_proj.in_features, dtype=dtype)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert torch.allclose(
                forwards[layer](inputs), layer(inputs), atol=1e-5 if dtype == torch.float32 else 1e-2
            )
    assert products == packed


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
