"""The page of a report holds what models and people write, and stays small, itself and the same."""

import re
from html import unescape

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from multiverse.evaluation.report import model_index
from multiverse.evaluation.report_generations import choose
from multiverse.evaluation.report_page import LARGEST, render_markdown, render_page, without_times
from page_reader import NASTY, Reader
from reported import (
    FACTS,
    GOOD,
    PARALLEL,
    SEQUENTIAL,
    broken,
    check_page,
    condition,
    curve,
    markdown_tables,
    prompts,
    record,
    row,
    speed,
    summary_of,
    tables_of,
    whole,
    wrong,
)

#: What a model could write to get out of its place, or to run.
HOSTILE = (
    *NASTY,
    "</script><svg onload=alert(1)>",
    "<!-- times -->",
    "{{ 7*7 }}{% raw %}",
    "\x00\ud800",
    "a|b\n# c\n```\n",
)


@pytest.mark.parametrize("text", [*HOSTILE, GOOD + HOSTILE[-4], "<Parallel><Goal><Outline>" * 30 + "".join(NASTY[:4])])
def test_what_a_model_writes_stays_text(text):
    records = [wrong(PARALLEL, answer=text, expected=text, reason=text, text=text, question=text)]
    summary = summary_of([row(records)])
    page = render_page(summary, records, {"sums": {"texts": {text: text}, "source": "x"}}, {})
    check_page(page)
    plain = render_page(summary, [wrong(PARALLEL, text="word", question="word")], {}, {})
    kinds = {tag for tag, _ in Reader(page).elements} - {tag for tag, _ in Reader(plain).elements}
    assert kinds <= {"g", "rect", "svg", "title", "text", "path", "section", "strong", "h4"}
    assert "7*7" in page or "7*7" not in text


def test_the_text_of_a_generation_is_there_to_the_letter():
    text = "Is 1 < 2 & \"3\" > '2'?\n<Parallel>\n<Goal>\nnone\n</Goal>\n</Parallel>\n\n  kept   blanks \u202e 😀"
    records = [record(PARALLEL, text=text)]
    page = render_page(summary_of([row(records)]), records, {}, {})
    tree = re.search(r'<div class="mv mv-tree">(.*?)</section><section|<div class="mv mv-tree">(.*)', page, re.DOTALL)[
        0
    ]
    tree = re.sub(r"<summary>.*?</summary>|<h4>.*?</h4>|<strong.*?</strong>", "", tree[: tree.index("</section>\n")])
    assert text in unescape(re.sub("<[^>]*>", "", tree))


@pytest.mark.parametrize("word", HOSTILE)
def test_names_that_people_choose_stay_text(word):
    own = condition(task=word)
    records = [record(own)]
    summary = summary_of(
        [row(records)],
        settings={"model": word, word: {word: [word, 1]}, "limit": 3},
        budget_curves=[curve(own)],
        speed=[speed(1, 8, task=word), speed(2, 8, task=word)],
        sessions=[{"rank": 0, "started": 0.5, "machine": {word: word}}],
        checkpoint={word: word},
    )
    facts = {word: {"source": word, word: word}}
    check_page(render_page(summary, records, facts, prompts(word)))
    text = render_markdown(summary, facts, prompts(word))
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert not re.findall(r"<(script|img|svg|div|details|section|Path)\b", html)
    assert html.count("<h1>") == 1
    # No row has got more or fewer cells than its head.
    for table in markdown_tables(text):
        assert len({len(cells) for cells in table}) == 1
    text.encode()


def test_the_same_run_gives_the_same_bytes():
    summary, records = whole()
    for render in (
        lambda: render_page(summary, records, FACTS, prompts("sums")),
        lambda: render_markdown(summary, FACTS, prompts("sums")),
    ):
        assert render() == render()


def test_a_rerun_differs_in_its_times_alone():
    summary, records = whole()
    again, later = whole()
    for each in again["conditions"]:
        each["times"] |= {"first_token_seconds": 1.25, "seconds": {"prefill": 77.0}, "peak_memory_bytes": 2**31}
    again["speed"] = [speed(1, 64, 2.5)]
    again["sessions"] = [{"rank": 0, "started": 1.5e9}, {"rank": 1, "started": 1.6e9}]
    for each in later:
        each["times"] = {"batch_rows": 1, "batch_seconds": 99.0}
    for first, second in (
        (render_page(summary, records, FACTS, {}), render_page(again, later, FACTS, {})),
        (render_markdown(summary, FACTS, {}), render_markdown(again, FACTS, {})),
    ):
        assert first != second
        assert without_times(first) == without_times(second)
        assert len(without_times(first)) > 0.5 * len(second)
    changed = [*records[:-1], {**records[-1], "answer": "13"}]
    assert without_times(render_page(summary, changed, FACTS, {})) != without_times(
        render_page(summary, records, FACTS, {})
    )


def test_times_do_not_decide_how_much_text_is_shown():
    """Where the page is full, a longer table of times must not push a generation out."""
    records = [wrong(PARALLEL, number, text="7" * 60_000) for number in range(100)]
    summary = summary_of([row(records)])
    longer = {**summary, "speed": [speed(2**power, 8) for power in range(8)]}
    first, second = (render_page(each, records, {}, {}) for each in (summary, longer))
    assert len(first) < len(second)
    assert without_times(first) == without_times(second)


