"""Path headers: labels as tokens, and which tokens of a sample the decoder would have forced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse import BranchLayout
from multiverse.forced import HeaderTokens, forced_token_mask
from strategies import NEWLINE, encode, label_ids, plain, token_ids

HEADER = HeaderTokens([NEWLINE], label_ids)

labels = st.lists(st.integers(0, 130).map(str), min_size=1, max_size=4).map(".".join)


def marked(text: str) -> tuple[list[int], list[int]]:
    """Ids of a text in which a star stands behind every forced token, and the indices of those tokens."""
    words = text.split()
    forced = [index for index, word in enumerate(words) if word.endswith("*")]
    return encode(text.replace("*", "")), forced


def forced_in(ids: list[int], header: HeaderTokens = HEADER, starts: list[int] | None = None) -> list[int]:
    mask = forced_token_mask(BranchLayout.from_token_ids(ids, token_ids, starts), ids, header)
    assert (mask.dtype, mask.shape) == (torch.bool, (len(ids),))
    return mask.nonzero().flatten().tolist()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(labels, st.integers(0, 3), st.lists(plain, max_size=3), st.lists(plain, max_size=3))
def test_label_that_was_written_is_read_back(label: str, separators: int, before: list[int], after: list[int]) -> None:
    written = HEADER.write_label(label)
    ids = [*before, *[NEWLINE] * separators, *written, *after]
    end = len(before) + separators + len(written)
    assert HEADER.read_label(ids, len(before)) == (label, end)


@pytest.mark.parametrize(
    ("label", "written"),
    [
        ("1", "1 :"),
        ("2.3", "2 . 3 :"),
        ("10.12", "10 . 12 :"),
        ("11", "1 1 :"),
        ("110", "1 10 :"),
        ("100.1", "10 0 . 1 :"),
    ],
)
def test_label_is_written_with_the_longest_pieces_first(label: str, written: str) -> None:
    assert HEADER.write_label(label) == encode(written)


def test_label_in_single_digits_reads_as_the_one_in_longer_pieces() -> None:
    assert HEADER.read_label(encode("<Path> _ 1 0 . 1 2 : a"), 1) == ("10.12", 8)
    assert HEADER.read_label(encode("<Path> _ 10 . 12 : a"), 1) == ("10.12", 6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a 1 :",
        "1",
        "1 . 2",
        "1 a :",
        "1 _ :",
        "1 </Path> :",
        ":",
        ". :",
        "1 . :",
        ". 1 :",
        "1 . . 2 :",
        "<Path> 1 :",
    ],
)
@pytest.mark.parametrize("separators", [0, 2])
def test_malformed_label_is_no_label(text: str, separators: int) -> None:
    ids = encode("<Path> " + "_ " * separators + text)
    assert HEADER.read_label(ids, 1) == (None, 1 + separators)


def test_label_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`config\.multiverse_label_ids`.*'x'"):
        HEADER.write_label("1.x")
    without_colon = HeaderTokens([NEWLINE], {piece: label_ids[piece] for piece in "0123456789."})
    with pytest.raises(ValueError, match="':'"):
        without_colon.write_label("1")


@pytest.mark.parametrize(
    ("separator_ids", "pieces", "name"),
    [
        (None, label_ids, "multiverse_separator_ids"),
        ([NEWLINE], None, "multiverse_label_ids"),
        ([NEWLINE], {}, "multiverse_label_ids"),
    ],
)
def test_missing_header_configuration_is_named(
    separator_ids: list[int] | None, pieces: dict[str, int] | None, name: str
) -> None:
    with pytest.raises(ValueError, match=f"`config.{name}`"):
        HeaderTokens(separator_ids, pieces)


def test_tokenizer_without_separators_is_allowed() -> None:
    ids, forced = marked("<Parallel> <Goal> </Goal> <Path>* 1* :* a </Path> <Path>* 2* :* </Path> <Conclusion>*")
    assert forced_in(ids, HeaderTokens([], label_ids)) == forced


def test_forced_tokens_of_a_nested_example_are_the_starred_ones() -> None:
    ids, forced = marked(
        "a _ <Parallel> _ <Goal> _ "
        "<Outline> _ 1 : b _ </Outline> _ "
        "<Outline> _ 2 : c _ </Outline> _ </Goal> _* "
        "<Path>* _* 1* :* d _ "
        "<Parallel> _ <Goal> _ <Outline> _ 1 . 1 : _ </Outline> _ <Outline> _ 1 . 2 : _ </Outline> _ </Goal> _* "
        "<Path>* _* 1* .* 1* :* e _ </Path> _* "
        "<Path>* _* 1* .* 2* :* 1 : _ </Path> _* "
        "<Conclusion>* _ f _ </Conclusion> _ </Parallel> _ "
        "</Path> _* "
        "<Path>* _* 2* :* g _ </Path> _* "
        "<Conclusion>* _ h _ </Conclusion> _ </Parallel> _ i"
    )
    assert forced == [
        *(23, 24, 25, 26, 27),
        *(53, 54, 55, 56, 57, 58, 59, 63),
        *(64, 65, 66, 67, 68, 69, 74),
        75,
        *(84, 85, 86, 87, 88, 92),
        93,
    ]
    assert forced_in(ids) == forced


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("<Parallel> _ <Path> _ 1 : a </Path> _ <Conclusion> </Conclusion> </Parallel>", id="no goal"),
        pytest.param("<Parallel> _ <Path> _ </Goal> _ <Path> _ <Conclusion>", id="late goal"),
        pytest.param(
            "<Parallel> <Path> <Parallel> </Goal> _* <Path>* 1* :* </Path> _* <Conclusion>* </Parallel> </Path> _ "
            "<Conclusion>",
            id="goal in the inner block only",
        ),
        pytest.param("<Parallel> <Goal> _ </Goal>", id="no paths"),
        pytest.param("<Parallel> </Goal> <Path>* _* a 1 : </Path> _* <Path>* 1 </Path>", id="no labels"),
        pytest.param("<Parallel> </Goal> <Path>* 1* :* a _ <Path>* 2* :* b _ <Conclusion>*", id="cut paths"),
        pytest.param("<Parallel> </Goal> <Path>* </Path> _* </Parallel> _ a", id="no conclusion"),
        pytest.param("<Parallel> </Goal> <Path>* 1* :* a </Path> _*", id="cut after a path"),
        pytest.param("a <Path> 1 : b </Path> _ <Conclusion>", id="no block"),
        pytest.param("", id="nothing"),
    ],
)
def test_forced_tokens_of_unusual_text_are_the_starred_ones(text: str) -> None:
    ids, forced = marked(text)
    assert forced_in(ids) == forced


def test_header_does_not_run_into_the_next_document() -> None:
    ids, forced = marked("<Parallel> <Goal> </Goal> <Path>* _* 1 : a")
    assert forced_in(ids, starts=[5]) == forced
