"""Sampling: seeds, frequencies, and several sequences for one prompt."""

import torch
from cases import both_modes
from decoding import FORK_AND_END, MIXED, PROMPTS, Boost, check_parity, check_structure, decode, real_tokens, text_of
from tiny import TOKEN_IDS, tiny_ids, tiny_model

ROWS = [tiny_ids(PROMPTS[name]) for name in MIXED]


def test_sampling_repeats_with_the_global_seed() -> None:
    model = tiny_model()
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(decode(model, ROWS, Boost(), do_sample=True, seed=None).sequences.tolist())
    assert rows[0] == rows[1] != rows[2]


@both_modes
def test_seed_of_a_row_holds_whatever_else_is_in_the_batch(parallel: bool) -> None:
    model = tiny_model(dtype=torch.float64)
    # Every row comes to its own end: a budget would cut different tokens in the two modes.
    options = {"do_sample": True, "max_new_tokens": 900}
    together = decode(model, ROWS, FORK_AND_END, seed=[5, 40, 7, 5], **options)
    counted = decode(model, ROWS, FORK_AND_END, seed=5, **options)
    assert {report.finish_reason for report in together.reports} == {"eos"}
    for row, seed in enumerate((5, 40, 7, 5)):
        alone = decode(model, ROWS[row : row + 1], FORK_AND_END, seed=seed, parallel=parallel, **options)
        assert text_of(alone) == real_tokens(together, ROWS, row)
        same = real_tokens(counted, ROWS, row) == text_of(alone)
        assert same == (seed == 5 + row)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    model = tiny_model()
    draws = 4000
    # A single token leaves no room for a block, and closes the row instead of being written.
    options = {"max_new_tokens": 1, "suppress_tokens": list(TOKEN_IDS.values())}
    output = decode(model, ROWS[:1], do_sample=True, num_return_sequences=draws, top_k=0, **options)
    start = len(ROWS[0])
    found = torch.bincount(output.sequences[:, start], minlength=model.config.vocab_size) / draws
    expected = decode(model, ROWS[:1], output_scores=True, **options).scores[0][0].softmax(-1)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= 5 * deviation + 1e-9).all()


@both_modes
def test_log_probabilities_are_those_of_one_forward_pass(parallel: bool) -> None:
    model = tiny_model(dtype=torch.float64)
    output = decode(model, ROWS, Boost(), do_sample=True, parallel=parallel, temperature=0.7)
    for row in range(len(ROWS)):
        chosen = output.sequences[row][output.sampled[row]]
        expected = output.logits[row].double().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        assert torch.allclose(output.logprobs[row][output.sampled[row]], expected, atol=1e-6, rtol=0)
        assert output.logprobs[row][~output.sampled[row]].isnan().all()
    # `check_parity` holds these logits against a forward pass.
    assert check_parity(model, output, ROWS) >= 40


def test_several_sequences_are_drawn_for_one_prompt() -> None:
    model = tiny_model()
    prompt = tiny_ids(PROMPTS["after a goal"])
    output = decode(model, [prompt], Boost(), do_sample=True, num_return_sequences=3)
    check_structure(output, [prompt] * 3, 60, whole=True)
    check_parity(model, output, [prompt] * 3)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 3
