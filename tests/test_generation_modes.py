"""Parallel and sequential decoding: they write the same tokens, and where the mode is taken from."""

from pathlib import Path
from typing import Any

import torch
from decoding import FORK_AND_END, TWO_PATHS, Follow, Say, decode, real_tokens, text_of
from multiverse import MultiverseForCausalLM
from tiny import ARCHITECTURES, EOS, WORDS, goal, tiny_ids, tiny_model
from transformers import GenerationConfig, LogitsProcessorList


def test_both_modes_write_the_same_tokens() -> None:
    forked = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        model = tiny_model(ARCHITECTURES[seed % 3], seed=seed)
        lengths = torch.randint(1, 7, (10,), generator=generator).tolist()
        prompts = [torch.randint(WORDS["a"], 64, (length,), generator=generator).tolist() for length in lengths]
        outputs = [
            decode(model, prompts, FORK_AND_END, max_new_tokens=400, max_path_tokens=24, parallel=parallel)
            for parallel in (True, False)
        ]
        for row in range(len(prompts)):
            beside, alone = (output.reports[row] for output in outputs)
            assert alone.sequential_steps >= beside.sequential_steps
            asked = int(outputs[1].sampled[row].sum()) + sum(path.finish_reason == "eos" for path in alone.branches)
            assert beside.finish_reason == alone.finish_reason == "eos", "a budget may cut the modes at other places"
            assert real_tokens(outputs[0], prompts, row) == real_tokens(outputs[1], prompts, row)
            assert alone.sequential_steps == asked
            forked += len(beside.branches) > 1
    assert forked >= 60


def is_parallel(model: MultiverseForCausalLM, **options: Any) -> bool:
    """Whether the two paths of the script run side by side."""
    output = model.generate(
        torch.tensor([TWO_PATHS.ids[:1]]),
        logits_processor=LogitsProcessorList([Follow(TWO_PATHS)]),
        return_dict_in_generate=True,
        **options,
    )
    assert text_of(output) == TWO_PATHS.ids
    steps = output.reports[0].sequential_steps
    assert steps in (32, 35)
    return steps == 32


def test_mode_is_taken_from_the_call_then_the_configuration_then_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    assert is_parallel(model, max_new_tokens=100)
    assert is_parallel(model, generation_config=GenerationConfig(max_new_tokens=100, eos_token_id=EOS))
    assert not is_parallel(model, generation_config=GenerationConfig(max_new_tokens=100, parallel=False))

    model.generation_config.parallel = False
    assert not is_parallel(model, max_new_tokens=100)
    assert not is_parallel(model, generation_config=GenerationConfig(max_new_tokens=100, eos_token_id=EOS))
    assert is_parallel(model, max_new_tokens=100, parallel=True)
    assert model.generation_config.parallel is False, "a call leaves the model's configuration alone"


def test_mode_and_path_budget_survive_saving(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.parallel = False
    model.generation_config.max_path_tokens = 8
    model.save_pretrained(tmp_path)
    loaded = MultiverseForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.generation_config.parallel is False
    assert loaded.generation_config.max_path_tokens == 8
    prompts = [tiny_ids(f"a {goal(['b', 'c'])}")]
    output = decode(loaded, prompts, Say("x"), max_new_tokens=40)
    assert [branch.finish_reason for branch in output.reports[0].branches[1:]] == ["max_path_tokens"] * 2
    assert output.sequences.tolist() == decode(model, prompts, Say("x"), max_new_tokens=40).sequences.tolist()
    # Three answers in each path, one after the other; then the root's.
    root = output.reports[0].branches[0]
    assert output.reports[0].sequential_steps == int(output.sampled.sum())
    assert root.tokens == 40 - 2 * 9
