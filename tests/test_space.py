"""The Space without a browser: what it runs, shows, refuses and survives."""

import re
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from grpo_runs import fresh
from multiverse.generation.streaming import BranchStreamer
from multiverse.hub_card.live_tree import LiveTree, Node, tree_panels
from multiverse.hub_card.space_page import lanes_html, results_html
from multiverse.hub_card.space_runs import MOST_CHARACTERS, Generation, encode
from multiverse.hub_card.turns import Turns
from multiverse.tags import TAGS

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

FORK = "a<Parallel>\n<Goal>\n" + "".join(f"<Outline>\n{n}: b\n</Outline>\n" for n in (1, 2, 3)) + "</Goal>\n"


@pytest.fixture(scope="module")
def model_and_tokenizer():
    model, tokenizer = fresh("llama")
    # So that no path ends by the limit on all of them, which may fall on another token in another mode.
    model.generation_config.max_path_tokens = 20
    return model.eval(), tokenizer


def generations(model_and_tokenizer, modes, length=120, turns=None, text=FORK) -> list[Generation]:
    model, tokenizer = model_and_tokenizer
    prompt = dict(tokenizer(text, return_tensors="pt"))
    turns = turns or Turns()
    return [Generation(model, tokenizer, prompt, turns, parallel, length) for parallel in modes]


def finish(runs: list[Generation]) -> None:
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
        assert run.progress.ended


