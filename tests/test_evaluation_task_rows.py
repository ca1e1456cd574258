"""A row becomes the question that its columns say, or is refused by its number."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse.evaluation.task_rows import Question, TaskData, choice_order
from multiverse.evaluation.tasks import Task, load_task

OPTIONS = st.lists(st.text(max_size=8), min_size=2, max_size=8, unique=True)


def rows(count: int = 4, **columns) -> list[dict]:
    return [{"question": f"What is {n}+1?", "answer": n + 1, **columns} for n in range(count)]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Task]:
    """Reads rows as a task of one's own."""

    def load_own(content: list[dict], limit: int | None = None, **columns) -> Task:
        path = tmp_path / "own.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return load_task("own", TaskData(path, **columns), limit)

    return load_own


@given(st.text(max_size=20), OPTIONS, st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_an_order_of_options_is_a_permutation_that_depends_on_nothing_else(question, options, seed, rng):
    order = choice_order(question, options, seed)
    assert sorted(order) == list(range(len(options)))
    shown = [options[place] for place in order]
    digests = [
        hashlib.sha256(f"{seed}\n{question}\n{each}".encode("utf-8", "surrogatepass")).hexdigest() for each in shown
    ]
    assert digests == sorted(digests), "as it is documented"
    moved = rng.sample(options, len(options))
    assert [moved[place] for place in choice_order(question, moved, seed)] == shown


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32))
def test_all_orders_are_equally_likely(seed):
    drawn = 4800
    orders = Counter(tuple(choice_order(f"question {n}", ["right", "a", "b", "c"], seed)) for n in range(drawn))
    assert set(orders) == set(permutations(range(4)))
    # 200 each in expectation, with a standard deviation of 13.8; six of them leave a chance of 5e-8 over all 24.
    assert all(abs(count - 200) < 83 for count in orders.values())


def test_any_dataset_with_questions_and_answers_is_a_task(load, tmp_path):
    task = load(rows())
    assert task.questions[2] == Question("own-0002", "What is 2+1?", "3", "math")
    assert (len(task.questions), task.samples) == (4, 1)
    assert load(rows(), limit=3).questions == task.questions[:3]
    named = [{"q": "How much?", "a": "12", "key": "first"}, {"q": "How many?", "a": 13, "key": 2}]
    questions = load(named, question="q", answer="a", id="key", kind="number").questions
    assert questions == (Question("first", "How much?", "12", "number"), Question("2", "How many?", "13", "number"))


@pytest.mark.parametrize("form", [None, "plain", "integer", "hashes"])
def test_expected_numbers_are_whole(form, load):
    mark = "#### " if form == "hashes" else ""
    row = {"question": "?", "answer": f"{mark}0012"}
    assert load([row], kind="number", answer_format=form).questions[0].expected == "12"
    with pytest.raises(ValueError, match=r"`kind` 'number'\), but row 1 of .* has '.*half' in column 'answer'"):
        load([row, {"question": "?", "answer": f"{mark}half"}], kind="number", answer_format=form)


def test_answers_are_found_in_worked_solutions(load):
    solved = [
        {"question": "?", "answer": r"First \boxed{1}, so $\boxed{\frac{1}{2}}$."},
        {"question": "?", "answer": r"\boxed{ 7 }"},
        {"question": "?", "answer": r"The answer is 7, or \boxed{8"},
    ]
    assert [each.expected for each in load(solved, 2, answer_format="boxed").questions] == [r"\frac{1}{2}", "7"]
    with pytest.raises(ValueError, match=r"but row 2 of .* has 'The answer is 7, or"):
        load(solved, answer_format="boxed")
    counted = [
        {"question": "?", "answer": "3+4=<<3+4=7>>7 #### no\n#### 1,234"},
        {"question": "?", "answer": "#### 5"},
    ]
    assert [each.expected for each in load(counted, answer_format="hashes").questions] == ["1234", "5"]
    assert [each.expected for each in load(counted).questions] == [row["answer"] for row in counted]
    for name in ("boxed", "hashes"):
        with pytest.raises(ValueError, match=rf"`answer_format` is '{name}' .*, but row 0 .* has 'The answer is 7'"):
            load([{"question": "?", "answer": "The answer is 7"}], answer_format=name)


