"""What the Space does when somebody presses Run: one generation, or the same one in both modes as a race."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from multiverse.generation.output import MultiverseGenerateOutput
from multiverse.generation.request import Request
from multiverse.generation.streaming import BranchStreamer
from multiverse.hub_card.live_tree import LiveTree, Node, writing
from multiverse.hub_card.turns import Lane, Turns
from transformers import PreTrainedTokenizerBase

#: Between two looks at a generation.
_SECONDS = 0.1
#: Longest question, in characters and in tokens of the whole prompt.
MOST_CHARACTERS = 4000
MOST_PROMPT_TOKENS = 1024


class Stopped(Exception):
    """Somebody has pressed Stop, or left."""


@dataclass
class Progress:
    """How far one generation is.

    Attributes:
        tree (`Node`, *optional*): its branches; `None` before the first step.
        seconds (`float`): on its own clock.
        steps, tokens, running (`int`): sequential steps, tokens made, branches being written.
        output (`MultiverseGenerateOutput`, *optional*): when it has ended, also by Stop.
        stopped (`bool`): whether Stop has ended it.
        error (`BaseException`, *optional*): what else has.
    """

    tree: Node | None = None
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    running: int = 0
    output: MultiverseGenerateOutput | None = None
    stopped: bool = False
    error: BaseException | None = None

    @property
    def ended(self) -> bool:
        return self.output is not None or self.error is not None


class Generation:
    """One call of `generate()` in a thread of its own.

    Args:
        model, tokenizer: a Multiverse model and its tokenizer.
        prompt (`dict[str, torch.Tensor]`): as `apply_chat_template` returns it, one row.
        turns (`Turns`): shared by all generations of the model.
        parallel (`bool`): whether paths are decoded side by side.
        max_new_tokens (`int`): longest answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompt: dict[str, Any],
        turns: Turns,
        parallel: bool,
        max_new_tokens: int,
    ) -> None:
        self.parallel = parallel
        self.prompt_length = prompt["input_ids"].shape[1]
        self.progress = Progress()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(model, tokenizer, prompt, turns, max_new_tokens), daemon=True
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends it after the step it is in; what was written until then is kept."""
        self._stop.set()

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def _run(self, model: Any, tokenizer: Any, prompt: dict[str, Any], turns: Turns, max_new_tokens: int) -> None:
        progress = self.progress
        output, lane = None, turns.lane()
        try:
            with lane:
                output = model.generate(
                    **prompt,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    parallel=self.parallel,
                    return_dict_in_generate=True,
                    streamer=_Watch(LiveTree(tokenizer, None if self.parallel else 1), lane, progress, self._stop),
                )
        except Stopped as stopped:
            output = stopped.partial_output  # type: ignore[attr-defined]
            progress.stopped = True
        except BaseException as error:
            progress.error = error
        # Last: it says that all else is there.
        progress.seconds = lane.seconds
        progress.output = output


class _Watch(BranchStreamer):
    def __init__(self, tree: LiveTree, lane: Lane, progress: Progress, stop: threading.Event) -> None:
        self.tree, self.lane, self.progress, self.stop = tree, lane, progress, stop
        self._shown = 0.0

    def put_step(self, requests: Sequence[Request]) -> None:
        request = requests[0]
        self.lane.step(lambda: self._show(request))
        if self.stop.is_set():
            raise Stopped

    def _show(self, request: Request) -> None:
        progress, now = self.progress, time.monotonic()
        progress.seconds, progress.steps, progress.tokens = self.lane.seconds, request.steps, request.made
        if now - self._shown > _SECONDS or request.finished:
            progress.tree, self._shown = self.tree.read(request), now
            progress.running = writing(progress.tree)


def encode(tokenizer: Any, system: str, question: str, device: Any) -> dict[str, Any]:
    """The prompt of a question.

    Raises:
        ValueError: if there is no question, or it is too long; the message is meant for the person who asked.
    """
    question = question.strip()
    if not question:
        raise ValueError("There is no problem yet. Type one, or take one of the examples.")
    if len(question) > MOST_CHARACTERS:
        raise ValueError(f"The problem has {len(question):,} characters; this demo takes {MOST_CHARACTERS:,}.")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(device)
    length = prompt["input_ids"].shape[1]
    if length > MOST_PROMPT_TOKENS:
        raise ValueError(f"The problem takes {length:,} tokens; this demo takes {MOST_PROMPT_TOKENS:,}.")
    return prompt
