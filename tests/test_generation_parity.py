"""`generate()` draws from the logits of one forward pass (layout contract, section 6.2), alone and in a batch."""

import dataclasses

import pytest
import torch
from cases import TOLERANCE, both_modes, every_architecture
from decoding import (
    FORK_AND_END,
    MIXED,
    PROMPTS,
    Boost,
    both_ways,
    check_parity,
    check_structure,
    decode,
    real_tokens,
    text_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Sample, shuffled, trees, truncated
from tiny import EOS, from_strategy, tiny_ids, tiny_model


@both_ways
@every_architecture
@pytest.mark.parametrize("name", list(PROMPTS))
def test_logits_after_a_prompt_are_those_of_one_forward_pass(name: str, architecture: str, sampled: bool) -> None:
    model = tiny_model(architecture, seed=len(name))
    prompts = [tiny_ids(PROMPTS[name])]
    output = decode(model, prompts, Boost(), do_sample=sampled, suppress_tokens=[EOS], max_new_tokens=50)
    check_structure(output, prompts, 50, whole=True)
    assert check_parity(model, output, prompts) >= 10


@both_ways
@every_architecture
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])
def test_logits_of_a_padded_batch_are_those_of_one_forward_pass(
    dtype: torch.dtype, architecture: str, sampled: bool
) -> None:
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    blocks = 0
    for seed in range(2):
        model = tiny_model(architecture, dtype, seed)
        output = decode(model, prompts, FORK_AND_END, do_sample=sampled, seed=seed, max_new_tokens=90)
        check_structure(output, prompts, 90, whole=True)
        assert check_parity(model, output, prompts) >= 80
        blocks += sum(len(report.branches) > 3 for report in output.reports)
    assert blocks >= 2, "there is little to see without forks"


def test_logits_under_eager_attention_are_those_of_one_forward_pass() -> None:
    model = tiny_model(attention="eager")
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    output = decode(model, prompts, Boost())
    assert check_parity(model, output, prompts) >= 80


@both_modes
@pytest.mark.parametrize("max_path_tokens", [None, 1, 6, 11])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 5, 8, 13, 21, 34, 55])
def test_limits_cut_anywhere_without_changing_logits(
    max_new_tokens: int, max_path_tokens: int | None, parallel: bool
) -> None:
    prompts = [tiny_ids(text) for text in ("a", "b c", "d e f g", "<Think> h", "<Think> i </Think> j", "x 1 : y")]
    model = tiny_model(seed=max_new_tokens)
    options = {"max_new_tokens": max_new_tokens, "max_path_tokens": max_path_tokens, "parallel": parallel}
    output = decode(model, prompts, Boost(tags=4.0), do_sample=True, **options)
    check_structure(output, prompts, max_new_tokens, whole=True)
    check_parity(model, output, prompts)


@settings(deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(truncated(trees(60)) | shuffled(50), st.booleans())
def test_prompt_of_any_kind_is_continued_as_its_layout_says(sample: Sample, parallel: bool) -> None:
    prompt = from_strategy(sample.ids) or tiny_ids("a")
    model = tiny_model()
    output = decode(model, [prompt], FORK_AND_END, max_new_tokens=120, max_path_tokens=9, parallel=parallel)
    check_structure(output, [prompt], 120)
    check_parity(model, output, [prompt])


def test_logits_stay_right_when_the_cache_grows() -> None:
    prompts = [tiny_ids("a b"), tiny_ids(PROMPTS["after a goal"])]
    model = tiny_model()
    output = decode(model, prompts, Boost(), max_new_tokens=420, max_path_tokens=120, suppress_tokens=[EOS])
    assert [report.generated_tokens > 400 for report in output.reports] == [True, True]
    check_structure(output, prompts, 420, whole=True)
    check_parity(model, output, prompts)


def test_row_of_a_batch_is_what_it_is_alone() -> None:
    prompts = [tiny_ids(text) for text in PROMPTS.values()]
    model = tiny_model(seed=3)
    options = {"max_new_tokens": 70, "max_path_tokens": 12}
    together = decode(model, prompts, FORK_AND_END, **options)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], FORK_AND_END, **options)
        assert text_of(alone) == real_tokens(together, prompts, row)
        assert dataclasses.replace(alone.reports[0], seconds={}) == dataclasses.replace(
            together.reports[row], seconds={}
        )
