"""Every stage asks for what it needs, takes a good answer and refuses a bad one with a reason a model can act on."""

import copy
import hashlib
import json
import re

import pytest
from curated_chain import ANSWERS, CHAIN, INNER, OUTER, SENTENCES, curated
from jinja2 import UndefinedError
from multiverse.curator import templates
from multiverse.curator.outline_stages import outline
from multiverse.curator.records import STAGES, Chain, Group, Node, StageFailure, Step
from multiverse.curator.stages import make_stages
from multiverse.curator.text_stages import CONTEXT

BY_NAME = {stage.name: stage for stage in make_stages()}
PROMPTED = [name for name in STAGES if name != "structure"]


def prompt(call):
    assert [message["role"] for message in call.messages] == ["user"]
    return call.messages[0]["content"]


def changed(key, *path, value=None, drop=False):
    """The good answer with one part of it changed, or dropped."""
    answer = copy.deepcopy(ANSWERS[key])
    inner = answer
    for name in path[:-1]:
        inner = inner[name]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return answer


def test_the_stages_come_in_the_order_of_the_paper():
    assert tuple(stage.name for stage in make_stages()) == STAGES


def test_a_good_model_gets_through_all_stages():
    draft = curated()
    assert draft.done == STAGES
    assert [step.label for top in draft.steps for step in (top, *top.children)] == [
        "1",
        "2",
        "2.1",
        "2.2",
        "2.3",
        "3",
        "4",
    ]
    assert draft.groups[0] == Group(("2", "3"), "collective", "They are two shapes.")
    inner = Node(INNER, "collective", (Node("2.2"), Node("2.3")))
    outer = Node(OUTER, "collective", (Node("2", None, (Node("2.1"), inner)), Node("3")))
    assert draft.structure == (Node("1"), outer, Node("4"))
    assert draft.texts == {
        "1": SENTENCES[0], "2.1": SENTENCES[1], "2.2": SENTENCES[2], "2.3": SENTENCES[3], "3": SENTENCES[4],
        "4": "".join(SENTENCES[5:]),
    }  # fmt: skip
    assert set(draft.blocks) == {INNER, OUTER}


@pytest.mark.parametrize("name", PROMPTED)
def test_a_prompt_shows_the_source_and_the_complaint(name):
    draft, complaint = curated(until=name), "Step 7 {{ is }} <wrong> & odd."
    for call in BY_NAME[name].calls(CHAIN, draft, None):
        assert "could not be used" not in prompt(call)
        assert "{#" not in prompt(call)
        assert "{%" not in prompt(call)
    for call in BY_NAME[name].calls(CHAIN, draft, complaint):
        assert complaint in prompt(call)
    if name != "refill":
        assert CHAIN.question in prompt(call)
    if name != "branches":
        for number, sentence in enumerate(SENTENCES, start=1):
            assert f"[{number}] {sentence.strip()}\n" in prompt(call)


def test_the_source_is_never_read_as_a_template():
    chain = Chain("odd", "What is {{ 7 * 6 }}?", "{% raw %} is text. So is {# this #}.", "")
    (call,) = BY_NAME["steps"].calls(chain, curated(until="steps"), None)
    assert "What is {{ 7 * 6 }}?" in prompt(call)
    assert "[1] {% raw %} is text.\n[2] So is {# this #}." in prompt(call)


def test_prompts_of_later_stages_show_the_outline():
    for name, lines in (("substeps", ["2: Treat the rectangle."]), ("groups", ["2: Treat", "  2.1: Name"])):
        (call,) = BY_NAME[name].calls(CHAIN, curated(until=name), None)
        assert all(f"\n{line}" in prompt(call) for line in lines)
    (call,) = BY_NAME["refill"].calls(CHAIN, curated(until="refill"), None)
    assert "\n* 1: Say" in prompt(call)
    assert "\n2: Treat the rectangle.\n  * 2.1: Name" in prompt(call)
    assert outline(curated().steps).count("*") == 0