class Reader(HTMLParser):
    """Elements, their attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_race_of_two_modes_writes_what_each_writes_alone(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    alone = model.generate(**tokenizer(FORK, return_tensors="pt"), do_sample=False, max_new_tokens=120)
    # Two people who race at once.
    runs = generations(model_and_tokenizer, (True, False, True, False), turns=Turns())
    finish(runs)
    for run in runs:
        assert run.progress.error is None
        assert torch.equal(run.progress.output.sequences, alone)
        report = run.progress.output.reports[0]
        assert (run.progress.steps, run.progress.tokens) == (report.sequential_steps, report.generated_tokens)
        assert run.progress.seconds > 0
    assert runs[0].progress.steps < runs[1].progress.steps


def test_three_columns_grow_at_once_and_one_in_sequential_mode(model_and_tokenizer):
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for parallel in seen:
        model, tokenizer = model_and_tokenizer
        tree = LiveTree(tokenizer, None if parallel else 1)

        class Watch(BranchStreamer):
            def put_step(self, requests, tree=tree, parallel=parallel):
                root = tree.read(requests[0])
                cards = [node for node in root.nodes() if node.label]
                seen[parallel].add(sum(node.state == "writing" for node in cards))
                assert {node.state for node in root.nodes()} <= {"writing", "queued", "waiting", "finished"}
                assert len({node.number for node in root.nodes()}) == len(list(root.nodes()))

        model.generate(
            **tokenizer(FORK, return_tensors="pt"),
            do_sample=False,
            max_new_tokens=120,
            parallel=parallel,
            streamer=Watch(),
        )
    assert max(seen[True]) >= 3
    assert max(seen[False]) == 1


def test_stop_keeps_what_was_written(model_and_tokenizer):
    (run,) = generations(model_and_tokenizer, (True,), length=1000)
    run.start()
    while run.progress.steps < 5 and not run.progress.ended:
        time.sleep(0.001)
    run.stop()
    run.join(60)
    assert run.progress.stopped
    assert run.progress.error is None
    output = run.progress.output
    assert 5 <= output.reports[0].sequential_steps < 1000
    assert output.reports[0].finish_reason == "interrupted"
    _, tokenizer = model_and_tokenizer
    page = results_html([run], tokenizer, model_and_tokenizer[0].config.multiverse_token_ids)
    assert "Stopped." in page
    assert "</svg>" in page


def test_a_failure_is_shown_and_does_not_hold_the_others_up(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    turns = Turns()
    (good,) = generations(model_and_tokenizer, (True,), turns=turns)

    def broken(**options):
        raise RuntimeError("<b>no memory</b>")

    bad = Generation(SimpleNamespace(generate=broken), tokenizer, good_prompt(tokenizer), turns, True, 10)
    finish([bad, good])
    assert good.progress.error is None
    page = Reader(lanes_html([bad, good]))
    assert "<b>no memory</b>" in page.text
    assert ("b", {}) not in page.elements[:4]
    assert "failed" in results_html([bad, good], tokenizer, model.config.multiverse_token_ids)


def good_prompt(tokenizer):
    return dict(tokenizer(FORK, return_tensors="pt"))


def test_lanes_and_results_hold_the_whole_text(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    runs = generations(model_and_tokenizer, (True, False))
    assert "reading the problem" in lanes_html(runs)
    finish(runs)
    page = Reader(lanes_html(runs))
    made = tokenizer.decode(runs[0].progress.output.sequences[0, runs[0].prompt_length :], skip_special_tokens=True)

    def words(text: str) -> str:
        return re.sub(r"\s+", "", text)

    # Once in either lane, whatever stands between the branches; random text holds characters that no page can.
    for piece in re.split("|".join(TAGS), made):
        if piece.strip() and "\ufffd" not in piece and piece.isprintable():
            assert words(page.text).count(words(piece)) >= 2
    results = Reader(results_html(runs, tokenizer, model.config.multiverse_token_ids))
    assert sum(tag == "svg" for tag, _ in results.elements) >= 3
    assert "The same text, token for token" in results.text


def test_text_of_the_model_is_text():
    trick = '<img src=x onerror="alert(1)"><script>alert(2)</script>${alert(3)}{{4}}' + "a" * 3000
    root = Node("", 0, "writing", [trick, [Node('1"><script>', 1, "writing", [trick])]])
    page = Reader(tree_panels(root))
    assert {tag for tag, _ in page.elements} <= {"div", "section", "header", "b", "span"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("<script>alert(2)</script>") == 2


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "no problem yet"),
        (" \n\t", "no problem yet"),
        ("a" * (MOST_CHARACTERS + 1), "4,001 characters"),
        ("1 " * 1999, "tokens"),
    ],
)
def test_questions_that_cannot_be_asked_say_so(question, message, model_and_tokenizer):
    with pytest.raises(ValueError, match=message):
        encode(model_and_tokenizer[1], "system", question, "cpu")


@pytest.fixture(scope="module")
def served(model_and_tokenizer):
    from multiverse.hub_card.app import Space, build

    space = Space(*model_and_tokenizer, "Think.")
    page = build(space)
    _, url, _ = page.launch(server_port=None, prevent_thread_lock=True, quiet=True, footer_links=[])
    yield space, url
    page.close()


def test_two_sessions_run_at_once_and_each_gets_its_own(served):
    space, url = served
    clients = [gradio_client.Client(url, verbose=False) for _ in range(2)]
    questions = ["Find A.\nA = 1+2", "Find B.\nB = 2+3\n" + FORK]
    jobs = [
        client.submit(question, mode, 100, api_name="/run")
        for client, question, mode in zip(clients, questions, ("race: both at once", "in parallel"), strict=True)
    ]
    results = [job.result(timeout=120) for job in jobs]
    assert all(len(job.outputs()) > 1 for job in jobs)
    assert [result[0].count("live-lane-finished") for result in results] == [2, 1]
    assert "instead of" in results[0][1]
    assert "sequential steps" in results[1][1]
    assert space.sessions == {}


def test_stop_of_one_session_leaves_the_other_alone(served):
    space, url = served
    clients = [gradio_client.Client(url, verbose=False) for _ in range(2)]
    with space.turns.lane():  # nobody gets a step before both are there and one has pressed Stop
        jobs = [client.submit("Find A.", "in parallel", 100, api_name="/run") for client in clients]
        until(lambda: len(space.turns.lanes) == 3)
        clients[0].predict(api_name="/stop")
    stopped, other = (job.result(timeout=120) for job in jobs)
    assert "Stopped." in stopped[1]
    assert "Stopped." not in other[1]


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_refused_question_reaches_the_person(served):
    _, url = served
    with pytest.raises(gradio_client.exceptions.AppError, match="no problem yet"):
        gradio_client.Client(url, verbose=False).predict("", "in parallel", 100, api_name="/run")
