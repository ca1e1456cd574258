"""The checks pass a good record, and catch every seeded defect with the stage that is to mend it."""

import threading
from dataclasses import replace

import pytest
from curated_chain import CHAIN, INNER, OUTER, RENDERED, SENTENCES, curated
from multiverse.curator import checks
from multiverse.curator.final_answer import gives_answer, same_answer, stated_answer
from multiverse.curator.grammar import check_grammar
from multiverse.curator.quantities import content_distance, formulas, numbers, squeezed, symbols, word_edits
from multiverse.curator.records import Chain, Node, StageFailure
from multiverse.curator.rendering import render
from multiverse.trainer.expression_trees import TreeOptions
from multiverse.trainer.synthetic import ProblemOptions, generate_problems

FINISHED = curated()


def texts(**changes):
    """The record with other texts of leaf steps (`s2_2` is step 2.2), as if refilling had gone wrong."""
    named = {name[1:].replace("_", "."): text for name, text in changes.items()}
    return replace(FINISHED, texts={**FINISHED.texts, **named})


def block(label, **changes):
    """The record with another text of one block; a dictionary changes parts of a list by their place."""
    text = FINISHED.blocks[label]
    for name, value in changes.items():
        if isinstance(value, dict):
            value = tuple(value.get(place, each) for place, each in enumerate(getattr(text, name)))
        text = replace(text, **{name: value})
    return replace(FINISHED, blocks={**FINISHED.blocks, label: text})


def structure(*nodes):
    """The record with another structure."""
    return replace(FINISHED, structure=nodes)


def rendered(before, after):
    """The finished text with one thing replaced in it."""
    assert RENDERED.count(before) == 1
    return RENDERED.replace(before, after)


RECTANGLE, SQUARE = FINISHED.blocks[OUTER].paths
DEEP = Node("2.2", None, (Node("x-y", "collective", (Node("x"), Node("y"))),))
THREE_DEEP = Node("2-3", "collective", (Node("2", None, (Node(INNER, "collective", (DEEP, Node("2.3"))),)), Node("3")))
OTHER = (
    "A square of side 5 is something that everybody knows very well, and so we may safely look up whatever else there "
    "is to be known about it: $s^2 = 25$."
)