def test_nothing_is_asked_where_there_is_nothing_to_divide():
    simple = curated(until="substeps")
    simple = type(simple)(steps=tuple(Step(s.label, s.title) for s in simple.steps), done=simple.done)
    assert BY_NAME["substeps"].calls(CHAIN, simple, None) == []
    accepted = BY_NAME["substeps"].accept(CHAIN, simple, {})
    assert accepted.done == ("steps", "substeps")
    assert accepted.steps == simple.steps
    assert BY_NAME["structure"].calls(CHAIN, curated(until="structure"), "A complaint.") == []


def test_a_complex_step_may_turn_out_to_be_a_single_piece():
    draft = BY_NAME["substeps"].accept(CHAIN, curated(until="substeps"), {"substeps": '{"substeps": {"2": []}}'})
    assert draft.steps[1].children == ()


def test_inner_blocks_are_asked_for_before_the_blocks_that_hold_them():
    stage, draft = BY_NAME["branches"], curated(until="branches")
    (first,) = stage.calls(CHAIN, draft, None)
    assert first.key == INNER
    assert SENTENCES[2].strip() in prompt(first)
    assert SENTENCES[4].strip() not in prompt(first)
    # What the paths of the inner block can see: the text before the outer block and that of their own outer path.
    assert SENTENCES[0] + SENTENCES[1].strip() in prompt(first)
    draft = stage.accept(CHAIN, draft, {INNER: json.dumps(ANSWERS[INNER])})
    assert "branches" not in draft.done
    (second,) = stage.calls(CHAIN, draft, None)
    assert second.key == OUTER
    assert f"{SENTENCES[1]}{{{{block {INNER}}}}}" in prompt(second)
    assert "They are two shapes." in prompt(second)
    draft = stage.accept(CHAIN, draft, {OUTER: json.dumps(ANSWERS[OUTER])})
    assert draft.done == STAGES
    assert stage.calls(CHAIN, draft, None) == []


def test_a_long_text_before_a_block_is_cut_at_its_beginning():
    long = "Much was said here before. " * 1000
    chain = Chain("long", CHAIN.question, long + CHAIN.trajectory, CHAIN.attempt, CHAIN.answer)
    refill = {label: [first + 1000, last + 1000] for label, (first, last) in ANSWERS["refill"]["sentences"].items()}
    refill["1"][0] = 1
    draft = curated(until="branches", chain=chain, answers={**ANSWERS, "refill": {"sentences": refill}})
    (call,) = BY_NAME["branches"].calls(chain, draft, None)
    assert SENTENCES[1].strip() in prompt(call)
    assert "[...] " in prompt(call)
    assert CONTEXT < len(prompt(call)) < CONTEXT + 6000


def test_a_complaint_about_one_block_is_shown_to_that_block_alone():
    stage, complaint = BY_NAME["branches"], f"In block {INNER}, path 1: 'similarly' points at other parts."
    draft = curated(until="branches")
    (told,) = stage.calls(CHAIN, draft, complaint)
    assert complaint in prompt(told)
    draft = stage.accept(CHAIN, draft, {INNER: json.dumps(ANSWERS[INNER])})
    assert stage.calls(CHAIN, draft, complaint) == stage.calls(CHAIN, draft, None)


