"""`generate()` through the Triton kernels, in the interpreter: the same texts and parity as by any other backend."""

import pytest
import torch
from decoding import (
    FORK_AND_END,
    PROMPTS,
    TWO_PATHS,
    Say,
    check_parity,
    check_structure,
    decode,
    follow,
    padded,
    text_of,
)
from multiverse.generation import attention
from multiverse.kernels import triton_support
from multiverse.kernels.dispatch import TRITON
from tiny import TOKEN_IDS, goal, tiny_ids, tiny_model
from transformers import DynamicCache

SMALL = {"dtype": torch.float32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
KERNEL = {"decode_attention": "path_decode"}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call of the decode kernel."""
    tokens: list[int] = []
    plain = attention.path_decode

    def counted(query, *args):
        tokens.append(len(query))
        return plain(query, *args)

    monkeypatch.setattr(attention, "path_decode", counted)
    return tokens


def test_script_is_decoded_through_the_kernel(launches: list[int]) -> None:
    model = tiny_model(**SMALL)
    output = follow(TWO_PATHS, 4, model=model, **KERNEL)
    assert text_of(output) == TWO_PATHS.ids
    check_parity(model, output, [TWO_PATHS.ids[:4]])
    # Everything but the prompt and the last token went through it, once per layer.
    assert sum(launches) == len(TWO_PATHS.ids) - 4 - 1


def test_mixed_batch_equals_the_folded_backend(launches: list[int]) -> None:
    names = ("plain", "after a path and its separator", "inside the first nested path")
    rows = [tiny_ids(PROMPTS[name]) for name in names]
    model = tiny_model("qwen2", **SMALL)
    options = {"max_new_tokens": 44, "max_path_tokens": 8}
    output = decode(model, rows, FORK_AND_END, **options, **KERNEL)
    folded = decode(model, rows, FORK_AND_END, **options)
    assert output.sequences.tolist() == folded.sequences.tolist()
    assert launches
    check_parity(model, output, rows)
    check_structure(output, rows, 44)


def test_more_branches_than_bits_in_a_word() -> None:
    """34 paths at once need a second word of bits."""
    prompt = tiny_ids("a " + goal("abcdefghijklmnopqrstuvwxyzabcdefgh"))
    model = tiny_model(**SMALL)
    output = decode(model, [prompt], Say("b"), max_new_tokens=290, max_path_tokens=6, **KERNEL)
    check_parity(model, output, [prompt])
    assert len(output.reports[0].branches) == 35
    assert max(output.reports[0].blocks[0].paths, key=lambda path: path.end).finish_reason == "max_path_tokens"


def test_second_turn_and_rest_of_a_cut_turn() -> None:
    rows = [tiny_ids(PROMPTS["after a goal"]), tiny_ids(PROMPTS["plain"])]
    model = tiny_model(**SMALL)
    cache = DynamicCache(config=model.config)
    first = decode(model, rows, FORK_AND_END, max_new_tokens=33, past_key_values=cache, **KERNEL)
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    turn = torch.tensor([tiny_ids("a b")] * 2)
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat([first.branch_ids >= 0, torch.ones(2, 2, dtype=torch.bool)], dim=1).long()
    options = {"attention_mask": mask, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    with_cache = model.generate(ids, past_key_values=cache, **options, **KERNEL)
    without = model.generate(ids, **options)
    assert with_cache.sequences.tolist() == without.sequences.tolist()
    for found, expected in zip(with_cache.logits, without.logits, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


def test_model_under_the_triton_implementation_decodes_through_it(launches: list[int]) -> None:
    model = tiny_model(attention=TRITON, **SMALL)
    prompt = tiny_ids(PROMPTS["after a goal"])
    output = decode(model, [prompt], FORK_AND_END, max_new_tokens=30)
    assert launches
    model.set_attn_implementation("sdpa")
    check_parity(model, output, [prompt])
    assert TOKEN_IDS["<Path>"] in output.sequences[0, len(prompt) :]


def test_named_backend_that_cannot_run_here_raises_and_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    with pytest.raises(ValueError, match="on the CPU, where Triton kernels do not run"):
        tiny_model(**SMALL).generate(**padded([tiny_ids("a b")]), max_new_tokens=3, **KERNEL)
    monkeypatch.setattr(triton_support, "triton", None)
    with pytest.raises(ImportError, match="package `triton`"):
        tiny_model(**SMALL).generate(**padded([tiny_ids("a b")]), max_new_tokens=3, **KERNEL)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        tiny_model().generate(**padded([tiny_ids("a b")]), max_new_tokens=3, **KERNEL)
