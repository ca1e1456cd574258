"""Decode steps filled up to a few sizes: the same texts, no slot more, and nothing but these sizes."""

import pytest
import torch
from decoding import FORK_AND_END, MIXED, PROMPTS, check_parity, check_structure, decode
from multiverse.generation.arguments import fills_steps
from multiverse.generation.model_step import filled_up
from tiny import tiny_ids, tiny_model

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]


def test_sizes() -> None:
    sizes = [filled_up(tokens) for tokens in range(1, 200)]
    assert all(size >= tokens for tokens, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert set(sizes) == {1, 2, 4, 8, 16, 32, 64, 128, 192, 256}
    # No more is wasted than half a step, or 63 tokens of a large one.
    assert all(size < 2 * tokens or size - tokens < 64 for tokens, size in enumerate(sizes, start=1))


@pytest.mark.parametrize(
    ("architecture", "attention", "options"),
    [
        ("llama", "sdpa", {"decode_attention": "folded"}),
        ("qwen2", "eager", {"decode_attention": "model"}),
        ("qwen3", "sdpa", {"decode_attention": "folded", "do_sample": True}),
        ("llama", "sdpa", {"decode_attention": "path_decode", "max_new_tokens": 24}),
    ],
    ids=["folded", "eager", "sampled", "path_decode"],
)
def test_filled_steps_decode_the_same(architecture: str, attention: str, options: dict) -> None:
    options = {"max_new_tokens": 90, **options}
    # The interpreter of the kernels is slow.
    size = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    fields = size if options["decode_attention"] == "path_decode" else {}
    model = tiny_model(architecture, dtype=torch.float32, attention=attention, **fields)
    lengths: list[tuple[int, int]] = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, output: lengths.append((kwargs["input_ids"].shape[1], output.logits.shape[1])),
        with_kwargs=True,
    )
    plain = decode(model, ROWS, FORK_AND_END, **options, static_shapes=False)
    needed, lengths[:] = list(lengths), []
    filled = decode(model, ROWS, FORK_AND_END, **options, static_shapes=True)
    hook.remove()
    assert filled.sequences.tolist() == plain.sequences.tolist()
    # The prompt runs as it is; every step after it in the next of the sizes, and so do the logits.
    assert lengths[0] == needed[0]
    assert lengths[1:] == [(filled_up(tokens), filled_up(tokens)) for tokens, _ in needed[1:]]
    assert len({tokens for tokens, _ in needed[1:]}) > len({tokens for tokens, _ in lengths[1:]})
    check_parity(model, filled, ROWS)
    check_structure(filled, ROWS, options["max_new_tokens"])
    for one, other in zip(filled.reports, plain.reports, strict=True):
        assert one.kv_slots == other.kv_slots


def test_automatic_on_a_gpu_only() -> None:
    assert fills_steps(None, torch.device("cuda"))
    assert not fills_steps(None, torch.device("cpu"))
    assert fills_steps(True, torch.device("cpu"))
    assert not fills_steps(False, torch.device("cuda"))


def test_bad_value_is_named() -> None:
    with pytest.raises(ValueError, match="`static_shapes`"):
        decode(tiny_model(), ROWS, static_shapes="yes")