STEP = {"title": "Do it.", "complex": False}
REFUSALS = [
    ("steps", {"outline": []}, "`steps` is missing"),
    ("steps", {"steps": "1. do it"}, "must be a list"),
    ("steps", {"steps": [STEP]}, "has 1 of them"),
    ("steps", {"steps": [STEP, "Then that."]}, "step 2 must be an object"),
    ("steps", {"steps": [STEP, {"complex": True}]}, "`title` is missing in step 2"),
    ("steps", {"steps": [STEP, {"title": " ", "complex": True}]}, "title of step 2 is empty"),
    ("steps", {"steps": [STEP, {"title": "A <Path>.", "complex": True}]}, "holds the tag <Path>"),
    ("steps", {"steps": [STEP, {"title": "Do."}]}, "`complex` is missing in step 2"),
    ("steps", {"steps": [STEP, {"title": "Do.", "complex": "no"}]}, "must be true or false"),
    ("steps", {"steps": [STEP] * 9}, "9 steps for 8 sentences"),
    ("substeps", {"2": ["a", "b"]}, "`substeps` is missing"),
    ("substeps", {"substeps": {}}, "lacks 2"),
    ("substeps", {"substeps": {"2": ["a", "b"], "3": ["c", "d"]}}, "names '3'"),
    ("substeps", {"substeps": {"2": "a, b"}}, "must be a list"),
    ("substeps", {"substeps": {"2": ["a"]}}, "has one sub-step"),
    ("substeps", {"substeps": {"2": ["a", ["b", "c"]]}}, "Sub-step 2 of 2 must be text"),
    ("substeps", {"substeps": {"2": ["a"] * 6}}, "9 steps for 8 sentences"),
    ("groups", changed("groups", "needs", drop=True), "`needs` is missing"),
    ("groups", changed("groups", "needs", "2.3", drop=True), "`needs` lacks 2.3"),
    ("groups", changed("groups", "needs", "9", value=[]), "`needs` names '9'"),
    ("groups", changed("groups", "needs", "3", value=["9"]), "`needs` of 3 names '9'"),
    ("groups", changed("groups", "needs", "3", value=["4"]), "4, which does not come before it"),
    ("groups", changed("groups", "needs", "3", value=["3"]), "3, which does not come before it"),
    ("groups", changed("groups", "needs", "3", value="2"), "`needs` of 3 must be a list"),
    ("groups", changed("groups", "needs", "3", value=["1", "2"]), "3 needs 2"),
    ("groups", changed("groups", "groups", value=[]), "`groups` is empty"),
    ("groups", changed("groups", "groups", 0, "steps", value=["2"]), "has 1 steps"),
    ("groups", changed("groups", "groups", 0, "steps", value=["2", "9"]), "names '9'"),
    ("groups", changed("groups", "groups", 0, "steps", value=[2.2, 2.3]), "must be text, got 2.2"),
    ("groups", changed("groups", "groups", 0, "steps", value=["1", "3"]), "without a gap"),
    ("groups", changed("groups", "groups", 0, "steps", value=["3", "2"]), "without a gap"),
    ("groups", changed("groups", "groups", 0, "steps", value=["2", "2"]), "without a gap"),
    ("groups", changed("groups", "groups", 0, "steps", value=["2.3", "3"]), "do not belong to the same step"),
    ("groups", changed("groups", "groups", 1, "steps", value=["2", "3"]), "is in two groups"),
    ("groups", changed("groups", "groups", 0, "kind", value="parallel"), "`kind` of group 1 is 'parallel'"),
    ("groups", changed("groups", "groups", 0, "kind", drop=True), "`kind` is missing in group 1"),
    ("groups", changed("groups", "groups", 0, "reason", value=""), "`reason` of group 1 is empty"),
    ("groups", changed("groups", "groups", 0, value=["2", "3"]), "group 1 must be an object"),
    ("refill", {"1": [1, 8]}, "`sentences` is missing"),
    ("refill", changed("refill", "sentences", "2.2", drop=True), "Step 2.2 is missing"),
    ("refill", changed("refill", "sentences", "2", value=[2, 4]), "'2' is no marked step"),
    ("refill", changed("refill", "sentences", "2.2", value=3), "must be a list"),
    ("refill", changed("refill", "sentences", "2.2", value=[3]), "must be [first, last], got 1 values"),
    ("refill", changed("refill", "sentences", "2.2", value=["3", "3"]), "must be a whole number"),
    ("refill", changed("refill", "sentences", "2.2", value=[3, 2]), "goes from 3 to 2"),
    ("refill", changed("refill", "sentences", "1", value=[0, 1]), "goes from 0 to 1"),
    ("refill", changed("refill", "sentences", "2.3", value=[5, 5]), "sentence 4 is in no step yet"),
    ("refill", changed("refill", "sentences", "2.3", value=[3, 4]), "sentence 3, which a step before it has already"),
    ("refill", changed("refill", "sentences", "4", value=[6, 6]), "sentences 7 to 8 are in no step"),
    ("refill", changed("refill", "sentences", "4", value=[6, 9]), "there are 8 sentences"),
    (INNER, changed(INNER, "goal", drop=True), "`goal` is missing"),
    (INNER, changed(INNER, "goal", value=None), "`goal` in the answer must be text"),
    (INNER, changed(INNER, "goal", value="See <Outline>."), "`goal` holds the tag <Outline>"),
    (INNER, changed(INNER, "outlines", value=["one"]), "`outlines` has 1 texts for 2 parts"),
    (INNER, changed(INNER, "outlines", 1, value=""), "text 2 of `outlines` is empty"),
    (INNER, changed(INNER, "outlines", 1, value="2: Do it."), "begins with '2:'"),
    (INNER, changed(INNER, "paths", value=["a", "b", "c"]), "`paths` has 3 texts for 2 parts"),
    (INNER, changed(INNER, "paths", 0, value=["a"]), "text 1 of `paths` must be text"),
    (INNER, changed(INNER, "paths", 0, value="1.1: The area."), "begins with '1.1:'"),
    (INNER, changed(INNER, "paths", 0, value="a </Path> b"), "holds the tag </Path>"),
    (INNER, changed(INNER, "conclusion", value=" "), "`conclusion` is empty"),
    (INNER, changed(INNER, "conclusion", drop=True), "`conclusion` is missing"),
    (OUTER, changed(OUTER, "paths", 0, value="The rectangle."), "holds no placeholder"),
    (OUTER, changed(OUTER, "paths", 1, value=ANSWERS[OUTER]["paths"][0]), "none belong into it"),
    (OUTER, changed(OUTER, "paths", 0, value=f"a\n{{{{block {INNER}}}}}\n{{{{block {INNER}}}}}"), "each once"),
    (OUTER, changed(OUTER, "paths", 0, value="a\n{{block 9-10}}"), "{{block 9-10}}"),
    (OUTER, changed(OUTER, "paths", 0, value=f"see {{{{block {INNER}}}}}"), "within a line"),
    (OUTER, changed(OUTER, "conclusion", value=f"{{{{block {INNER}}}}}"), "`conclusion` holds {{block"),
    (OUTER, changed(OUTER, "outlines", 0, value=f"do {{{{block {INNER}}}}}"), "`outlines` holds {{block"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "answer", "reason"), REFUSALS, ids=[f"{key}: {why}" for key, _, why in REFUSALS])
