"""A draft becomes the tagged text that its structure says, and tagged text becomes one line of thought again."""

import json

import pytest
from curated_chain import CHAIN, RENDERED, SENTENCES, curated, drafts
from hypothesis import given, settings
from multiverse import TAGS
from multiverse.curator.checks import CONTENT_BOUND
from multiverse.curator.grammar import check_grammar
from multiverse.curator.quantities import content_distance
from multiverse.curator.records import STAGES, Draft
from multiverse.curator.rendering import read_pieces, render, sequential_twin
from multiverse.trainer.expression_trees import TreeOptions
from multiverse.trainer.synthetic import ProblemOptions, generate_problems


def shape(nodes):
    """Blocks of a structure as nested lists: a block is the list of its paths, a path the list of its blocks."""
    found = []
    for node in nodes:
        if node.kind is None:
            found += shape(node.children)
        else:
            found.append([shape(path.children) for path in node.children])
    return found


def read_shape(blocks):
    return [[read_shape(path.blocks) for path in block.paths] for block in blocks]


def test_a_draft_is_rendered_in_the_published_form():
    assert render(curated()) == RENDERED


@settings(max_examples=60, deadline=None)
@given(drafts())
def test_a_random_draft_has_exactly_its_structure_once_it_is_rendered(draft):
    layout = read_pieces(render(draft)).layout
    assert layout.problems == []
    assert read_shape(layout.blocks) == shape(draft.structure)
    if layout.blocks:
        check_grammar(render(draft), draft.structure)


@settings(max_examples=60, deadline=None)
@given(drafts())
def test_the_twin_of_a_random_draft_is_its_content_without_tags(draft):
    twin = sequential_twin(render(draft))
    assert not any(tag in twin for tag in TAGS)
    assert content_distance("".join(draft.texts.values()), twin) <= CONTENT_BOUND
    # Nothing but the conclusions was added, and they are one word each.
    kept = [line for line in twin.splitlines() if line.strip() not in ("", "Done.")]
    assert kept == [line for line in "".join(draft.texts.values()).splitlines() if line.strip()] or (
        " ".join(" ".join(kept).split()) == " ".join("".join(draft.texts.values()).split())
    )


@settings(max_examples=40, deadline=None)
@given(drafts())
def test_a_draft_goes_to_json_and_back(draft):
    assert Draft.from_dict(json.loads(json.dumps(draft.to_dict()))) == draft


@pytest.mark.parametrize("stage", STAGES)
def test_going_back_to_a_stage_gives_the_draft_that_it_began_with(stage):
    assert curated().back_to(stage) == curated(until=stage)


@pytest.mark.parametrize(
    "options",
    [ProblemOptions(nested=0.5), TreeOptions(depth=(1, 3)), TreeOptions(depth=(2, 2), branching=(2, 3))],
    ids=["sums", "trees", "wide trees"],
)
def test_the_twin_of_a_synthetic_text_is_the_sequential_form_of_its_problem(options):
    for problem in generate_problems(40, seed=5, options=options):
        twin = sequential_twin(problem.parallel())
        assert twin == problem.sequential()
        assert content_distance(problem.sequential(), twin) <= CONTENT_BOUND


def test_text_without_tags_is_its_own_twin():
    assert sequential_twin(CHAIN.trajectory) == CHAIN.trajectory
    assert sequential_twin("") == ""


def test_the_twin_keeps_paths_and_conclusions_and_no_labels_goals_or_outlines():
    assert sequential_twin(RENDERED) == (
        f"{SENTENCES[0]}{SENTENCES[1]}The area of the rectangle is 3*4 = 12.\n"
        "The perimeter of the rectangle is 2*(3+4) = 14.\nThe area is 12 and the perimeter 14.\n"
        "For the square, the side is given as 5, so that its area must be $s^2 = 25$.\n"
        "The quantities are 12, 14 and 25.\nTogether this makes 12+14+25 = 51.\n"
        "Nothing was forgotten, and so that is the result.\nAnswer: 51"
    )


@pytest.mark.parametrize(
    ("text", "twin"),
    [
        ("<Think>\nHm.\n</Think>\n\nDone.", "Hm.\nDone."),
        ("a<Parallel><Goal><Outline>1: x</Outline></Goal><Path>1: b</Path><Conclusion>c</Conclusion></Parallel>d",
         "a\nb\nc\nd"),
        # Cut off in the goal, in a path, before the conclusion.
        ("a\n<Parallel>\n<Goal>\n<Outline>\n1: x", "a"),
        ("a\n<Parallel>\n<Goal>\n<Outline>\n1: x\n</Outline>\n</Goal>\n<Path>\n1: b", "a\nb"),
        # A goal that never closes lasts until the first path; a block without one hides nothing.
        ("a\n<Parallel>\n<Goal>\n<Outline>\n1: x\n</Outline>\n<Path>\n1: b\n</Path>\n</Parallel>", "a\nb"),
        ("a\n<Parallel>\nloose\n<Path>\nb at 12:30\n</Path>\n</Parallel>\nc", "a\nloose\nb at 12:30\nc"),
        # What looks like a label is one at the beginning of a path alone.
        ("1: kept\n<Parallel>\n<Path>\n12:30 is kept\n</Path>\n<Path>\n2.1: gone\n3: kept\n</Path>\n</Parallel>",
         "1: kept\n12:30 is kept\ngone\n3: kept"),
        ("stray </Path> tag", "stray \n tag"),
    ],
)  # fmt: skip
def test_any_tagged_text_has_a_twin_malformed_or_not(text, twin):
    assert sequential_twin(text) == twin
