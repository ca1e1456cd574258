r"""The judge against hand-labelled answers (`judged_answers.jsonl`) and against its own promises.

A row is one generation with a label that was set before the judge had seen it. The label is mathematics: equal values
in any form are right, a rounded or reordered one is wrong, and so is whatever is not stated, not ended, or asked. Rows
marked `held_out` were written after the judge had been repaired on the others. On its first run it agreed with 299 of
the 300, with 53 of the 60 held-out rows, and with 32 of the 40 of `round` 2, most of them unboxed prose. It was
repaired after each run; the labels were left as they were.
"""

import json
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse.curator.final_answer import same_answer, stated_answer
from multiverse.evaluation.judge import REASONS, Verdict, judge
from multiverse.tags import TAGS
from multiverse.trainer.synthetic import generate_problems

ROWS = [json.loads(line) for line in Path(__file__).with_name("judged_answers.jsonl").read_text("utf-8").splitlines()]
LABELLED = [row for row in ROWS if not row.get("held_out")]
HELD_OUT = [row for row in ROWS if row.get("held_out")]


def verdict(row):
    return judge(row["text"], row["expected"], row["kind"], row.get("finish_reason", "eos"), row.get("choices", ()))


def disagreements(rows):
    pairs = [(row, verdict(row)) for row in rows]
    return [
        f"{row['format']}: labelled {'right' if row['right'] else 'wrong'}, judged {found.reason!r} "
        f"({found.answer!r}); expected {row['expected']!r} in {row['text'][-120:]!r}"
        for row, found in pairs
        if found.right is not row["right"]
    ]


def test_the_labelled_answers_are_many_and_mixed():
    assert len(LABELLED) == 300
    assert len(HELD_OUT) == 100
    assert 0.4 <= sum(row["right"] for row in LABELLED) / 300 <= 0.5
    formats = Counter(row["format"] for row in LABELLED)
    assert len(formats) >= 30
    assert max(formats.values()) <= 30
    assert len({json.dumps(row, sort_keys=True) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("rows", "least"), [(LABELLED, 0.99), (HELD_OUT, 0.97)], ids=["labelled", "held out"])
def test_the_judge_agrees_with_the_labels(rows, least):
    found = disagreements(rows)
    agreement = 1 - len(found) / len(rows)
    assert agreement >= least, "\n".join([f"agreement {agreement:.1%} on {len(rows)} answers", *found])


@pytest.mark.parametrize("row", [row for row in ROWS if row["format"] in ("echo", "empty", "endless", "truncated")])
def test_echo_empty_endless_and_truncated_answers_are_not_right(row):
    assert not verdict(row).right


@pytest.mark.parametrize("finish_reason", ["length", "max_time", "stop", "", None])
def test_what_did_not_end_by_itself_is_not_right(finish_reason):
    assert judge(r"So \boxed{5}.", "5", "math", finish_reason) == Verdict(False, "5", "cut off")
    assert judge("Answer: 5", "5", "number", finish_reason) == Verdict(False, "5", "cut off")
    assert judge("Answer: B", "B", "choice", finish_reason) == Verdict(False, "B", "cut off")


@pytest.mark.parametrize(
    ("text", "expected", "kind", "reason", "answer"),
    [
        (r"\boxed{\frac{6}{8}}", "0.75", "math", "right", r"\frac{6}{8}"),
        (r"\boxed{0.7}", "0.75", "math", "wrong", "0.7"),
        ("Nobody knows.", "0.75", "math", "no answer", None),
        ("<Think></Think>\n<|im_end|>", "1", "math", "empty", None),
        ("How much is 3+4?", "7", "math", "echo", None),
        ("<|im_start|>user\nHow much is 7?", "7", "math", "echo", None),
        ("It is 7.\n" * 100, "7", "math", "endless", "7"),
        ("<Parallel><Goal></Goal><Path>1: \\boxed{7}</Path>", "7", "math", "no answer", None),
        ("Answer: 12", "12", "number", "right", "12"),
        ("Answer: 12", "012", "number", "right", "12"),
        ("A+B=12", "12", "number", "no answer", None),
        ("Answer: (b)", "B", "choice", "right", "B"),
        ("Answer: B", "(b)", "choice", "right", "B"),
    ],
)
def test_the_reason_says_why(text, expected, kind, reason, answer):
    assert judge(text, expected, kind) == Verdict(reason == "right", answer, reason)
    assert reason in REASONS


def test_an_option_is_picked_by_letter_or_by_its_text():
    choices = ("3 eV", "5 eV", "5 keV", "three electrons")
    for text in ("The answer is (B).", "The answer is 5 eV.", r"\boxed{\text{5 eV}}", "**B**", "Option B is correct."):
        assert judge(text, "B", "choice", choices=choices).right, text
    assert judge("The answer is three electrons.", "D", "choice", choices=choices).right
    wrong = ["The answer is 5.", "The answer is A or B.", "The answer is B or C.", "(A) 3 eV\n(B) 5 eV", "A proton."]
    for text in [*wrong, "B is too small.", 'End with a line of the form "Answer: B".']:
        assert not judge(text, "B", "choice", choices=choices).right, text


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_solutions_of_the_synthetic_families_are_right_and_altered_ones_wrong(form):
    for problem in generate_problems(20, seed=3):
        text, expected = getattr(problem, form)(), str(problem.answer)
        assert judge(text, expected, "number") == Verdict(True, expected, "right")
        assert judge(text, str(problem.answer + 1), "number").reason == "wrong"
        assert judge(text.rpartition("\nAnswer:")[0], expected, "number").answer is None


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("5\\,040", "5040", True), ("1{,}000", "1000", True), ("1 000 000", "10^6", True), ("6.02e3", "6020", True),
        (r"5\sqrt{2}", "5√2", True), (r"1+\sqrt2", "sqrt(2) + 1", True), (r"\frac13", "0.333333333333", False),
        (r"\sqrt{5}", "5^{0.5}", True), (r"\sqrt2", "1.41421356237", False), ("2516_8", "2516_{8}", True),
        ("2516_8", "2516_9", False), ("2516_8", "2516", True), (r"12\text{ cm}", "12 m", False),
        (r"12\text{ cm}", "12 centimeters", True), (r"12\text{ in}^2", "12 square inches", True),
        (r"36\pi", r"36\pi \text{ cm}^3", True), ("[2,5)", "(2,5)", False), ("(1,2)", r"\{1,2\}", False),
        (r"[3,\infty)", r"x \ge 3", True), (r"[3,\infty)", "x > 3", False), ("7", "7 or 8", False),
        ("7,8", "8 and 7", True), (r"\pm 3", "x = 3 or x = -3", True), ("12", "approximately 12", False),
        ("30%", "0.3", True), ("62.5", r"62.5\%", True), ("0.5", "0.5%", False), (r"2\frac12", "2 1/2", True),
        ("11", r"11 \pmod{13}", True), ("9", "3**2", True), (r"\cot x", "cot(x)", True), ("3 m", "3x", False),
        ("9", "9^{9^{9^9}}", False), ("x", "(x+y+z)^{300}", False), ("5", r"\Gamma(10^9)", False),
    ],
)  # fmt: skip
def test_equal_values_are_the_same_answer_in_any_form(first, second, same):
    assert same_answer(first, second) is same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{2} and \boxed{3}", "2, 3"), (r"\boxed{4}, so the area is \boxed{32}", "32"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{5}. Wait, it's 6.", "6"), (r"\boxed{5}. Wait, it's a nice number.", "5"), (r"\boxed{}", None),
        (r"\boxed{5}. The answer is positive.", "5"), ("Then the answer is 5?", None),
        (r"The answer is \boxed{17", None),
        ("The answer is the ratio $\\frac12$, as we saw.", "$\\frac12$"), ("The answer is not 5.", None),
        ("The final answer is:\n\\[\n12\n\\]", "12"), ("6 * 3 = 18\n#### 18", "18"), ("<answer>12</answer>", "12"),
        ("# Final answer\n\n**17**", "17"), ("Answer: To find it, we first sum up all of the terms.", None),
    ],
)  # fmt: skip
def test_the_last_statement_of_an_answer_counts(text, answer):
    assert stated_answer(text) == answer