@pytest.mark.parametrize(("written", "expected"), [("B", "B"), ("four", "C"), (0, "A"), (2, "C"), (" B ", "B")])
def test_the_right_option_may_be_given_by_letter_text_or_place(written, expected, load):
    row = {"question": "?", "answer": written, "options": ["two", "three", "four "]}
    question = load([row], choices="options").questions[0]
    assert question == Question("own-0000", "?", expected, "choice", ("two", "three", "four"))
    columns = [{"question": "?", "answer": written, "x": "two", "y": "three", "z": "four"}]
    assert load(columns, choices=("x", "y", "z")).questions[0] == question
    assert load(columns, choices=["x", "y", "z"], shuffle=True).questions[0].kind == "choice"


@pytest.mark.parametrize("written", ["D", "five", 3, -1, "A", True])
def test_an_answer_that_names_no_option_or_two_is_refused(written, load):
    row = {"question": "?", "answer": written, "options": ["two", "three", "A"]}
    with pytest.raises(ValueError, match=r"`answer`: row 0 of .* names [02] of its 3 options"):
        load([row], choices="options")


@pytest.mark.parametrize("empty", ["", None, float("nan")])
def test_an_empty_cell_is_no_option(empty, load):
    row = {"question": "?", "answer": "C", "x": empty, "y": "three", "z": "four"}
    for columns in ({"choices": ("x", "y", "z")}, {"choices": ("x", "y", "z"), "answer": "z"}):
        assert load([row], **columns).questions[0] == Question("own-0000", "?", "B", "choice", ("three", "four"))
    for number in range(8):
        question = load([{**row, "question": f"{number}?"}], choices=("x", "y", "z"), shuffle=True).questions[0]
        assert sorted(question.choices) == ["four", "three"]
        assert question.choices["AB".index(question.expected)] == "four"
    with pytest.raises(ValueError, match="names 0 of its 2 options"):
        load([{**row, "answer": "A"}], choices=("x", "y", "z"))
    with pytest.raises(ValueError, match="has nothing in column 'x'"):
        load([row], choices=("x", "y", "z"), answer="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("two, three", "holds str"),
        ([["two"], ["three"]], "holds list"),
        (None, "NoneType"),
        (["two"], "has 1 options"),
        (["two", ""], "has 1 options"),
        (["two"] * 27, "has 27 options"),
    ],
)
def test_options_that_are_no_list_of_texts_are_refused(options, message, load):
    with pytest.raises(ValueError, match=rf"`choices`: .*{message}"):
        load([{"question": "?", "answer": "A", "options": options}], choices="options")


def test_missing_columns_are_named(load):
    with pytest.raises(ValueError, match=r"no column for question='q', id='key'\. It has \['question', 'answer'\]"):
        load(rows(), question="q", id="key")
    with pytest.raises(ValueError, match=r"no column for choices='x', choices='y'"):
        load(rows(), choices=("x", "y"))
    with pytest.raises(ValueError, match=r"no column for choices='options'"):
        load(rows(), choices="options")


@pytest.mark.parametrize("empty", ["", "  \n", None, float("nan")])
@pytest.mark.parametrize("column", ["question", "answer", "key"])
def test_an_empty_cell_is_refused_by_row_and_column(column, empty, load):
    content = rows(key="k")
    content[2][column] = empty
    content[0]["key"], content[1]["key"] = "a", "b"
    with pytest.raises(ValueError, match=rf"row 2 of .*own\.jsonl has nothing in column '{column}'"):
        load(content, id="key")
    assert len(load(content, limit=2, id="key").questions) == 2


def test_ids_must_tell_rows_apart(load):
    content = [{**row, "key": key} for row, key in zip(rows(3), "aba", strict=True)]
    with pytest.raises(ValueError, match=r"`id`: rows 0 and 2 of .* have the same id 'a' in column 'key'"):
        load(content, id="key")


def test_settings_that_do_not_fit_are_refused(load):
    with pytest.raises(ValueError, match="`kind` must be one of"):
        TaskData("x.jsonl", kind="essay")
    with pytest.raises(ValueError, match="`answer_format` must be one of"):
        TaskData("x.jsonl", answer_format="json")
    for columns in (("x",), ("x", "x"), tuple(map(str, range(27)))):
        with pytest.raises(ValueError, match="`choices` must name 2 to 26 columns"):
            TaskData("x.jsonl", choices=columns)
    with pytest.raises(ValueError, match="`kind` is 'choice', but there are no options"):
        load(rows(), kind="choice")
    with pytest.raises(ValueError, match="`kind` is 'math', but there are options"):
        load(rows(options=["1", "2"]), kind="math", choices="options")
    with pytest.raises(ValueError, match="column 'answer' holds list in row 0"):
        load([{"question": "?", "answer": ["1"]}])
