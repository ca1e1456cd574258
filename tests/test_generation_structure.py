"""What decoding writes by itself: headers and labels of paths, closing tags, and the flag on forced tokens."""

import pytest
import torch
from cases import both_modes
from decoding import (
    FORK_AND_END,
    MIXED,
    NESTED,
    PROMPTS,
    TWO_PATHS,
    Follow,
    Say,
    check_parity,
    check_structure,
    continuation,
    decode,
    follow,
    forced_in,
    layout_of,
    real_tokens,
    text_of,
)
from multiverse.forced import HeaderTokens, forced_token_mask
from tiny import ARCHITECTURES, DIGITS, EOS, TOKEN_IDS, WORDS, Script, goal, tiny_ids, tiny_model


@both_modes
@pytest.mark.parametrize(("script", "starts"), [(TWO_PATHS, [1]), (NESTED, [1, 81])], ids=["two paths", "nested"])
def test_scripted_text_is_returned_with_its_forced_tokens(script: Script, starts: list[int], parallel: bool) -> None:
    model = tiny_model()
    output = follow(script, model=model, parallel=parallel)
    assert text_of(output) == script.ids
    assert forced_in(output, 1) == script.forced
    assert output.reports[0].finish_reason == "eos"
    assert [block.start for block in output.blocks[0]] == starts
    check_structure(output, [script.ids[:1]], 500, whole=True)
    check_parity(model, output, [script.ids[:1]])


@pytest.mark.parametrize(
    ("outlines", "labels"),
    [
        (["_ 1 : a", "_ 2 : b"], ["1", "2"]),
        (["5 : a", "3 : b"], ["5", "3"]),
        (["a", "b", "c"], ["1", "2", "3"]),
        (["a", "7 : b", "c"], ["1", "7", "3"]),
        (["2 . 1 : a", "2 . 2 : b"], ["2.1", "2.2"]),
        (["4 : a"] * 3, ["4", "4", "4"]),
        (["1 0 : a", "9 9 . 1 2 : b"], ["10", "99.12"]),
        ([f"{' '.join(str(number))} : a" for number in range(1, 21)], [str(number) for number in range(1, 21)]),
        (["a"] * 20, [str(number) for number in range(1, 21)]),
    ],
)
def test_goal_forks_one_path_per_outline_with_its_own_label(outlines: list[str], labels: list[str]) -> None:
    paths = [f"<Path>* _* {' '.join(f'{piece}*' for piece in label)} :* x </Path> _*" for label in labels]
    script = Script(f"a {goal(outlines)} _* {' '.join(paths)} <Conclusion>* y </Conclusion> </Parallel> $")
    output = follow(script)
    assert text_of(output) == script.ids
    assert forced_in(output, 1) == script.forced
    assert [branch.label for branch in output.reports[0].branches] == ["", *labels]
    # All paths run side by side: `x </Path>`; after them `y </Conclusion> </Parallel> $`.
    assert output.reports[0].sequential_steps == len(tiny_ids(goal(outlines))) + 2 + 4


def test_end_of_sequence_inside_a_path_closes_it_and_is_not_written() -> None:
    output = follow(NESTED)
    ids = text_of(output)
    assert ids.index(EOS) == len(ids) - 1
    branches = output.branch_ids[0].tolist()
    # Branches in linear order: root, 1, 2, 2.1, 2.7, 3, the conclusion's.
    for branch in (3, 5):
        own = [index for index, owner in enumerate(branches) if owner == branch]
        close = next(index for index in own if ids[index] == TOKEN_IDS["</Path>"])
        assert not output.sampled[0, close]
        assert output.sampled[0, close - 1]


def test_any_of_several_end_tokens_closes_a_path_and_ends_the_request() -> None:
    other = WORDS["z"]

    class FollowToOther(Follow):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept = super().__call__(input_ids, scores)
            kept[:, other] = kept[:, EOS]
            kept[:, EOS] = -torch.inf
            return kept

    output = decode(
        tiny_model(), [NESTED.ids[:1]], FollowToOther(NESTED), eos_token_id=[EOS, other], max_new_tokens=500
    )
    assert text_of(output) == [*NESTED.ids[:-1], other]
    assert forced_in(output, 1) == NESTED.forced
    assert output.reports[0].finish_reason == "eos"


@both_modes
def test_path_budget_closes_paths_at_their_length(parallel: bool) -> None:
    prompt = tiny_ids(f"a {goal(['b', 'c'])}")
    options = {"max_path_tokens": 8, "max_new_tokens": 40, "parallel": parallel}
    output = decode(tiny_model(), [prompt], Say("x"), **options)
    path = "<Path> _ {} : x x x </Path> _"
    closed = f"_ {path.format(1)} {path.format(2)} <Conclusion>"
    assert text_of(output)[len(prompt) :][: len(tiny_ids(closed))] == tiny_ids(closed)
    report = output.reports[0]
    assert [branch.finish_reason for branch in report.branches] == [None, "max_path_tokens", "max_path_tokens"]
    assert report.finish_reason == "length"
    # The root, which has no such budget, goes on to the end of the request's.
    assert report.generated_tokens == 40
    assert text_of(output)[-3:] == tiny_ids("x </Conclusion> </Parallel>")


def test_paths_that_the_request_cut_off_have_no_reason_of_their_own() -> None:
    prompt = tiny_ids(f"a {goal(['b', 'c'])}")
    report = decode(tiny_model(), [prompt], Say("x"), max_new_tokens=20).reports[0]
    assert report.finish_reason == "length"
    assert [branch.finish_reason for branch in report.branches] == [None, None, None]


def test_flag_is_false_exactly_on_forced_tokens() -> None:
    header = HeaderTokens([WORDS["_"]], {**DIGITS, ".": WORDS["."], ":": WORDS[":"]})
    blocks = 0
    for seed in range(4):
        model = tiny_model(ARCHITECTURES[seed % 3], seed=seed)
        prompts = [tiny_ids(text) for text in ("a", "b c", "d e f", "g h i j", *map(PROMPTS.get, MIXED))]
        output = decode(model, prompts, FORK_AND_END, max_new_tokens=400, max_path_tokens=30)
        for row, prompt in enumerate(prompts):
            if output.reports[row].finish_reason != "eos":
                continue
            start, end = continuation(output, prompts, row)
            ids = real_tokens(output, prompts, row)
            layout = layout_of(ids)
            expected = forced_token_mask(layout, ids, header)
            reasons = [branch.finish_reason for branch in output.reports[row].branches]
            assert len(reasons) == len(layout.compatible)
            for index, branch in enumerate(layout.branch_ids.tolist()):
                # In the text, a path that the engine closed looks like any other.
                if ids[index] == TOKEN_IDS["</Path>"] and reasons[branch] in ("eos", "max_path_tokens"):
                    expected[index] = True
            blocks += len(reasons) > 1
            assert (~output.sampled[row, start:end]).tolist() == expected[len(prompt) :].tolist()
    assert blocks >= 20
