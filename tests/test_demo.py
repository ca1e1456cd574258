"""The shipped adapter on the real base model, through the demo as a user starts it."""

import re

import pytest
import torch
import typer
from multiverse.hub_card.checkpoint import load_demo_model
from multiverse.hub_card.demo import main
from multiverse.hub_card.live_view import LiveBranches, timeline
from multiverse.trainer.held_out import summarise
from rich.console import Console
from tiny import FIRST_WORD, NEWLINE, TOKEN_IDS, tiny_model, tiny_tokenizer
from typer.testing import CliRunner


def test_the_demo_answers_a_held_out_problem_in_parallel():
    app = typer.Typer()
    app.command()(main)
    # The one with the shortest answer.
    result = CliRunner().invoke(app, ["--problems", "1", "--first", "254"])
    assert result.exit_code == 0, result.output
    assert "structure valid" in result.output
    assert "1/1 answers token for token the same" in result.output
    steps = re.search(r"(\d+) tokens in (\d+) sequential", result.output)
    assert steps is not None
    assert int(steps[1]) > 1.5 * int(steps[2])


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(ValueError, match="`adapter`"):
        load_demo_model(tmp_path)


def test_the_live_view_shows_every_running_path():
    model = tiny_model("llama", torch.float32)
    tags = TOKEN_IDS
    goal = [tags["<Parallel>"], NEWLINE, tags["<Goal>"]]
    for _ in range(3):
        goal += [tags["<Outline>"], FIRST_WORD, tags["</Outline>"]]
    console = Console(width=120, record=True)
    view = LiveBranches(tiny_tokenizer(), console)
    prompt = torch.tensor([[*goal, tags["</Goal>"]]])
    model.generate(prompt, max_new_tokens=80, max_path_tokens=18, do_sample=False, streamer=view)
    assert view.widest is not None
    console.print(view.widest)
    shown = console.export_text()
    assert all(f"path {number}" in shown for number in (1, 2, 3))
    assert "branches running 3" in shown


def test_timeline_bars_cover_their_steps():
    spans = [("", 1, 100), ("1", 1, 50), ("2", 51, 100), ("3", None, None)]
    lines = timeline(spans, steps=100, width=20).plain.splitlines()
    assert [line.count("█") for line in lines] == [20, 10, 10]
    assert lines[2].endswith("█" * 10)


def test_the_summary_counts_what_the_records_say():
    records = [
        {"right": True, "valid": True, "generated_tokens": 300, "sequential_steps": 100},
        {"right": False, "valid": True, "generated_tokens": 100, "sequential_steps": 100},
    ]
    summary = summarise(records)
    assert summary["accuracy"] == 0.5
    assert summary["valid_structure"] == 1.0
    assert summary["mean_degree_of_parallelism"] == 2.0
    assert summary["sequential_steps"] == 100.0
