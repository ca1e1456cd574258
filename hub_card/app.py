"""The Space: type a problem, and watch the branches of its answer grow side by side and merge.

`make space`, or `python -m multiverse.hub_card.app --model me/my-model`.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
import typer
from multiverse import MultiverseForCausalLM
from multiverse.hub_card.checkpoint import load_demo_model
from multiverse.hub_card.space_page import HINT, SPACE_STYLE, lanes_html, results_html
from multiverse.hub_card.space_runs import MOST_CHARACTERS, Generation, encode
from multiverse.hub_card.turns import Turns
from multiverse.trainer.forms import PARALLEL_PROMPT
from multiverse.trainer.synthetic import train_and_test
from transformers import AutoTokenizer

PARALLEL, SEQUENTIAL, RACE = "in parallel", "one path at a time", "race: both at once"
_MODES = {PARALLEL: (True,), SEQUENTIAL: (False,), RACE: (True, False)}
#: Held-out problems to try, by their number.
_EXAMPLES = {5: "three sums", 1: "five sums", 10: "a sum made of two parts", 2: "two sums"}
_FRAME = 0.12

_INTRODUCTION = """# Multiverse: a model that works on several parts at once

This small model (135M, on a CPU) sums up named values. It decides by itself how to split a problem, works on all parts
**at the same time**, and then brings them together. The parts do not see each other, so they cost no more steps than
the longest of them.
"""


class Space:
    """A model and everything that is being decoded with it, by the session that asked.

    Args:
        model, tokenizer: a Multiverse model and its tokenizer.
        system (`str`): system message of every prompt.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str = PARALLEL_PROMPT) -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.turns = Turns()
        self.sessions: dict[str | None, list[Generation]] = {}
        # What is done once for a model must not be on the clock of whoever comes first.
        prompt = encode(tokenizer, system, "Find A.\nA = 1+1", model.device)
        model.generate(**prompt, do_sample=False, max_new_tokens=40)

    def run(self, question: str, mode: str, length: float, session: str | None) -> Iterator[tuple[str, str]]:
        """Yields lanes and results, a few times a second, until all generations of this run have ended.

        Raises:
            ValueError: if the question is missing or too long.
        """
        prompt = encode(self.tokenizer, self.system, question, self.model.device)
        self.stop(session)
        generations = [
            Generation(self.model, self.tokenizer, prompt, self.turns, parallel, int(length))
            for parallel in _MODES[mode]
        ]
        self.sessions[session] = generations
        try:
            for generation in generations:
                generation.start()
            while not all(each.progress.ended for each in generations):
                yield lanes_html(generations), ""
                time.sleep(_FRAME)
        finally:
            # Also when the page was closed.
            for generation in generations:
                generation.stop()
            if self.sessions.get(session) is generations:
                del self.sessions[session]
        token_ids = self.model.config.multiverse_token_ids
        yield lanes_html(generations), results_html(generations, self.tokenizer, token_ids)

    def stop(self, session: str | None) -> None:
        """Ends what a session has running."""
        for generation in self.sessions.get(session, ()):
            generation.stop()


def build(space: Space) -> gr.Blocks:
    """The page."""
    _, held_out = train_and_test(0, max(_EXAMPLES) + 1)

    def run(question: str, mode: str, length: float, request: gr.Request) -> Iterator[tuple[str, str, Any]]:
        try:
            for lanes, results in space.run(question, mode, length, request.session_hash):
                yield lanes, results, gr.update(interactive=not results)
        except ValueError as error:
            raise gr.Error(str(error), duration=8, print_exception=False, title="Not run") from error

    def stop(request: gr.Request) -> None:
        space.stop(request.session_hash)

    with gr.Blocks(title="Multiverse") as page:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            question = gr.Textbox(
                label="Problem",
                value=held_out[next(iter(_EXAMPLES))].question,
                lines=5,
                max_lines=10,
                max_length=MOST_CHARACTERS,
                scale=3,
            )
            with gr.Column(scale=2, min_width=260):
                mode = gr.Radio(list(_MODES), value=PARALLEL, label="How the paths are decoded")
                length = gr.Slider(64, 1200, value=1000, step=8, label="Longest answer (tokens, all paths)")
                with gr.Row():
                    start = gr.Button("Run", variant="primary", min_width=100)
                    end = gr.Button("Stop", variant="stop", interactive=False, min_width=100)
        gr.Examples(
            [[held_out[number].question] for number in _EXAMPLES],
            [question],
            label="Problems to try",
            example_labels=list(_EXAMPLES.values()),
        )
        lanes = gr.HTML(HINT, label="Branches", elem_id="lanes")
        results = gr.HTML("", label="Results", elem_id="results")
        running = start.click(
            run, [question, mode, length], [lanes, results, end], concurrency_limit=8, show_progress="hidden"
        )
        running.then(lambda: gr.update(interactive=False), None, end, queue=False)
        end.click(stop, None, None, queue=False)
        page.unload(stop)
    return page


def main(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint, folder or Hub id; by default the shipped one.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="An adapter of this project, in the place of a model.")] = None,
    system: Annotated[str, typer.Option(help="System message of every prompt.")] = PARALLEL_PROMPT,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where to listen.")] = 7860,
) -> None:
    """Starts the page."""
    if model is not None and adapter is not None:
        raise typer.BadParameter("--model and --adapter exclude each other.")
    if model is not None:
        loaded = MultiverseForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    else:
        loaded = load_demo_model(adapter) if adapter is not None else load_demo_model()
    build(Space(*loaded, system)).launch(
        server_name=host, server_port=port, css=SPACE_STYLE, theme=gr.themes.Default(), footer_links=[]
    )


if __name__ == "__main__":
    typer.run(main)