#: What is wrong; the record with it (a draft, or a rendered text); the stage after which it is checked ("text" for a
#: rendered one); the stage to go back to; what the reason says.
DEFECTS = [
    ("dropped sentence", texts(s4="".join(SENTENCES[6:])), "refill", "refill", "Together this makes .* is missing"),
    ("doubled sentence", texts(s2_2=SENTENCES[2] * 2), "refill", "refill", "3.4 = 12.' is there too often"),
    ("swapped steps", texts(s2_2=SENTENCES[3], s2_3=SENTENCES[2]), "refill", "refill", "is out of order"),
    ("reworded beyond the bound", texts(s1="Hm. ", s4="I think it is this. Answer: 51"), "refill", "refill",
     "edit distance of 0.[3-9]"),
    ("reworded within the bound", texts(s2_2="The area is 3*4 = 12.\n"), "refill", "refill", "is missing"),
    ("no block at all", structure(Node("1")), "structure", "groups", "no parallel block"),
    ("step left out of the structure", structure(*FINISHED.structure[1:]), "structure", "groups", "the steps 2.1"),
    ("blocks three deep", structure(THREE_DEEP), "structure", "groups", "nested 3 deep"),
    ("missing conclusion", block(INNER, conclusion=""), "branches", "branches", f"{INNER} has an empty conclusion"),
    ("empty outline", block(INNER, outlines={1: " "}), "branches", "branches", f"outline 2 of block {INNER} is empty"),
    ("empty path", block(OUTER, paths={1: ""}), "branches", "branches", "path 2 of block 2-3 is empty"),
    ("outline without a path", block(OUTER, outlines=("a", "b", "c")), "branches", "branches", "3 <Outline>, 2"),
    ("a path too many", block(OUTER, outlines=("a", "b", "c"), paths=(RECTANGLE, SQUARE, "c")), "branches", "branches",
     "3 outlines and 3 paths for 2 parts"),
    ("tag in a text", block(OUTER, paths={1: f"{SQUARE} </Path> and on"}), "branches", "branches", "stray close"),
    ("block in a text", block(INNER, paths={0: RENDERED}), "branches", "branches", "3 deep"),
    ("nested block lost", block(OUTER, paths={0: SENTENCES[1]}), "branches", "branches", "has 0 blocks where"),
    ("placeholder left over", block(OUTER, paths={1: f"{SQUARE}\n{{{{block 7-8}}}}"}), "branches", "branches", "7-8"),
    ("wrong label", rendered("1.2: The perimeter of", "2: The perimeter of"), "text", "branches",
     f"path 2 of block {INNER} must begin with '1.2:'"),
    ("outline without a label", rendered("2: The square.", "The square."), "text", "branches", "must begin with '2:'"),
    ("unclosed tag", rendered("25$.\n</Path>", "25$."), "text", "branches", "unclosed tag: <Path>"),
    ("unclosed block", rendered("</Parallel>\nTogether", "Together"), "text", "branches", "unclosed block"),
    ("conclusion cut out", rendered("<Conclusion>\nThe quantities are 12, 14 and 25.\n</Conclusion>\n", ""), "text",
     "branches", "missing conclusion"),
    ("path thrown away", block(OUTER, paths={1: OTHER}), "branches", "branches", "words differ"),
    ("lost number", block(INNER, paths={1: "The perimeter of it is 2*(3+4)."}), "branches",
     "branches", "the number 14"),
    ("lost formula", block(OUTER, paths={1: "For the square, the side is 5, so that its area must be 25, or 5^2."}),
     "branches", "branches", "path 2: the formula 's.2 = 25'"),
    ("similarly", block(INNER, paths={1: "Its perimeter is similarly 2*(3+4) = 14."}), "branches", "branches",
     "path 2: 'similarly' points at"),
    ("a sibling by its number", block(OUTER, paths={1: f"{SQUARE} Add path 1."}), "branches", "branches", "'path 1'"),
    ("a sibling by its place", block(OUTER, paths={1: f"{SQUARE} The other case differs."}), "branches", "branches",
     "'The other case'"),
    ("numbering kept", block(OUTER, paths={1: f"Secondly, {SQUARE}"}), "branches", "branches", "'Secondly'"),
    ("value that only a sibling computed", block(OUTER, paths={1: f"{SQUARE} It exceeds 12."}), "branches", "branches",
     "path 2: the number 12"),
    ("value of a sibling of the outer path", block(INNER, paths={0: "Its area is 3*4 = 12, not 25."}), "branches",
     "branches", f"block {INNER}, path 1: the number 25"),
    ("symbol that only a sibling has", block(OUTER, paths={0: RECTANGLE.replace("both", "both, not s,")}), "branches",
     "branches", "path 1: the symbol s"),
    ("changed final answer", texts(s4="".join(SENTENCES[5:]).replace(": 51", ": 52")), "branches", "branches",
     "ends with the answer '52'; it should be '51'"),
    ("final answer lost", texts(s4=SENTENCES[5]), "branches", "branches", "final answer '51' is missing"),
]  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS, ids=[each[0] for each in DEFECTS])
def test_the_checks_catch_each_seeded_defect(defect):
    _, record, stage, target, reason = defect
    with pytest.raises(StageFailure, match=reason) as failure:
        check_grammar(record, FINISHED.structure) if stage == "text" else checks.check(CHAIN, record, stage)
    assert failure.value.stage == target


