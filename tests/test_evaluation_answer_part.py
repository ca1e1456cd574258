"""What of a generation may state the final answer: the rules of `answer_part`, one by one, on texts cut by hand."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse.evaluation.answer_part import answer_part, is_blank
from multiverse.tags import TAGS
from multiverse.trainer.synthetic import ProblemOptions, generate_problems


def block(*paths, conclusion="done", goal="<Goal>\n<Outline>\n1: goal text\n</Outline>\n</Goal>"):
    inside = "\n".join(f"<Path>\n{path}\n</Path>" for path in paths)
    end = "" if conclusion is None else f"\n<Conclusion>\n{conclusion}\n</Conclusion>\n</Parallel>"
    return f"<Parallel>\n{goal}\n{inside}{end}"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("The answer is 5.", "The answer is 5."),
        ("", ""),
        ("  \n", ""),
        ("<Think>\nfirst 4\n</Think>\n\nso 5", "so 5"),
        ("first 4\n</think>\n\nso 5", "so 5"),
        ("one </thinking> two [/THINK] three", "three"),
        ("one<|end_of_thought|>two<|im_end|>", "two"),
        ("a </Think> b </Think> c", "c"),
        ("<Think>\nnever closed: 5", "never closed: 5"),
        ("it is 5\n</Think>\n", ""),
    ],
)
def test_what_comes_after_the_last_thought_counts(text, part):
    assert answer_part(text) == part


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (f"before\n{block('one', 'two', conclusion='both')}\nafter", ["both", "after"]),
        (f"{block('one', conclusion='first')}\nbetween\n{block('two', conclusion='last')}", ["last"]),
        (block("one", block("inner", conclusion="inner end") + "\nrest of path"), ["done"]),
        (f"before\n{block('one', conclusion=None)}", []),
        (f"before\n{block('one', conclusion=None)}\n<Path>\n2: open", []),
        (f"{block('one', conclusion=None)}\n</Parallel>\nafter", ["after"]),
        (f"{block('one', conclusion=None)}\n<Conclusion>\ncut off in the", ["cut off in the"]),
        ("<Parallel>\n<Goal>\nplan\n</Goal>\nno path", ["no path"]),
        ("<Parallel>\n<Goal>\n<Outline>\n1: open", []),
        ("<Parallel>\n<Outline>\n1: no goal", []),
        ("think in <Parallel>, it is 5", [", it is 5"]),
        ("a **<Path> structure** and </Conclusion> mean nothing", ["a **", "structure** and", "mean nothing"]),
    ],
)
def test_the_root_branch_counts_from_the_conclusion_of_its_last_block(text, part):
    assert [line.strip() for line in answer_part(text).splitlines() if line.strip()] == part


def test_a_thought_closed_in_a_closed_path_closes_no_other():
    text = "<Think>\n" + block("one </Think> two", "three", conclusion="four") + "\nfive"
    assert answer_part(text).split() == ["four", "five"]
    assert answer_part(text + "\n</Think>\nsix") == "six"


def test_a_thought_closed_in_an_open_path_is_closed_all_the_same():
    # Seen in generations of the published model: the block is forgotten, and the answer given.
    assert answer_part("<Think>\n" + block("one", conclusion=None) + "\n<Path>\n2: x\n</Think>\n\nso 5") == "so 5"


def test_a_block_after_the_thought_is_read_like_any_other():
    text = "<Think>\nhm\n</Think>\n" + block("sub-result 3", conclusion="in all 5")
    assert answer_part(text) == "in all 5"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("so 5<|im_end|>\n<|im_start|>user\nand 3+4?<|im_end|>\n<|im_start|>assistant\nso 7", "so 5"),
        ("<|im_start|>user\nhow much?<|im_end|>\n", ""),
        ("<|im_start|>user\nhow much?<|im_end|>\n<|im_start|>assistant\nso 5", "so 5"),
        ("<|start_header_id|>user<|end_header_id|>\n\nhow much?<|eot_id|>", ""),
        ("user\nhow much?\nassistant\n", ""),
        ("system\nBe brief.\nuser\nhow much?\nassistant\nso 5", "so 5"),
        ("every user\nuser\nis served: 5", "every user\nuser\nis served: 5"),
    ],
)
def test_only_the_models_first_turn_counts(text, part):
    assert answer_part(text) == part


@pytest.mark.parametrize(("text", "blank"), [("", True), ("<Think>\n</Think>\n<|im_end|>", True), ("<Path> x", False)])
def test_texts_of_tags_and_blanks_are_blank(text, blank):
    assert is_blank(text) is blank


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), nested=st.sampled_from([0.0, 1.0]))
def test_of_a_synthetic_solution_the_outer_conclusion_and_the_end_count(seed, nested):
    (problem,) = generate_problems(1, seed, ProblemOptions(paths=(2, 3), terms=(2, 3), nested=nested))
    after = problem.parallel().rpartition("<Conclusion>")[2]
    expected = after.replace("</Conclusion>", "").replace("</Parallel>", "")
    assert answer_part(problem.parallel()).split() == expected.split()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([*TAGS, "</think>", "<|im_start|>user", "user", "\n", "x", "secret 7"]), max_size=40))
def test_any_order_of_tags_is_read(pieces):
    text = "".join(pieces)
    part = answer_part(text)
    assert part == part.strip()
    assert not any(tag in part for tag in TAGS)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_no_path_of_a_well_formed_text_comes_through(seed):
    rng = random.Random(seed)

    def draw(depth):
        paths = [
            f"secret{rng.randrange(100)} " + (draw(depth - 1) if depth and rng.random() < 0.6 else "") for _ in "ab"
        ]
        return block(*paths, conclusion="secret" if depth < 2 else "told", goal="<Goal>\nsecret\n</Goal>")

    part = answer_part(draw(2) + "\nend")
    assert "secret" not in part
    assert part.split() == ["told", "end"]
