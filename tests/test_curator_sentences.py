"""Sentences give the text back, and divide it where a reader would."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiverse.curator.sentences import numbered, split_sentences

_FRAGMENTS = st.sampled_from(
    ["Wait, no. ", "So x = 3.14. ", "e.g. ", "\n", "\n\n", "$a. B$", "$", "```\nx. Y\n```", "```", "\\[", "\\]", "5! ",
     "- item", "1. ", "  ", "Is it? ", "。", "\\begin{a}", "\\end{a}", "Mr. ", "`", "!", ".", '"', ")", "\t", "\r\n"]
)  # fmt: skip


@given(st.lists(_FRAGMENTS | st.text(max_size=5), max_size=30).map("".join))
def test_the_sentences_of_any_text_are_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert not text.strip() or all(sentence.strip() for sentence in sentences)


@pytest.mark.parametrize(
    "sentences",
    [
        ["One. ", "Two! ", "Three? ", "Four"],
        ["We get x = 3.14. ", "Then y = 2."],
        ["Take primes, e.g. 2 and 3. ", "Or cf. Eq. 5 and Dr. Smith. ", "Done."],
        ["By J. Smith and A. B. Jones it holds. ", "So we get C. ", "Then D."],
        ["Now 5! = 120. ", "And n! is large. ", "So there are 5! ", "That is many."],
        ["The set $a. B$ is one. ", "Likewise \\(c. D\\) is."],
        ["It costs $5. ", "The other one costs $6. ", "Done."],
        ["Look:\n", "$$\nx = 1. Y\n\nz\n$$\n", "Then \\[\na\n\\] ends.\n", "Fine."],
        ["\\begin{align}\na &= b.\\\\\nC &= d\n\\end{align}\n", "So it is."],
        ["Code:\n", "```python\nx = 1. \n\nY = 2\n```\n", "After."],
        ["Items:\n", "- one. ", "Still one.\n", "- two\n", "1. first\n", "2. second\n", "(a) third"],
        ["He said \"Yes.\" ", "Then **no.** ", "(Or not.) ", "End..."],
        ["\n\n  Leading blanks.\n\n\n", "Then more."],
        ["第一步。", "然后呢？", "好。"],
        ["Hmm... maybe not. ", "Yes i.e. this, w.l.o.g. that. ", "Good."],
        ["An unclosed $ is text. ", "So is ``` this. ", "And \\[ that."],
    ],
)  # fmt: skip
def test_a_text_is_divided_where_a_reader_would_divide_it(sentences):
    assert list(split_sentences("".join(sentences))) == sentences


def test_blank_and_empty_texts():
    assert split_sentences("") == ()
    assert split_sentences(" \n ") == (" \n ",)


def test_a_long_text_without_closed_formulas_is_read_at_once():
    # Each of these openings looks for its end; a search that went to the end of the text would take minutes.
    for opening in ("\\[ ", "$x ", "```", "\\begin{a} ", "`a"):
        text = opening * 8000
        assert "".join(split_sentences(text)) == text


def test_sentences_are_shown_with_their_numbers():
    assert numbered(split_sentences("One. Two.\n\nThree.")) == "[1] One.\n[2] Two.\n[3] Three."