def test_the_record_that_defects_are_seeded_in_passes_all_checks():
    draft = FINISHED
    for stage in ("steps", "substeps", "groups", "structure", "refill", "branches"):
        draft = checks.check(CHAIN, draft, stage)
    assert draft.measures["content_distance"] == 0.0
    assert 0.0 < draft.measures["path_distance"] < checks.PATH_BOUND
    assert draft.measures["answer_checked"] == 1.0
    check_grammar(RENDERED)
    check_grammar(RENDERED, draft.structure)


def test_a_source_that_nothing_could_mend_is_refused_at_once():
    checks.check_source(CHAIN)
    for changes, reason in (
        ({"answer": "52"}, "does not come to the known answer '52'"),
        ({"trajectory": "Some <Parallel> text. More."}, "holds the tag <Parallel>"),
        ({"trajectory": "Some {{block 1-2}} text."}, "holds {{block 1-2}}"),
        ({"trajectory": "One sentence, and nothing to divide"}, "is a single sentence"),
    ):
        with pytest.raises(StageFailure, match=reason) as failure:
            checks.check_source(replace(CHAIN, **changes))
        assert failure.value.stage == "source"


def test_how_much_of_a_path_may_be_rewritten_is_an_option():
    measured = checks.check(CHAIN, FINISHED, "branches").measures["path_distance"]
    edited = block(OUTER, paths={1: OTHER})
    with pytest.raises(StageFailure, match="words differ"):
        checks.check(CHAIN, edited, "branches")
    assert checks.Checks(path_bound=1.0)(CHAIN, edited, "branches").measures["path_distance"] > checks.PATH_BOUND
    long = SQUARE.replace("that its area must be", "it does follow from this in the end")
    with pytest.raises(StageFailure, match="words differ"):
        checks.Checks(path_bound=0.0)(
            CHAIN, block(OUTER, paths={1: f"{long} So much for the square of side 5."}), "branches"
        )
    assert measured < checks.PATH_BOUND
    for bound in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`path_bound` is"):
            checks.Checks(path_bound=bound)


def test_answers_that_cannot_be_compared_are_not_judged():
    proof = "Suppose that it were otherwise.\nThen it would not be so."
    chain = Chain("proof", CHAIN.question, CHAIN.trajectory.replace("\nAnswer: 51", ""), "As shown.", proof)
    checks.check_source(chain)
    assert checks.check_answer(chain, render(FINISHED).replace("\nAnswer: 51", "")) is False


@pytest.mark.parametrize(
    "options", [ProblemOptions(nested=0.5), TreeOptions(depth=(1, 2))], ids=["sums", "trees of two levels"]
)
def test_the_texts_of_the_synthetic_families_pass_grammar_and_answer_check(options):
    for problem in generate_problems(25, seed=11, options=options):
        check_grammar(problem.parallel())
        attempt = f"The answer is {problem.answer}."
        chain = Chain("made", problem.question, problem.sequential(), attempt, str(problem.answer))
        checks.check_source(chain)
        assert checks.check_answer(chain, problem.parallel())
        wrong = problem.parallel().replace(f"Answer: {problem.answer}", f"Answer: {problem.answer + 1}")
        with pytest.raises(StageFailure, match="ends with the answer"):
            checks.check_answer(chain, wrong)


def test_trees_of_three_levels_are_too_deep():
    (problem,) = generate_problems(1, seed=2, options=TreeOptions(depth=(3, 3)))
    with pytest.raises(StageFailure, match="3 deep"):
        check_grammar(problem.parallel())


def test_a_path_may_use_what_precedes_its_block():
    record = block(INNER, paths={0: "Its area is 3*4 = 12, not 5."})
    unasked = replace(CHAIN, question="Shapes?")
    with pytest.raises(StageFailure, match="the number 5"):
        checks.check_independence(unasked, record)
    checks.check_independence(CHAIN, record)
    told = replace(record, texts={**record.texts, "1": "We are given 5. "})
    checks.check_independence(unasked, told)


