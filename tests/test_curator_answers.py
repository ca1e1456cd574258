"""The JSON in an answer is found whatever stands around it, and what it says is checked."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiverse import TAGS
from multiverse.curator import answers
from multiverse.curator.asking import Answer
from multiverse.curator.completion import Completion
from multiverse.curator.records import StageFailure

WANTED = {"a": [1, {"b": "x } y"}], "c": 'say "hi" {'}
PLAIN = json.dumps(WANTED)


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN,
        f"```json\n{PLAIN}\n```",
        f"Sure! Here is the set {{1, 2}} and \\frac{{1}}{{2}}:\n\n{PLAIN}\n\nHope that helps {{really}}.",
        f'<think>Maybe {{"a": 0}}? No.</think>\n{PLAIN}',
        f'{PLAIN}\n{{"a": "a second object"}}',
        json.dumps(WANTED, indent=2).replace("\n  ]", ",\n  ]").replace("\n}", ",\n}"),
    ],
)
def test_the_object_is_found_in_what_stands_around_it(answer):
    assert answers.read_object("steps", answer) == WANTED


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text())))
def test_every_object_of_json_is_read_as_it_is(values):
    # A model that escapes LaTeX properly is not to be "mended". Control characters right before a letter are: `\b` and
    # `\f`, which nobody writes, begin a command, and so do the others before some words (a carriage return and "m").
    text = json.dumps(values, ensure_ascii=False)
    if not re.search(r"\\[bf]|\\[nrt][A-Za-z]", text):
        assert answers.read_object("steps", text) == values


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\frac{1}{2} \times \theta \neq \beta \rho", r"\frac{1}{2} \times \theta \neq \beta \rho"),
        (r"\(x\) and \alpha \underline{u}", r"\(x\) and \alpha \underline{u}"),
        (r"\\frac{1}{2} \\times \\neq", r"\frac{1}{2} \times \neq"),
        (r"line\nnext line\n\nnew\ttabbed \"quoted\" \u00e9", 'line\nnext line\n\nnew\ttabbed "quoted" é'),
        ("a raw\nline break", "a raw\nline break"),
    ],
)
def test_latex_survives_whether_it_was_escaped_or_not(written, meant):
    assert answers.read_object("branches", f'{{"text": "{written}"}}') == {"text": meant}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("I cannot do that.", "holds no JSON object"),
        ("The set {1, 2}.", "holds no JSON object"),
        ("[1, 2]", "holds no JSON object"),
        (PLAIN[:-1], "cut off"),
        (PLAIN[:-4], "cut off"),
        ('{"a": {"b": 1}, "c": "unclosed', "cut off"),
        ("<think>Let me see {", "cut off while thinking"),
        ('{"a": 1 "b": {"c": 2}}', "cannot be read"),
        ('{"a": nothing}', "cannot be read"),
    ],
)
def test_an_answer_without_a_whole_object_says_what_is_wrong(answer, reason):
    with pytest.raises(StageFailure, match=reason) as failure:
        answers.read_object("groups", answer)
    assert failure.value.stage == "groups"


def cut_off(text: str) -> Answer:
    """An answer that reached the token limit."""
    return Answer.of(Completion(text, "length", 1, 1, "m"))


@pytest.mark.parametrize(
    "thoughts",
    [
        f"Okay, a first draft: {PLAIN} Wait, that leaves out",
        f"<think>A first draft: {PLAIN} But is it",
        "",
        "\n",
        "Okay, so I need",
        "<think>Done.</think>\n",
    ],
)
def test_a_draft_in_thoughts_that_reached_the_token_limit_is_not_taken_for_the_answer(thoughts):
    with pytest.raises(StageFailure, match="cut off while thinking"):
        answers.read_object("steps", cut_off(thoughts))


@pytest.mark.parametrize("before", ["", "```json\n", "<think>Hm {</think>", "Hm, {1}.</think>\nHere:\n"])
def test_a_whole_object_counts_though_what_followed_it_was_cut_off(before):
    assert answers.read_object("steps", cut_off(f"{before}{PLAIN}\nThis is because")) == WANTED


@pytest.mark.parametrize("cut", range(1, len(PLAIN)))
def test_an_object_that_was_cut_anywhere_is_never_taken_for_whole(cut):
    with pytest.raises(StageFailure, match=r"cut off|no JSON object"):
        answers.read_object("steps", PLAIN[:cut])


def test_members_are_of_the_type_that_is_asked_for():
    values = {"text": "x", "flag": True, "number": 3, "list": []}
    assert answers.member("steps", values, "text", str) == "x"
    assert answers.member("steps", values, "flag", bool) is True
    for name, kind, reason in (
        ("missing", str, "`missing` is missing in the answer"),
        ("flag", int, "must be a whole number, got true"),
        ("number", bool, "must be true or false, got 3"),
        ("text", list, 'must be a list, got "x"'),
        ("list", dict, r"must be an object, got \[\]"),
    ):
        with pytest.raises(StageFailure, match=reason):
            answers.member("steps", values, name, kind)


def test_texts_hold_no_tags_and_are_not_empty():
    assert answers.passage("branches", "  two\nlines ", "It") == "two\nlines"
    assert answers.line("branches", "  two\nlines ", "It") == "two lines"
    assert answers.passage("branches", " ", "It", empty=True) == ""
    with pytest.raises(StageFailure, match="It is empty"):
        answers.passage("branches", " ", "It")
    for tag in TAGS:
        with pytest.raises(StageFailure, match=f"It holds the tag {tag}"):
            answers.passage("branches", f"some {tag} text", "It")


def test_a_label_may_be_a_whole_number_but_no_fraction():
    assert answers.label("groups", 2, "It") == "2"
    assert answers.label("groups", " 2.10 ", "It") == "2.10"
    for wrong in (2.1, True, None, ["2"]):
        with pytest.raises(StageFailure, match="must be text"):
            answers.label("groups", wrong, "It")
