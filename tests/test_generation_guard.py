"""The structure guard: whatever a model would like to say, what it writes is well-formed."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from cases import both_modes, quick_collection  # noqa: F401
from decoding import Boost, decode, layout_of, padded, real_tokens
from tiny import EOS, TOKEN_IDS, WORDS, tiny_ids, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList

#: What a prompt itself leaves malformed is not the model's to mend.
SOUND = [tiny_ids(text) for text in ("a b c", "d", "<Parallel>", "e <Parallel> _ <Goal> _ <Outline> f")]


def test_thousand_hot_generations_are_well_formed() -> None:
    """Random weights at temperature 1.5, with limits of every kind: no structure problem in any of them."""
    blocks = reasons = 0
    for batch in range(25):
        model = tiny_model(("llama", "qwen2", "qwen3")[batch % 3], torch.float32, seed=batch, num_hidden_layers=1)
        prompts = [SOUND[(batch + row) % len(SOUND)] for row in range(40)]
        output = decode(
            model,
            prompts,
            Boost(1.0 + batch % 4),
            do_sample=True,
            temperature=1.5,
            seed=1000 * batch,
            max_new_tokens=(30, 60, 90)[batch % 3],
            max_path_tokens=(None, 9, 20)[batch % 3],
            max_sequential_steps=(None, 25)[batch % 2],
            max_depth=(1, 2, 8)[batch % 3],
            max_paths=(64, 2)[batch % 2],
        )
        for row, report in enumerate(output.reports):
            layout = layout_of(real_tokens(output, prompts, row))
            assert not layout.problems
            blocks += len(layout.blocks)
            reasons += report.finish_reason != "eos"
    assert blocks > 500
    assert 100 < reasons < 1000, "ends of every kind"


class Obsessed(LogitsProcessor):
    """Wants the same few tokens at every place, chosen by the first word of the text, allowed there or not."""

    def __init__(self, **wishes: list[int]) -> None:
        self.wishes = {WORDS[word]: token_ids for word, token_ids in wishes.items()}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.wishes[int(input_ids[0, 0])]] += 1000.0
        return scores


@both_modes
@pytest.mark.parametrize("tag", [*TOKEN_IDS, "$"])
def test_no_tag_comes_where_it_must_not(tag: str, parallel: bool) -> None:
    others = {"x": [], "y": tiny_ids("<Parallel>"), "z": tiny_ids("<Outline> </Goal>")}
    obsessed = Obsessed(**{word: [WORDS[tag], *more] for word, more in others.items()})
    prompts = [[WORDS[word], *prompt] for word in others for prompt in SOUND]
    output = decode(tiny_model(num_hidden_layers=1), prompts, obsessed, parallel=parallel, max_new_tokens=120)
    for row in range(len(prompts)):
        assert not layout_of(real_tokens(output, prompts, row)).problems


def test_tags_that_a_prompt_talks_about_do_not_bind_the_model() -> None:
    output = decode(tiny_model(), [tiny_ids("a <Think> <Goal> <Outline> b")], Obsessed(a=[EOS]))
    assert output.sequences[0].tolist()[-1] == EOS
    assert output.reports[0].generated_tokens == 1


def _resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("quick_collection")
def test_five_hundred_requests_leave_no_memory_behind() -> None:
    model = tiny_model(dtype=torch.float32)
    memory, made = [], 0
    for batch in range(32):
        prompts = [SOUND[(batch + row) % len(SOUND)] for row in range(16)]
        output = model.generate(
            **padded(prompts),
            logits_processor=LogitsProcessorList([Boost(2.0)]),
            do_sample=True,
            temperature=1.5,
            seed=batch,
            max_new_tokens=100,
            max_path_tokens=20,
            max_depth=1 + batch % 2,
            return_dict_in_generate=True,
        )
        for row, report in enumerate(output.reports):
            assert not layout_of(real_tokens(output, prompts, row)).problems
            assert report.generated_tokens <= 100
            # A path waits for the block that it holds, and then may be longer.
            assert batch % 2 or all(branch.tokens <= 21 for branch in report.branches[1:])
            made += report.generated_tokens
        del output
        gc.collect()
        memory.append(_resident())
    assert made > 10_000
    later = memory[len(memory) // 2 :]
    assert max(later) <= 1.05 * min(later)
