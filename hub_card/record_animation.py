"""Records an answer of the demo model as an animated picture: the README's first one.

`python -m multiverse.hub_card.record_animation hub_card/results/branches.gif` (needs playwright and Chromium).
"""

import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from multiverse.generation.request import Request
from multiverse.generation.streaming import BranchStreamer
from multiverse.hub_card.checkpoint import load_demo_model
from multiverse.hub_card.drawings import STYLE
from multiverse.hub_card.live_tree import LiveTree, tree_panels, writing
from multiverse.hub_card.space_page import SPACE_STYLE
from multiverse.trainer.synthetic import train_and_test

_STYLE = """
body { margin: 0; padding: 12px 16px; font-family: system-ui, sans-serif; background: #fff; color: #1c1e21; }
.live-caret { animation: none; }
.live-text { font-size: 0.8rem; }
.live-path { min-height: 14.2rem; }
.live-path .live-text { max-height: none; }
p { margin: 0 0 0.4rem; font-variant-numeric: tabular-nums; }
"""


class _Frames(BranchStreamer):
    """The tree after every few steps, as HTML."""

    def __init__(self, tokenizer, every: int) -> None:
        self.tree, self.every = LiveTree(tokenizer), every
        self.frames: list[str] = []

    def put_step(self, requests: Sequence[Request]) -> None:
        request = requests[0]
        if request.finished or request.steps % self.every == 0:
            root = self.tree.read(request)
            now = writing(root)
            head = f"<p><b>step {request.steps}</b> · {request.made} tokens · {now or 'none'} being written</p>"
            self.frames.append(head + tree_panels(root, ended=request.finished))


def main(
    output: Annotated[Path, typer.Argument(help="File of the picture, a GIF.")],
    problem: Annotated[int, typer.Option(min=0, max=255, help="Held-out problem to answer.")] = 8,
    every: Annotated[int, typer.Option(min=1, help="Steps between two frames.")] = 3,
    width: Annotated[int, typer.Option(min=300, help="Of the picture, in pixels.")] = 760,
    height: Annotated[int, typer.Option(min=300, help="Of the picture, in pixels.")] = 420,
) -> None:
    """Lets the shipped model answer and draws what it has written after every few steps."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise typer.BadParameter("Chromium is not installed (Debian: `apt install chromium`).")
    model, tokenizer = load_demo_model()
    chosen = train_and_test(0, 256)[1][problem]
    prompt = tokenizer.apply_chat_template(
        chosen.messages("parallel")["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    streamer = _Frames(tokenizer, every)
    report = model.generate(
        **prompt, do_sample=False, max_new_tokens=1200, return_dict_in_generate=True, streamer=streamer
    ).reports[0]
    pictures = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height})
        for frame in streamer.frames:
            page.set_content(f"<style>{STYLE}{SPACE_STYLE}{_STYLE}</style>{frame}")
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            pictures.append(picture.quantize(48, dither=Image.Dither.NONE))
        browser.close()
    output.parent.mkdir(parents=True, exist_ok=True)
    durations = [90] * (len(pictures) - 1) + [4000]
    pictures[0].save(output, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
    print(
        f"{output}: {len(pictures)} frames, {output.stat().st_size / 1e3:.0f} kB, {report.generated_tokens} tokens "
        f"in {report.sequential_steps} steps"
    )


if __name__ == "__main__":
    typer.run(main)
