"""How far a run is, and a bar that shows it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


@dataclass(frozen=True)
class Progress:
    """The state of a run.

    Attributes:
        total (`int`): chains in the input.
        finished (`int`), rejected (`int`): records that have ended so.
        calls (`int`): answers in the store.
        prompt_tokens (`int`), completion_tokens (`int`): of these.
        cost (`float`): likewise, in the currency of the prices.
        set_aside (`int`): records that this run has left to the next one, for want of an answer.
    """

    total: int
    finished: int = 0
    rejected: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    set_aside: int = 0

    @property
    def ended(self) -> int:
        """Records that are finished or rejected."""
        return self.finished + self.rejected


@contextlib.contextmanager
def progress_bar(console: Console | None = None) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal for as long as it is open.

    Args:
        console (`Console`, *optional*): where it is drawn.

    Yields:
        `Callable[[Progress], None]`: for the `progress` of `multiverse.curator.pipeline.run`.
    """
    columns = (
        TextColumn("curating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[story]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        task = bars.add_task("", total=None, story="")

        def show(state: Progress) -> None:
            tokens = state.prompt_tokens + state.completion_tokens
            story = f"{state.rejected} rejected, {state.calls:,} calls, {tokens:,} tokens"
            story += f", {state.cost:.2f} spent" if state.cost else ""
            story += f", {state.set_aside} set aside" if state.set_aside else ""
            bars.update(task, total=state.total, completed=state.ended, story=story)

        yield show
