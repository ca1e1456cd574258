"""Shows branches growing side by side in a terminal."""

from collections.abc import Sequence

from multiverse.generation.branch import Branch, BranchStatus, Fork, Token
from multiverse.generation.request import Request
from multiverse.generation.streaming import BranchStreamer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
_LINES = 14


class LiveBranches(BranchStreamer):
    """Draws the first request of a call: the root's text, and below it one column per path of the latest fork.

    On a terminal the view is redrawn at every step. Elsewhere (a log file) `snapshot` gives the same picture once.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): turns token ids into text.
        console (`Console`): where to draw.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        self.tokenizer = tokenizer
        self.live = Live(console=console, refresh_per_second=12, transient=True) if console.is_terminal else None
        self.widest: RenderableType | None = None
        self._most = 0
        if self.live is not None:
            self.live.start()

    def put_step(self, requests: Sequence[Request]) -> None:
        request = requests[0]
        if self.live is None and request.steps % 8:
            return  # nobody is watching: a look now and then finds the widest stretch
        running = sum(branch.status is BranchStatus.RUNNING for branch in request.branches())
        wide = running >= max(2, self._most)
        if self.live is None and not wide:
            return
        picture = self.draw(request)
        if wide:
            self._most, self.widest = running, picture
        if self.live is not None:
            self.live.update(picture)

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()

    def draw(self, request: Request) -> RenderableType:
        """The request as it stands."""
        running = sum(branch.status is BranchStatus.RUNNING for branch in request.branches())
        parts: list[RenderableType] = [_panel(self.tokenizer, request.root, "root", "white", lines=6)]
        fork = next((item for item in reversed(request.root.items) if isinstance(item, Fork)), None)
        if fork is not None:
            grid = Table.grid(expand=True)
            leaves = [leaf for child in fork.children for leaf in _visible_paths(child)]
            for _ in leaves:
                grid.add_column(ratio=1)
            panels = [
                _panel(self.tokenizer, leaf, f"path {leaf.label}", COLOURS[number % len(COLOURS)], _LINES)
                for number, leaf in enumerate(leaves)
            ]
            grid.add_row(*panels)
            parts.append(grid)
        parts.append(Text(f"step {request.steps}   tokens {request.made}   branches running {running}", style="bold"))
        return Group(*parts)


def _visible_paths(branch: Branch) -> list[Branch]:
    """The path itself, and the paths of the block it is working on."""
    fork = next((item for item in reversed(branch.items) if isinstance(item, Fork)), None)
    nested = fork.children if fork is not None and branch.status is BranchStatus.WAITING else []
    return [branch, *(leaf for child in nested for leaf in _visible_paths(child))]


def _panel(tokenizer: PreTrainedTokenizerBase, branch: Branch, title: str, colour: str, lines: int) -> Panel:
    ids = [item.id for item in branch.items if isinstance(item, Token)]
    shown = str(tokenizer.decode(ids)).splitlines()[-lines:]
    mark = {BranchStatus.RUNNING: "▶", BranchStatus.WAITING: "⏳", BranchStatus.FINISHED: "✔"}[branch.status]
    return Panel(Text("\n".join(shown)), title=f"{mark} {title}", border_style=colour, height=lines + 2)


def timeline(request_branches: Sequence[tuple[str, int | None, int | None]], steps: int, width: int = 60) -> Text:
    """One line per branch, one bar from its first to its last step.

    Args:
        request_branches: label, first and last step of every branch.
        steps (`int`): sequential steps of the request.
        width (`int`): characters for the whole length.
    """
    text = Text()
    for number, (label, first, last) in enumerate(request_branches):
        if first is None or last is None:
            continue
        begin = (max(first, 1) - 1) * width // max(steps, 1)
        end = max(begin + 1, last * width // max(steps, 1))
        text.append(f"{label or 'root':>6} ", style="bold")
        text.append(" " * begin)
        text.append("█" * (end - begin), style="white" if not label else COLOURS[(number - 1) % len(COLOURS)])
        text.append("\n")
    return text