HARD = {
    "long": "The answer is 5. Let me check. " * 35_000,
    "blanks": "answer: a" + " " * 500_000 + "b",
    "nines": r"\boxed{" + "9" * 100_000 + "}",
    "number": "Answer: " + "9" * 100_000,
    "open boxes": r"\boxed{" * 5_000,
    "boxes": r"\boxed{" * 5_000 + "1" + "}" * 5_000,
    "tower": "\\boxed{9^{9^{9^9}}}",
    "exponential": "\\boxed{e^{e^{e^{e^{e}}}}}",
    "factorial": r"\boxed{(10^9)!}",
    "series": r"\boxed{\sum_{n=1}^{10^{12}} n^3}",
    "brackets": r"\boxed{" + "(" * 90 + "1" + ")" * 90 + "}",
    "fractions": r"\boxed{" + r"\frac{1}{" * 15 + "2" + "}" * 15 + "}",
    "nested paths": "<Parallel><Path></Think></Path>" * 5_000,
}


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_are_judged_and_never_right(name):
    found = []

    def run():
        found.extend(judge(HARD[name], "4", kind) for kind in ("math", "number"))
        found.append(judge(HARD[name], "D", "choice", choices=("1", "2", "3", "4")))

    # Outside the main thread no time limit can stop it.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [each.right for each in found] == [False] * 3


PIECES = [
    *TAGS, "\\boxed{", "}", "$", "\\(", "\\)", "answer is ", "Answer: ", "12", "\\frac", "{1}{2}", "^", "_8", "√", "!",
    "=", "<|im_start|>", "user\n", "**", "(A) ", "B", " or ", "?", ".", "\n", " cm", "%", "\\text{", "x", "<", "٣",
]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    text=st.one_of(st.text(max_size=120), st.lists(st.sampled_from(PIECES), max_size=25).map("".join)),
    kind=st.sampled_from(["math", "choice", "number"]),
)
def test_any_text_is_judged(text, kind):
    found = judge(text, {"math": r"\frac{1}{2}", "choice": "B", "number": "12"}[kind], kind, choices=("5 cm", "12"))
    assert found.reason in REASONS
    assert found.right is (found.reason == "right")
    assert found.answer is not None or not found.right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "5", "letters"), "`kind` must be one of .*'letters'"),
        (("x", "  ", "math"), "`expected` is empty"),
        (("x", "", "choice"), "`expected` is empty"),
        (("x", "E", "choice", "eos", ("1", "2", "3", "4")), "`expected` is 'E', which is no letter from A to D"),
        (("x", "two", "choice", "eos", ("1", "2")), "`expected` is 'two'"),
        (("x", "1/2", "number"), "`expected` is '1/2', which is no integer"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        judge(*arguments)