@pytest.mark.parametrize(
    "text",
    ["<" * 40_000, "<Parallel>\n<Path>\n" * 2000, "é\x00" * 20_000 + "<Path>" * 90],
)
def test_the_page_stays_small_however_much_was_written(text):
    records = [
        make(each, number, text=f"first {text} last", answer=text, reason=text[:50])
        for each in (PARALLEL, SEQUENTIAL)
        for number in range(110)
        for make in (wrong, broken, record)
    ]
    page = render_page(summary_of([row(records[:330]), row(records[330:])]), records, {}, {})
    assert len(page.encode()) <= 5_000_000
    assert len(without_times(page).encode()) <= LARGEST
    check_page(page)
    shown = re.findall(r'id="generation-\d+"', page)
    assert len(shown) > 200
    assert re.search(r"[\d,]+ of 660 generations are shown \(440 of all are wrong\)", page)
    cut = re.search(r"([\d,]+) long texts are shown without their middle", page)
    assert int(cut[1]) == len(re.findall('tabindex="0">[^<]*characters are left out', page))
    assert page.count("first ") >= len(shown)
    assert page.count(" last</div>") == len(shown)


def test_many_tasks():
    conditions = [condition(f"subject_{number:02d}") for number in range(57)]
    records = [make(each, number) for each in conditions for number, make in enumerate((record, wrong, broken))]
    rows = [row([each for each in records if each["task"] == own["task"]]) for own in conditions]
    curves, calls = [curve(each) for each in conditions], [speed(1, 8, task=each["task"]) for each in conditions]
    page = render_page(summary_of(rows, budget_curves=curves, speed=calls), records, {}, {})
    check_page(page)
    # What is not drawn stands in the tables.
    drawn = page.count('class="ev-picture"')
    assert drawn < 20
    assert page.count("of 57 are drawn; the table has all") == 2
    assert len(page.encode()) < 5_000_000
    rows = tables_of(page)["pass@1, % (95% interval) and # parallel, by task"]
    assert rows[0][1:] == [each["task"] for each in conditions]
    assert "52 more tasks" in page
    assert len(tables_of(page)["Accuracy against sequential steps allowed"]) == 1 + 4 * 57


def test_generations_are_chosen_from_all_conditions_in_turn():
    records = [wrong(PARALLEL, number) for number in range(300)]
    records += [wrong(SEQUENTIAL, number) for number in range(3)]
    records += [record(SEQUENTIAL, number) for number in range(3, 60)]
    records += [record(PARALLEL, number, problems=["unclosed tag"]) for number in range(300, 400)]
    chosen = choose(records, wrong=10, right=4, malformed=5)
    names = [(each["mode"], each["question_number"], each["right"]) for each in chosen]
    assert names == [
        *(("parallel", number, False) for number in range(7)),
        *(("sequential", number, False) for number in range(3)),
        *(("sequential", number, True) for number in (3, 4)),
        *(("parallel", number, True) for number in range(300, 307)),
    ]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=60), st.data())
def test_choosing_is_fair_and_keeps_order(drawn, data):
    records = [
        record(condition(task), number, right=right, problems=["unclosed tag"] if bad else [])
        for number, (task, right, bad) in enumerate(drawn)
    ]
    most = [data.draw(st.integers(0, 12)) for _ in range(3)]
    chosen = choose(records, *most)
    numbers = [each["question_number"] for each in chosen]
    assert numbers == sorted(set(numbers))
    wrongs = [each for each in chosen if not each["right"]]
    assert len(wrongs) >= min(most[0], sum(not each["right"] for each in records))
    assert len(chosen) <= sum(most)
    left = [each for each in records if each["problems"] and each["question_number"] not in numbers]
    # A malformed one is left out only where as many more were taken as may be.
    if left:
        plain = min(most[0], sum(not r["right"] for r in records)) + min(most[1], sum(r["right"] for r in records))
        assert len(chosen) == plain + most[2]
    # Of the wrong ones no condition has two fewer than another, unless it has no more.
    counts = {task: sum(each["task"] == task for each in wrongs) for task in "abc"}
    for task, count in counts.items():
        if any(not each["right"] and each["task"] == task for each in left_of(records, numbers)) and not most[2]:
            assert count >= max(counts.values()) - 1


def left_of(records: list[dict], numbers: list[int]) -> list[dict]:
    """Those that were not chosen."""
    return [each for each in records if each["question_number"] not in numbers]


LETTERS = st.text(st.characters(codec=None), max_size=60)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LETTERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LETTERS, LETTERS, st.dictionaries(LETTERS, VALUES, max_size=4), st.floats(0, 1) | st.none())
def test_odd_values_make_a_page_all_the_same(words, task, values, share):
    own = condition(task)
    records = [wrong(own, text=words, answer=words), record(own, 1, text=GOOD + words)]
    figures = row(records, pass_at_1=share, pass_at_1_interval_95=[share, share], finish_reasons={words: 1})
    summary = summary_of([figures], settings={"model": words, **values}, checkpoint=values)
    facts = {task: {"source": words, **values, "texts": {}}}
    check_page(render_page(summary, records, facts, prompts(task)))
    text = render_markdown(summary, facts, prompts(task))
    for table in markdown_tables(text):
        assert len({len(cells) for cells in table}) == 1
    yaml.safe_load(model_index(summary, facts))


def test_questions_are_shown_where_they_may_be():
    records = [record(PARALLEL, 3)]
    summary = summary_of([row(records)])
    facts = {"sums": {"source": "x", "texts": {"sums-0003": "How much is <b>3</b>?"}}}
    page = render_page(summary, records, facts, {})
    assert page.count("How much is &lt;b&gt;3&lt;/b&gt;?") == 1
    assert "How much" not in render_markdown(summary, facts, {})
