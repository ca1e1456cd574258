"""What logits processors and prefix functions are shown."""

from collections import Counter

import pytest
import torch
from cases import both_modes
from decoding import FORK_AND_END, PROMPTS, TWO_PATHS, Follow, decode, padded, text_of, visible_before
from tiny import TOKEN_IDS, WORDS, tiny_ids, tiny_model
from transformers import LogitsProcessor


class Record(LogitsProcessor):
    """Collects what processors are shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.tolist()
        return scores


def test_prefix_function_is_told_the_row() -> None:
    rows = set()

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        rows.add(row)
        return [WORDS["a"], WORDS["b"]] if row == 0 else [WORDS["c"]]

    model = tiny_model()
    given = padded([tiny_ids("x"), tiny_ids("y z")])
    sequences = model.generate(**given, prefix_allowed_tokens_fn=allowed, max_new_tokens=4)
    assert rows == {0, 1}
    assert set(sequences[1, 2:].tolist()) == {WORDS["c"]}


@both_modes
@pytest.mark.parametrize("name", list(PROMPTS))
def test_processors_see_what_the_branch_sees(name: str, parallel: bool) -> None:
    prompt = tiny_ids(PROMPTS[name])
    record = Record()
    output = decode(tiny_model(), [prompt], record, FORK_AND_END, max_new_tokens=300, parallel=parallel)
    ids = text_of(output)
    report = output.reports[0]
    assert report.finish_reason == "eos"
    # Where the answer was the end of sequence, the `</Path>` that stands for it is forced.
    ends = [
        index
        for index in range(len(prompt), len(ids))
        if ids[index] == TOKEN_IDS["</Path>"] and not output.sampled[0, index]
    ]
    assert len(ends) == sum(branch.finish_reason == "eos" for branch in report.branches)
    asked = [*output.sampled[0].nonzero().flatten().tolist(), *ends]
    assert Counter(map(tuple, record.seen)) == Counter(visible_before(ids, index) for index in asked)


def test_processors_are_called_for_one_branch_at_a_time() -> None:
    follower = Follow(TWO_PATHS)
    decode(tiny_model(), [TWO_PATHS.ids[:1]], follower, max_new_tokens=200)
    assert len(follower.asked) == 21 + 3 + 5 + 6
    siblings = [set(tiny_ids("d e")), set(tiny_ids("f g h"))]
    for history in follower.asked:
        if TOKEN_IDS["<Conclusion>"] not in history:
            assert not all(words & set(history) for words in siblings)
