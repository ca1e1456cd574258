"""The synthetic problems are right, well-formed, disjoint between splits, and the same for the same seed."""

import itertools
import re

import pytest
from multiverse import TAGS, BranchLayout
from multiverse.trainer.held_out import wilson_interval
from multiverse.trainer.synthetic import Problem, ProblemOptions, Sum, generate_problems, read_answer, train_and_test
from tiny import tiny_tokenizer

PROBLEMS = generate_problems(150, seed=3)


def lines_of(text: str) -> list[str]:
    """The content lines of a solution, tags and labels removed."""
    lines = [re.sub(r"^\d+(\.\d+)*: ", "", line) for line in text.splitlines() if line not in TAGS]
    inside_goal, kept = False, []
    for line in text.splitlines():
        inside_goal = {"<Goal>": True, "</Goal>": False}.get(line, inside_goal)
        if line not in TAGS and not inside_goal:
            kept.append(re.sub(r"^\d+(\.\d+)*: ", "", line))
    assert len(kept) <= len(lines)
    return kept


def test_every_written_step_is_true():
    steps = 0
    for problem in PROBLEMS:
        for line in lines_of(problem.parallel()):
            sides = line.split("=")
            numeric = [side for side in sides if re.fullmatch(r"\d+([+-]\d+)*", side)]
            for left, right in itertools.pairwise(numeric):
                steps += 1
                assert eval(left) == eval(right), line
    assert steps > 1000


def test_answers_follow_from_the_question_alone():
    for problem in PROBLEMS:
        find, *definitions = problem.question.splitlines()
        values = dict(line.split(" = ") for line in definitions)

        def value(name: str, values: dict[str, str] = values) -> int:
            terms = re.findall(r"[+-]?[A-Z0-9]+", values[name])
            return sum(value(term.lstrip("+")) if term.lstrip("+")[0].isalpha() else int(term) for term in terms)

        names = find.removeprefix("Find ").rstrip(".").split("+")
        assert sum(value(name) for name in names) == problem.answer


def test_both_forms_hold_the_same_content_in_the_same_order():
    for problem in PROBLEMS:
        assert lines_of(problem.parallel()) == problem.sequential().splitlines()


def test_parallel_forms_are_well_formed_and_nest():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(TAGS))
    token_ids = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    nested = 0
    for problem in PROBLEMS[:60]:
        layout = BranchLayout.from_token_ids(tokenizer.encode(problem.parallel()), token_ids)
        assert layout.problems == []
        (block,) = layout.blocks
        assert len(block.paths) == len(block.outlines) == len(problem.sums)
        inner = [len(path.blocks[0].paths) if path.blocks else 0 for path in block.paths]
        assert inner == [len(each.parts) for each in problem.sums]
        nested += any(inner)
    assert nested > 0


def test_splits_share_no_problem_and_repeat_for_the_same_seed():
    small = ProblemOptions(paths=(2, 2), terms=(2, 2), nested=0.0, largest=20)
    train, held_out = train_and_test(500, 200, seed=5, train_options=small, test_options=small)
    assert not set(train) & set(held_out)
    assert len(set(train)) == 500
    assert train_and_test(500, 200, 5, small, small) == (train, held_out)
    assert train_and_test(500, 200, 6, small, small)[0] != train
    assert train_and_test(0, 200, 5, small, small)[1] == held_out


def test_options_are_kept():
    options = ProblemOptions(paths=(2, 4), terms=(3, 5), nested=0.0, largest=25)
    for problem in generate_problems(80, 0, options):
        assert 2 <= len(problem.sums) <= 4
        for each in problem.sums:
            assert 3 <= len(each.terms) <= 5
            totals = [sum(each.terms[: count + 1]) for count in range(len(each.terms))]
            assert all(1 <= total <= 25 for total in totals)
            assert len(set(each.terms[1:])) == len(each.terms) - 1


def test_messages_carry_the_prompt_of_their_form():
    problem = Problem((Sum("A", (1, 2)), Sum("B", (3, -1))))
    assert problem.question == "Find A+B.\nA = 1+2\nB = 3-1"
    assert problem.answer == 5
    parallel, sequential = problem.messages("parallel"), problem.messages("sequential")
    assert "in parallel" in parallel["prompt"][0]["content"]
    assert "in parallel" not in sequential["prompt"][0]["content"]
    assert sequential["completion"][0]["content"] == "A\n1+2=3\nA=3\nB\n3-1=2\nB=2\nA+B=3+2=5\nAnswer: 5"


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Answer: 12", 12), ("Answer: 1\nAnswer: 7<|im_end|>", None), ("Answer:", None), ("", None), ("12", None)],
)
def test_read_answer_takes_the_last_answer_or_nothing(text, answer):
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"paths": (1, 3)}, "paths"),
        ({"paths": (5, 3)}, "paths"),
        ({"paths": (2, 27)}, "paths"),
        ({"terms": (1, 2)}, "terms"),
        ({"nested": 1.5}, "nested"),
        ({"largest": 5}, "largest"),
        ({"terms": (9, 14)}, "terms"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        ProblemOptions(**options)
    with pytest.raises(ValueError, match="`count`"):
        generate_problems(-1, 0)
    with pytest.raises(ValueError, match="`form`"):
        PROBLEMS[0].messages("both")


def test_wilson_interval_holds_known_values():
    low, high = wilson_interval(95, 100)
    assert (low, high) == pytest.approx((0.8882, 0.9785), abs=2e-4)
    assert wilson_interval(0, 10)[0] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="`successes`"):
        wilson_interval(3, 0)


def test_answers_too_long_for_a_number_are_none():
    assert read_answer("Answer: " + "9" * 4300) == int("9" * 4300)
    assert read_answer("Answer: " + "9" * 4301) is None