@pytest.mark.parametrize(
    "path",
    [
        "The likely value is similar in kind.",
        "In case 7 is prime, both ways end here.",
        "A similar path through the woods is above all nice.",
        "Take the first case of wine; as it was before, so it is.",
        "Alternative forms exist, and alternatively one may write it so.",
        "1.5 is the mean.",
    ],
)
def test_ordinary_words_point_at_nobody(path):
    assert not checks._POINTING.search(path)
    assert not checks._OPENING.match(path)


@pytest.mark.parametrize(
    "path",
    [
        "By the same reasoning it is 3.", "Likewise it holds.", "As above, it is so.", "It is as computed before.",
        "As we saw earlier, it is.", "Compare with case 2.", "See path 1.", "In the previous path it was.",
        "unlike the former approach", "in the other cases", "Alternatively, take it.", "Another approach: take it.",
        "2. Then it is.", "(2) Then it is.",
        "Case 2: it is.", "Case ii. It is.", "Second, it is.", "In step 3 we had it.",
    ],
)  # fmt: skip
def test_words_that_point_at_siblings_are_found(path):
    assert checks._POINTING.search(path) or checks._OPENING.match(path)


def test_the_edit_distance_is_by_characters_and_ignores_blanks():
    assert content_distance("ab  cd\n\ne", "ab cd e") == 0.0
    assert content_distance("abcd", "abxd") == 0.25
    assert content_distance("abcd", "abcdefgh") == 0.5
    assert content_distance("abc", "xyz") == 1.0
    assert content_distance("", "") == 0.0
    assert word_edits("The area is 12.", "the area of it is 12.") == (2, 7)


def test_numbers_formulas_and_symbols_of_a_text():
    assert numbers("1,234.50 and 007, 3.0; (3,4) or x2 = 1/2") == {"1234.5", "7", "3", "4", "2", "1"}
    assert set(formulas("so $a + b$ and \\(c\\), then x = 3+y. Also f(2) <= 4, and \\[ z \\]")) == {
        "a+b", "c", "x=3+y", "f(2)<=4", "z"
    }  # fmt: skip
    assert squeezed(r"$\left( a \, b \right)$") == "(ab)"
    assert formulas("$2 ** 3$").keys() == formulas("$2**3$").keys() != formulas("$23$").keys()
    assert formulas("**x = 23**").keys() == formulas("x = 23").keys()
    assert symbols("Let's say I take a vector x with A2 or b_{10}, \\theta and we don't.") == {
        "x",
        "A2",
        "b_10",
        r"\theta",
    }


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("51", " 51. ", True), ("1/2", r"\frac{1}{2}", True), (r"\frac12", "0.5", True), ("x+1", "1+x", True),
        ("(B)", "b", True), (r"\text{Paris}", "paris", True), ("51", "52", False), ("Paris", "London", False),
        (r"$\sqrt{8}$", r"2\sqrt{2}", True), ("A", "B", False), ("(1, 2)", "(2, 1)", False),
    ],
)  # fmt: skip
def test_answers_are_compared_as_mathematics_and_as_text(first, second, same):
    assert same_answer(first, second) is same


def test_answers_are_compared_in_other_threads_too():
    found = []
    thread = threading.Thread(target=lambda: found.append(same_answer("2/4+1/8", r"\frac{5}{8}")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{3} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("The answer is 7. No, the final answer is **12**.", "12"),
        ("Answer: 3.5\nThat was it.", "3.5"),
        ("The answer to the question is: blue.", "blue"),
        ("We do not know.", None),
    ],
)
def test_the_answer_that_a_text_states(text, answer):
    assert stated_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "gives"),
    [
        (r"Thus $\boxed{204}$", "204", True), ("The total is 204 minutes.", "204", True),
        ("It is 2040.", "204", False),
        (r"Hence $x = \frac{1}{2}$", "0.5", True), (r"\boxed{3}", "204", False),
        ("The capital is Paris.", "Paris", True),
    ],
)  # fmt: skip
def test_whether_an_attempt_gives_the_known_answer(text, answer, gives):
    assert gives_answer(text, answer) is gives