def test_a_bad_answer_is_refused_with_its_reason(key, answer, reason):
    name = key if key in BY_NAME else "branches"
    stage, draft = BY_NAME[name], curated(until=name)
    if key == OUTER:
        draft = stage.accept(CHAIN, draft, {INNER: json.dumps(ANSWERS[INNER])})
    with pytest.raises(StageFailure, match=re.escape(reason)) as failure:
        stage.accept(CHAIN, draft, {key: json.dumps(answer)})
    assert failure.value.stage == name
    if name == "branches":
        assert f"In block {key}, " in failure.value.reason


@pytest.mark.parametrize("key", [*(name for name in PROMPTED if name != "branches"), INNER])
def test_every_stage_refuses_an_answer_that_was_cut_off(key):
    name = key if key in BY_NAME else "branches"
    with pytest.raises(StageFailure, match="cut off") as failure:
        BY_NAME[name].accept(CHAIN, curated(until=name), {key: json.dumps(ANSWERS[key])[:-2]})
    assert failure.value.stage == name


def test_every_template_has_a_version_in_its_first_line_and_no_unknown_values():
    for name in PROMPTED:
        first = (templates.FOLDER / f"{name}.md.jinja").read_text(encoding="utf-8").splitlines()[0]
        assert first == f"{{# version: {BY_NAME[name].version} #}}"
        with pytest.raises(UndefinedError):
            templates.messages(name)


def test_a_changed_prompt_has_a_new_version():
    # Provenance names versions. Whoever changes a template raises its version, and then this table.
    tail = (templates.FOLDER / "_complaint.md.jinja").read_bytes()
    contents = {name: (templates.FOLDER / f"{name}.md.jinja").read_bytes() + tail for name in PROMPTED}
    found = {
        name: (BY_NAME[name].version, hashlib.sha256(content).hexdigest()[:12]) for name, content in contents.items()
    }
    assert found == {
        "steps": ("1", "10b4be3f2f57"),
        "substeps": ("1", "45e9603ce1e7"),
        "groups": ("1", "25460f6c5f90"),
        "refill": ("1", "dcb902feadf2"),
        "branches": ("1", "b4288302bbf6"),
    }
