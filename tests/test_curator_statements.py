"""Statements of an answer are sought where one can begin, and are those that a search of the whole text finds."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from multiverse.curator.final_answer import _STATED, _statements

STATEMENTS = (
    *(f"{word} it is 3" for word in ("wait", "no,", "No:", "hmm", "SORRY", "actually", "correction", "hold on")),
    *("mistake: it's 4", "final  answer\n5", "Final Answer:\n", "answer is", "ANSWER: 7", "answer to that = "),
    *("<answer>8</answer>", "\n #### 9", "\n\t#### 10"),
    # Letters with more than one lower case, or none of its own.
    *("İ", "\u017forry it is 3", "wa\u0131t it is 4", "m\u0130stake it is 5", "m\u0131stake it is 2"),
)
BETWEEN = (
    "\n",
    " ",
    ".",
    "?",
    ":",
    "**",
    "answerable",
    "manifest",
    "it must be",
    "wait",
    "</answer>",
    "$x$",
    "12",
    "a",
)


def statements(found) -> list:
    return [(match.span(), match.groups()) for match in found]


@given(
    st.lists(st.sampled_from(STATEMENTS + BETWEEN) | st.text(max_size=3), max_size=14).map("".join), st.integers(0, 30)
)
@example("the answer is wait, it's 5", 0)
@example("wait answer: 4\n#### 5", 2)
def test_every_statement_is_found_and_no_other(text: str, start: int) -> None:
    start = min(start, len(text))
    assert statements(_statements(text, start)) == statements(_STATED.finditer(text, start))


@pytest.mark.parametrize("statement", [each for each in STATEMENTS if any(map(str.isdigit, each))])
def test_every_kind_of_statement_is_found(statement: str) -> None:
    text = f"It is long. {statement}\n"
    found = statements(_statements(text, 0))
    assert len(found) == 1
    assert found == statements(_STATED.finditer(text))
