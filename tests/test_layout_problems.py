"""Problems of malformed texts: their kinds, and the tokens that they point at."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_samples import SAMPLES, every_kind_of_text, examples, layout_of
from multiverse import BranchLayout
from multiverse.problems import ProblemKind
from strategies import NEWLINE, Sample, encode, token_ids, trees

MINIMAL_PROBLEMS: list[tuple[ProblemKind, str, int]] = [
    (
        "unclosed block",
        "a <Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion>",
        1,
    ),
    ("stray close", "a </Path>", 1),
    ("stray close", "</Parallel>", 0),
    ("path outside a block", "a b <Path> </Path>", 2),
    ("block without goal", "a <Parallel> <Path> </Path> <Conclusion> </Conclusion> </Parallel>", 1),
    ("empty goal", "<Parallel> <Goal> a </Goal> <Conclusion> </Conclusion> </Parallel>", 1),
    (
        "paths unequal outlines",
        "a <Parallel> <Goal> <Outline> </Outline> <Outline> </Outline> </Goal> "
        "<Path> </Path> <Conclusion> </Conclusion> </Parallel>",
        1,
    ),
    (
        "missing conclusion",
        "a <Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Path> </Parallel>",
        1,
    ),
    ("unclosed tag", "a <Think> b", 1),
    (
        "unclosed tag",
        "<Parallel> <Goal> <Outline> </Outline> </Goal> <Path> a <Conclusion> </Conclusion> </Parallel>",
        5,
    ),
    ("misplaced tag", "a <Goal> <Outline> </Outline> </Goal>", 1),
    (
        "misplaced tag",
        "<Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Path> "
        "<Conclusion> </Conclusion> <Conclusion> </Conclusion> </Parallel>",
        9,
    ),
]


@pytest.mark.parametrize(("kind", "text", "index"), MINIMAL_PROBLEMS)
def test_problem_is_named_at_the_offending_token(kind: ProblemKind, text: str, index: int) -> None:
    problems = BranchLayout.from_token_ids(encode(text), token_ids).problems
    assert (kind, index) in [(problem.kind, problem.index) for problem in problems]
    problem = next(problem for problem in problems if problem.kind == kind)
    assert kind in str(problem)
    assert str(index) in str(problem)
    assert problem.message in str(problem)


@pytest.mark.parametrize(
    ("kind", "text", "index"), [example for example in MINIMAL_PROBLEMS if not example[1].startswith("a <Goal>")]
)
def test_minimal_example_has_one_problem_only(kind: ProblemKind, text: str, index: int) -> None:
    problems = BranchLayout.from_token_ids(encode(text), token_ids).problems
    assert [(problem.kind, problem.index) for problem in problems] == [(kind, index)]


def test_every_kind_of_problem_has_a_minimal_example() -> None:
    assert {kind for kind, _, _ in MINIMAL_PROBLEMS} == set(get_args(ProblemKind))


@examples(100)
@given(trees())
def test_well_formed_text_has_no_problems(sample: Sample) -> None:
    assert layout_of(sample).problems == []


@examples(100)
@given(st.data(), trees())
def test_text_that_lost_a_tag_has_a_problem(data: st.DataObject, sample: Sample) -> None:
    tags = [index for index, token_id in enumerate(sample.ids) if token_id < NEWLINE]
    if tags:
        lost = data.draw(st.sampled_from(tags))
        assert layout_of(Sample(sample.ids[:lost] + sample.ids[lost + 1 :])).problems


@every_kind_of_text
@examples(60)
@given(data=st.data())
def test_problems_come_in_order_and_point_at_tags(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[kind])
    indices = [problem.index for problem in layout_of(sample).problems]
    assert indices == sorted(indices)
    assert all(sample.ids[index] < NEWLINE for index in indices)


def test_block_cut_by_the_next_document_is_unclosed() -> None:
    ids = encode("<Parallel> <Goal> <Outline> </Outline> </Goal> a </Parallel>")
    problems = BranchLayout.from_token_ids(ids, token_ids, [5]).problems
    assert [(problem.kind, problem.index) for problem in problems] == [("unclosed block", 0), ("stray close", 6)]
