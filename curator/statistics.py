"""How parallel a tagged corpus is, and how sound: blocks, branches, depth, lengths, possible speed-up, problems.

Everything is read off `BranchLayout`, so a corpus is judged by the very rules that a model is trained and decoded by.
Works on any tagged text, whoever has written it: the curator's own datasets, others', or what a model generates.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from multiverse.hub_card.branch_shapes import path_numbers
from multiverse.hub_card.page import TaggedText, all_blocks

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "unknown"


@dataclass(frozen=True)
class TextStatistics:
    """One text.

    Attributes:
        name (`str`): where it is from.
        unit (`str`): what lengths are counted in, `"tokens"` or `"words"`; a tag is one of either.
        tokens (`int`): length without the prompt.
        critical_path (`int`): sequential steps that the structure allows to write it in.
        branches (`tuple[int, ...]`): paths of every block, nested ones included, in linear order.
        depth (`int`): most paths around a token.
        kinds (`tuple[str, ...]`): kind of every block whose kind is known, `"collective"` or `"selective"`.
        problems (`Mapping[str, int]`): defects by kind; empty for a well-formed text.
    """

    name: str
    unit: str
    tokens: int
    critical_path: int
    branches: tuple[int, ...] = ()
    depth: int = 0
    kinds: tuple[str, ...] = ()
    problems: Mapping[str, int] = field(default_factory=dict)

    @property
    def speed_up(self) -> float:
        """How many times fewer sequential steps are possible: the length over the critical path."""
        return self.tokens / max(self.critical_path, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "critical_path": self.critical_path,
            "speed_up": round(self.speed_up, 4),
            "branches": list(self.branches),
            "depth": self.depth,
            "kinds": list(self.kinds),
            "problems": dict(sorted(self.problems.items())),
        }


@dataclass(frozen=True)
class CorpusStatistics:
    """Texts in sum.

    Attributes:
        name (`str`): of the corpus.
        texts (`tuple[TextStatistics, ...]`): in the order of the corpus.
        skipped (`tuple[str, ...]`): what was no text, each with the reason.
    """

    name: str
    texts: tuple[TextStatistics, ...]
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        units = sorted({text.unit for text in self.texts})
        if len(units) > 1:
            raise ValueError(f"`texts` are counted in {' and '.join(units)}. Count all of them in one unit.")

    @property
    def unit(self) -> str:
        """What lengths are counted in."""
        return self.texts[0].unit if self.texts else "tokens"

    @property
    def tokens(self) -> int:
        """Length of all texts."""
        return sum(text.tokens for text in self.texts)

    @property
    def critical_path(self) -> int:
        """Sequential steps of all texts, one text after the other."""
        return sum(text.critical_path for text in self.texts)

    @property
    def speed_up(self) -> float:
        """Possible speed-up over all texts: length over critical path."""
        return self.tokens / max(self.critical_path, 1)

    @property
    def valid(self) -> int:
        """Texts without a problem."""
        return sum(not text.problems for text in self.texts)

    @property
    def parallel(self) -> tuple[TextStatistics, ...]:
        """The texts that have a block."""
        return tuple(text for text in self.texts if text.branches)

    @property
    def branches(self) -> Counter[int]:
        """Blocks by their number of paths."""
        return Counter(count for text in self.texts for count in text.branches)

    @property
    def depths(self) -> Counter[int]:
        """Texts by their depth."""
        return Counter(text.depth for text in self.texts)

    @property
    def kinds(self) -> Counter[str]:
        """Blocks by kind, `"unknown"` among them."""
        found = Counter(kind for text in self.texts for kind in text.kinds)
        unknown = self.branches.total() - found.total()
        return found + Counter({UNKNOWN: unknown})

    @property
    def problems(self) -> Counter[str]:
        """Defects by kind."""
        found: Counter[str] = Counter()
        for text in self.texts:
            found.update(text.problems)
        return found

    @property
    def texts_with(self) -> Counter[str]:
        """Texts that have a defect of a kind, by kind."""
        return Counter(kind for text in self.texts for kind in text.problems)

    def to_dict(self, texts: bool = False) -> dict[str, Any]:
        """Plain values only.

        Args:
            texts (`bool`): whether every text is listed as well.
        """
        speed_ups = [text.speed_up for text in self.parallel]
        summary = {
            "name": self.name,
            "unit": self.unit,
            "texts": len(self.texts),
            "texts_with_blocks": len(self.parallel),
            "valid_texts": self.valid,
            "valid_texts_with_blocks": sum(not text.problems for text in self.parallel),
            "nested_texts": sum(text.depth > 1 for text in self.texts),
            "blocks": self.branches.total(),
            "branches_per_block": _sorted(self.branches),
            "depth": _sorted(self.depths),
            "kinds": _sorted(self.kinds),
            "tokens": self.tokens,
            "critical_path": self.critical_path,
            "speed_up": round(self.speed_up, 4),
            "median_speed_up_with_blocks": round(median(speed_ups), 4) if speed_ups else None,
            "problems": _sorted(self.problems),
            "texts_with_problem": _sorted(self.texts_with),
            "skipped": list(self.skipped),
        }
        return {**summary, "each": [text.to_dict() for text in self.texts]} if texts else summary


def measure(text: TaggedText, kinds: Iterable[str] = ()) -> TextStatistics:
    """The figures of one text.

    Args:
        text (`TaggedText`): as `multiverse.hub_card.view.from_text` reads it.
        kinds (iterable of `str`): kinds of its blocks, where they are known; no text tells them.
    """
    blocks = sorted(all_blocks(text.layout), key=lambda block: block.start)
    return TextStatistics(
        name=text.name,
        unit=text.unit,
        tokens=text.made,
        critical_path=text.steps,
        branches=tuple(len(block.paths) for block in blocks),
        depth=max((number.count(".") + 1 for number in path_numbers(text.layout).values()), default=0),
        kinds=tuple(kinds),
        problems=Counter(problem.kind for problem in text.layout.problems),
    )


def kinds_of(provenance: Any) -> tuple[str, ...]:
    """Kinds of the blocks of a record, where its provenance lists them as `kinds`.

    Args:
        provenance (`Mapping` or `str`, *optional*): as it is, or as JSON.
    """
    if isinstance(provenance, str):
        try:
            provenance = json.loads(provenance)
        except ValueError:
            return ()
    kinds = provenance.get("kinds") if isinstance(provenance, Mapping) else None
    return tuple(kind for kind in kinds or () if kind in ("collective", "selective"))


def united(corpora: Iterable[CorpusStatistics], name: str = "all") -> CorpusStatistics:
    """Several corpora as one."""
    corpora = list(corpora)
    texts = tuple(text for corpus in corpora for text in corpus.texts)
    return CorpusStatistics(name, texts, tuple(reason for corpus in corpora for reason in corpus.skipped))


def table(*corpora: CorpusStatistics, title: str = "tagged corpus") -> "Table":
    """The figures for people, one column per corpus.

    Args:
        corpora (`CorpusStatistics`): one or more.
        title (`str`): of the table.

    Raises:
        ValueError: if there is no corpus.
    """
    from rich.table import Table

    if not corpora:
        raise ValueError("`corpora` is empty. Pass at least one.")
    result = Table(title=title, title_justify="left")
    result.add_column("")
    for corpus in corpora:
        result.add_column(corpus.name, justify="right", overflow="fold")

    def add(label: str, figure: Callable[[CorpusStatistics], str], section: bool = False) -> None:
        result.add_row(label, *(figure(corpus) for corpus in corpora), end_section=section)

    def listed(label: str, counts: Callable[[CorpusStatistics], Mapping[Any, int]], all_of: str) -> None:
        names = sorted({name for corpus in corpora for name in counts(corpus)})
        for number, name in enumerate(names, start=1):
            add(f"{label} {name}", partial(_share, counts, name, all_of), number == len(names))

    add("texts", lambda c: f"{len(c.texts):,}")
    add("  with blocks", lambda c: f"{len(c.parallel):,}")
    add("  nested", lambda c: f"{sum(text.depth > 1 for text in c.texts):,}")
    add("  well-formed", lambda c: _of(c.valid, len(c.texts)))
    add("  with blocks and well-formed", lambda c: _of(sum(not t.problems for t in c.parallel), len(c.parallel)))
    add("blocks", lambda c: f"{c.branches.total():,}")
    add("paths", lambda c: f"{sum(count * blocks for count, blocks in c.branches.items()):,}")
    add("paths per block, mean", lambda c: _mean(c.branches))
    add(corpora[0].unit, lambda c: f"{c.tokens:,}")
    add("critical path", lambda c: f"{c.critical_path:,}")
    add("possible speed-up", lambda c: f"{c.speed_up:.2f}")
    add("  texts with blocks, median", lambda c: _median(c.parallel))
    add("  largest", lambda c: f"{max((text.speed_up for text in c.texts), default=0):.2f}", section=True)
    listed("texts of depth", lambda c: c.depths, "texts")
    if any(set(corpus.kinds) - {UNKNOWN} for corpus in corpora):
        listed("blocks,", lambda c: c.kinds, "blocks")
    listed("texts with:", lambda c: c.texts_with, "texts")
    skipped = sum(len(corpus.skipped) for corpus in corpora)
    if skipped:
        result.caption = f"{skipped} skipped, such as {next(c.skipped[0] for c in corpora if c.skipped)}"
    return result


def _sorted(counts: Mapping[Any, int]) -> dict[str, int]:
    """By name or number, zeros left out."""
    return {str(name): counts[name] for name in sorted(counts) if counts[name]}


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if whole else "none"


def _share(
    counts: Callable[[CorpusStatistics], Mapping[Any, int]], name: Any, all_of: str, corpus: CorpusStatistics
) -> str:
    whole = len(corpus.texts) if all_of == "texts" else corpus.branches.total()
    return _of(counts(corpus).get(name, 0), whole)


def _mean(branches: Counter[int]) -> str:
    return f"{sum(count * n for count, n in branches.items()) / branches.total():.2f}" if branches else "none"


def _median(texts: tuple[TextStatistics, ...]) -> str:
    return f"{median(text.speed_up for text in texts):.2f}" if texts else "none"
