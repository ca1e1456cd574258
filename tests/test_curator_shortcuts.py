"""What the curator reads in parts, or from memory, is what reading the whole at once gives."""

from dataclasses import asdict, replace

import pytest
from curated_chain import CHAIN, OUTER, RENDERED, curated, drafts
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse import TAGS, BranchLayout
from multiverse.curator import checks, quantities, rendering
from multiverse.curator.quantities import formulas, lines_beyond, numbers, squeezed, symbols, word_edits
from multiverse.curator.records import StageFailure
from multiverse.curator.rendering import read_pieces
from multiverse.curator.sentences import numbered, split_sentences
from rapidfuzz.distance import Levenshtein

FRAGMENTS = (
    *(
        "1",
        "02.50",
        "1,234",
        ",",
        ".",
        "...",
        " ",
        "\n",
        "٣",
        "a",
        "I",
        "x_1",
        "b_{ij}",
        "A2",
        "\\theta",
        "\\",
        "'",
        "’",
    ),
    *(
        "$",
        "**",
        "**x",
        "\\left(",
        "\\leftarrow",
        "\\,",
        "~",
        "(",
        "}",
        "=",
        "+",
        "so",
        "Similarly",
        "\t",
        "\x1c",
        "é",
    ),
    *("In the previous case ", "as above", "See path 2", "the Other parts", "unlikewise"),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=25).map("".join)


@settings(max_examples=300)
@given(TEXTS)
def test_numbers_and_symbols_are_those_that_a_search_of_the_whole_text_finds(text):
    assert numbers(text) == {quantities._plain(match.group()) for match in quantities._NUMBER.finditer(text)}
    found = {match.group() for match in quantities._SYMBOL.finditer(text)}
    assert symbols(text) == {each.replace("{", "").replace("}", "") for each in found}


@settings(max_examples=300)
@given(TEXTS, TEXTS)
def test_what_only_one_of_two_texts_holds_is_in_the_lines_that_only_it_has(one, other):
    for find in (numbers, symbols):
        assert find(lines_beyond(one, other)) - find(other) == find(one) - find(other)


@settings(max_examples=300)
@given(TEXTS, TEXTS, TEXTS, TEXTS)
def test_edits_are_counted_as_if_both_texts_were_compared_from_end_to_end(before, one, other, after):
    first, second = before + one + after, before + other + after
    words = [quantities._WORD.findall(text.lower()) for text in (first, second)]
    assert word_edits(first, second) == (Levenshtein.distance(*words), max(map(len, words)))
    lines = f"{before}\n{one}\n{after}", f"{before}\n{other}\n{after}"
    words = [quantities._WORD.findall(text.lower()) for text in lines]
    assert word_edits(*lines) == (Levenshtein.distance(*words), max(map(len, words)))


@settings(max_examples=300)
@given(TEXTS)
def test_words_that_point_at_siblings_are_found_in_any_case(text):
    for each in (text, text.upper(), text.lower()):
        found, wanted = checks._pointing(each), checks._POINTING.search(each)
        assert (found and found.span()) == (wanted and wanted.span())


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("$ \\left( a ~\\, b \\right) $", "(ab)"),
        ("\\leftarrow x", "\\leftarrowx"),
        ("2**x ** 3", "2**x**3"),
        ("2 ** 3 = 2**3", "2**3=2**3"),
        ("**x = 2 ** 3**", "x=2**3"),
        ("(**x**), **so** 23", "(x),so23"),
        ("x = 2**.", "x=2."),
        ("(x+1)**(-2)", "(x+1)**(-2)"),
        ("x**-2", "x**-2"),
        ("a\x1cb", "ab"),
    ],
)
def test_spelling_that_means_nothing_is_left_out_before_blanks_are(text, form):
    # Blanks tell `\left a`, an opening without its bracket, from `\lefta`.
    assert squeezed(text) == form


def test_formulas_come_in_the_order_of_their_delimiters_then_of_their_lines():
    found = formulas("u = 1 and $v = 2$\n$$w\n= 3$$ \\(x\\) \\[y\\] \\$4 and $5$6, z < 7")
    assert list(found) == ["v=2", "w=3", "x", "y", "5", "u=1", "z<7"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, " text ", "\n"]), max_size=25).map("".join))
def test_structure_and_problems_are_those_of_the_layout(text):
    read = read_pieces(text)
    ids = {tag: number for number, tag in enumerate(TAGS)}
    layout = BranchLayout.from_token_ids([ids.get(piece, len(TAGS)) for piece in read.pieces], ids)
    assert read.problems == layout.problems == read.layout.problems
    assert read.blocks == layout.blocks
    assert read.layout.position_ids.tolist() == layout.position_ids.tolist()


@settings(max_examples=60, deadline=None)
@given(drafts())
def test_a_draft_in_plain_values_is_what_dataclasses_make_of_it(draft):
    def plain(value):
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value

    assert draft.to_dict() == plain(asdict(draft))
    assert list(draft.to_dict()) == list(asdict(draft))


def test_texts_without_placeholders_are_not_searched_for_them():
    for text in (RENDERED, "{{block 1-2}} a\n  {{block 2.1-2.2}}  \nb {{ block }}"):
        found = [match.span() for match in rendering.find_placeholders(text)]
        assert found == [match.span() for match in rendering.PLACEHOLDER.finditer(text)]
        assert rendering.without_placeholders(text) == rendering.PLACEHOLDER.sub("", text)


def test_the_sentences_of_a_chain_are_found_and_numbered_once_for_all_its_stages():
    text = "One here. " * 3 + "Only for this test."
    sentences = split_sentences(text)
    assert split_sentences(str(text)) is sentences
    assert numbered(sentences) is numbered(split_sentences(text))


def test_the_values_of_a_nested_block_in_a_placeholder_are_none_of_the_path():
    # `{{block 2.2-2.3}}` stands in the original of the path; 2.2 is nothing that the path itself may know.
    draft = curated()
    rectangle, square = draft.blocks[OUTER].paths
    written = replace(draft.blocks[OUTER], paths=(f"{rectangle}\nIt is 2.2.", square))
    changed = replace(
        draft,
        texts={**draft.texts, "3": draft.texts["3"] + "Here 2.2 comes up. "},
        blocks={**draft.blocks, OUTER: written},
    )
    with pytest.raises(StageFailure, match=r"path 1: the number 2\.2 is found in another part"):
        checks.check_independence(CHAIN, changed)
