"""What the Space shows: lanes while they are written, and their figures, timelines and mask when they have ended."""

from collections.abc import Mapping, Sequence
from typing import Any

from multiverse import BranchLayout
from multiverse.hub_card.drawings import STYLE, escaped, mask_svg, timeline_svg
from multiverse.hub_card.live_tree import tree_panels
from multiverse.hub_card.page import TaggedText
from multiverse.hub_card.space_runs import Generation
from transformers import PreTrainedTokenizerBase

NAMES = {True: "in parallel", False: "one path at a time"}

HINT = (
    '<p class="live-hint">Press <b>Run</b>. The model writes a goal with one outline per part; then every part gets a '
    "column of its own, and all columns grow at once. When the last one is done, they merge and the model concludes."
    "</p>"
)


def lanes_html(generations: Sequence[Generation]) -> str:
    """All generations as they stand, side by side."""
    ended = [each.progress.seconds for each in generations if each.progress.output is not None]
    parts = [f'<div class="live-lanes live-lanes-{len(generations)}">']
    for generation in generations:
        progress = generation.progress
        first = len(generations) > 1 and ended and progress.seconds == min(ended) and progress.output is not None
        state = "stopped" if progress.stopped else "finished" if progress.output is not None else "running"
        figures = {
            "seconds": f"{progress.seconds:.1f}",
            "steps": f"{progress.steps:,}",
            "tokens": f"{progress.tokens:,}",
            "writing now": f"{0 if progress.ended else progress.running}",
        }
        cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
        badge = ' <span class="live-first">first</span>' if first else ""
        parts.append(
            f'<section class="live-lane live-lane-{state}" aria-label="{NAMES[generation.parallel]}, {state}">'
            f'<h3>{NAMES[generation.parallel]}{badge}</h3><dl class="live-figures">{cells}</dl>'
        )
        if progress.error is not None:
            parts.append(f'<p class="live-error">{escaped(str(progress.error) or type(progress.error).__name__)}</p>')
        if progress.tree is not None:
            parts.append(tree_panels(progress.tree, progress.ended))
        else:
            parts.append('<p class="live-hint">reading the problem …</p>')
        parts.append("</section>")
    return "".join([*parts, "</div>"])


def results_html(
    generations: Sequence[Generation], tokenizer: PreTrainedTokenizerBase, token_ids: Mapping[str, int]
) -> str:
    """Verdict, figures, timelines on one axis, and the attention mask of the first text that has paths."""
    ended = [each for each in generations if each.progress.output is not None]
    if not ended:
        return ""
    texts = {each: _text(each, tokenizer, token_ids) for each in ended}
    steps = max(text.steps for text in texts.values())
    parts = [f"<style>{STYLE}</style>", '<div class="mv live-results">', _verdict(generations)]
    parts.append("<h3>When each branch was written</h3><p>Steps from left to right, a row for each branch. In a step ")
    parts.append("every branch that is being written gets a token; a dotted line waits for its paths.</p>")
    for generation, text in texts.items():
        name = NAMES[generation.parallel]
        if len(texts) > 1:
            parts.append(f"<h4>{name}</h4>")
        picture = timeline_svg(text.spans, steps, 840, name=f"Timeline, {name}")
        parts.append(f'<div class="mv-scroll" tabindex="0">{picture}</div>')
    text = next((each for each in texts.values() if each.layout.blocks), next(iter(texts.values())))
    figures = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in text.figures().items()
    )
    parts.append(f'<h3>The text</h3><dl class="live-figures">{figures}</dl>')
    parts.append(
        "<h3>Who sees whom</h3><p>Each row is a token and each column one that it may look at, in the colour "
    )
    parts.append("of its branch. The white steps beside the diagonal are the point: paths do not see each other, so ")
    parts.append("none has to wait for another. The conclusion, at the bottom, sees all of them.</p>")
    parts.append(f'<div class="mv-scroll" tabindex="0">{mask_svg(text.layout, 420, start=text.start)}</div>')
    return "".join([*parts, "</div>"])


def _text(generation: Generation, tokenizer: Any, token_ids: Mapping[str, int]) -> TaggedText:
    output = generation.progress.output
    assert output is not None
    ids = output.sequences[0]
    return TaggedText(
        name=NAMES[generation.parallel],
        layout=BranchLayout.from_token_ids(ids, token_ids),
        text_of=lambda start, end: str(tokenizer.decode(ids[start:end])),
        start=generation.prompt_length,
        report=output.reports[0].to_dict(),
    )


