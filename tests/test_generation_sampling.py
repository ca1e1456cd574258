"""Sampling: seeds, and several sequences for one prompt."""

import torch
from decoding import MIXED, PROMPTS, Boost, check_parity, check_structure, decode
from tiny import tiny_ids, tiny_model


def test_sampling_repeats_with_its_seed() -> None:
    model = tiny_model()
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(decode(model, prompts, Boost(), do_sample=True).sequences.tolist())
    assert rows[0] == rows[1] != rows[2]


def test_several_sequences_are_drawn_for_one_prompt() -> None:
    model = tiny_model()
    prompt = tiny_ids(PROMPTS["after a goal"])
    output = decode(model, [prompt], Boost(), do_sample=True, num_return_sequences=3)
    check_structure(output, [prompt] * 3, 60, whole=True)
    check_parity(model, output, [prompt] * 3)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