def _verdict(generations: Sequence[Generation]) -> str:
    done = [each.progress for each in generations]
    if any(progress.stopped for progress in done):
        return (
            '<p class="live-verdict">Stopped. What was written until then is kept, and closed so that it is whole.</p>'
        )
    if any(progress.output is None for progress in done):
        return '<p class="live-verdict">One of the two has failed.</p>'
    outputs = [progress.output for progress in done if progress.output is not None]
    reports = [output.reports[0] for output in outputs]
    if len(done) == 1:
        report = reports[0]
        words = (
            f"{report.generated_tokens:,} tokens in <b>{report.sequential_steps:,} sequential steps</b> and "
            f"{done[0].seconds:.1f} seconds: {report.degree_of_parallelism:.2f} tokens a step."
        )
        if report.finish_reason == "length":
            words += " The answer was cut off by the limit on its length, and closed."
        return f'<p class="live-verdict">{words}</p>'
    (fast, slow), same = sorted(done, key=lambda each: each.seconds), outputs[0].sequences.equal(outputs[1].sequences)
    return (
        f'<p class="live-verdict">{"The same text, token for token," if same else "Two texts"} in '
        f"<b>{fast.seconds:.1f} instead of {slow.seconds:.1f} seconds</b>, "
        f"{slow.seconds / fast.seconds:.2f} times faster: "
        f"{min(report.sequential_steps for report in reports):,} steps instead of "
        f"{max(report.sequential_steps for report in reports):,}.</p>"
    )


SPACE_STYLE = """
.live-lanes { display: grid; gap: 1rem; }
.live-lanes-2 { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); align-items: start; }
.live-lane { border: 1px solid color-mix(in srgb, currentColor 22%, transparent); border-radius: 8px;
  padding: 0.7rem 0.9rem; min-width: 0; }
.live-lane h3 { margin: 0 0 0.3rem; font-size: 1.05rem; }
.live-first { background: #1b7f4b; color: #fff; border-radius: 4px; padding: 0 0.5em; font-size: 0.8em; }
.live-figures { display: flex; flex-wrap: wrap; gap: 0.4rem; margin: 0.3rem 0 0.6rem; }
.live-figures div { border: 1px solid color-mix(in srgb, currentColor 20%, transparent); border-radius: 6px;
  padding: 0.15rem 0.6rem; min-width: 4.4rem; }
.live-figures dt { font-size: 0.75rem; opacity: 0.75; }
.live-figures dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.live-paths { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9rem), 1fr)); gap: 0.5rem;
  margin: 0.5rem 0; }
.live-path { border-top: 4px solid var(--mv-branch); border-radius: 4px; padding: 0.3rem 0.5rem; min-width: 0;
  background: color-mix(in srgb, var(--mv-branch) 9%, transparent); }
.live-path:has(.live-paths) { grid-column: 1 / -1; }
.live-path header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 0.5rem;
  font-size: 0.85rem; }
.live-state { opacity: 0.75; }
.live-writing > header .live-state::before { content: "● "; color: var(--mv-branch); }
.live-finished > header .live-state::before { content: "✓ "; }
.live-text { display: flex; flex-direction: column-reverse; max-height: 15rem; overflow-y: auto; font-size: 0.9rem; }
.live-text > div { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace;
  line-height: 1.35; }
.live-caret { display: inline-block; width: 0.5em; height: 1em; vertical-align: text-bottom; margin-left: 1px;
  background: currentColor; animation: live-blink 1s steps(2) infinite; }
.live-lane-finished .live-text, .live-lane-stopped .live-text { max-height: none; }
.live-tag { opacity: 0.6; font-size: 0.8em; }
.live-hint { opacity: 0.8; }
.live-error { background: #c1121f; color: #fff; border-radius: 6px; padding: 0.4rem 0.7rem; }
.live-verdict { font-size: 1.1rem; }
.live-results h3 { margin: 1.2rem 0 0.2rem; }
@keyframes live-blink { to { visibility: hidden; } }
@media (prefers-reduced-motion: reduce) { .live-caret { animation: none; } }
"""
