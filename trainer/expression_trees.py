"""Expression trees: verifiable problems whose blocks stand in paths of blocks, as deep as the tree.

A problem asks for an expression of named values (`Find A-B.`), each of which is an expression again (`A = A1*A2`),
down to chains of small steps at the leaves (`A21 = 12-3+7`). Every inner node is one block (arXiv 2506.09991, section
4): its parts are worked out in parallel and put together in its conclusion. So the sequential steps of the Multiverse
form grow with the depth of a tree, and those of its sequential twin with its size, the number of parts to the power of
the depth; `predicted_steps` says exactly how many there are.

All results lie between 1 and 20 by default: a small model meets every fact often. A node holds sums and differences,
or products, never both, so an expression is read from left to right.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from multiverse.configuration_multiverse import MultiverseConfig
from multiverse.forced import HeaderTokens, forced_token_mask
from multiverse.generation.arguments import GENERATION_DEFAULTS
from multiverse.layout import BranchLayout
from multiverse.structure import Block
from multiverse.trainer.synthetic import ChainOptions, Problem, ProblemOptions, Sum
from transformers import PreTrainedTokenizerBase

#: Further parts of a name would need a second digit, and blocks further down a larger `max_depth` of `generate()`.
_MOST_PARTS, _DEEPEST = 9, 8


@dataclass(frozen=True)
class Expression(Sum):
    """A named value that is made of named parts.

    Attributes:
        operators (`tuple[str, ...]`): `+`, `-` or `*` between the parts, taken from left to right.
    """

    operators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_operators(self.operators, len(self.parts))


@dataclass(frozen=True)
class ExpressionProblem(Problem):
    """A question about an expression tree, with its answer and two worked solutions.

    Attributes:
        sums (`tuple[Sum, ...]`): the parts of the root, chains or expressions.
        operators (`tuple[str, ...]`): what stands between them.
    """

    operators: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_operators(self.operators, len(self.sums))


def _check_operators(operators: tuple[str, ...], parts: int) -> None:
    if len(operators) != parts - 1 or not set(operators) <= {"+", "-", "*"}:
        raise ValueError(f"`operators` must hold {parts - 1} of '+', '-' and '*' for {parts} parts, got {operators}.")


@dataclass(frozen=True)
class TreeOptions(ChainOptions):
    """What trees are drawn from.

    Attributes:
        terms (`tuple[int, int]`): fewest and most terms of a leaf's chain.
        depth (`tuple[int, int]`): fewest and most blocks around a leaf; all leaves of a tree are equally deep.
        branching (`tuple[int, int]`): fewest and most parts of an inner node.
        products (`float`): share of products among the inner nodes whose value has enough factors.
    """

    terms: tuple[int, int] = (2, 4)
    depth: tuple[int, int] = (1, 3)
    branching: tuple[int, int] = (2, 2)
    products: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, most in (("depth", 1, _DEEPEST), ("branching", 2, _MOST_PARTS)):
            self._check_range(name, least)
            if getattr(self, name)[1] > most:
                raise ValueError(f"`{name}` reaches {getattr(self, name)[1]}. Ask for at most {most}.")
        if not 0.0 <= self.products <= 1.0:
            raise ValueError(f"`products` is a share between 0 and 1, got {self.products}.")

    def draw(self, rng: random.Random) -> ExpressionProblem:
        """One problem, built from its answer down to the leaves."""
        depth = rng.randint(*self.depth)
        operators, values = self._split(rng, rng.randint(1, self.largest))
        nodes = (self._node(rng, chr(ord("A") + place), value, depth - 1) for place, value in enumerate(values))
        return ExpressionProblem(tuple(nodes), operators)

    def _node(self, rng: random.Random, name: str, value: int, depth: int) -> Sum:
        if depth == 0:
            return self.chain(rng, name, self.largest, value)
        operators, values = self._split(rng, value)
        parts = (self._node(rng, f"{name}{place}", each, depth - 1) for place, each in enumerate(values, start=1))
        return Expression(name, parts=tuple(parts), operators=operators)

    def _split(self, rng: random.Random, value: int) -> tuple[tuple[str, ...], list[int]]:
        """Operators, and values between 1 and `largest` which they make `value` of by way of such values."""
        count = rng.randint(*self.branching)
        if rng.random() < self.products and (choices := _factors(value, count)):
            return ("*",) * (count - 1), list(rng.choice(choices))
        totals = [value]
        while len(totals) < count:
            totals.insert(0, rng.choice([total for total in range(1, self.largest + 1) if total != totals[0]]))
        moves = [after - before for before, after in pairwise(totals)]
        return tuple("+" if move > 0 else "-" for move in moves), [totals[0], *map(abs, moves)]


def _factors(value: int, count: int) -> list[tuple[int, ...]]:
    """Every way to write `value` as a product of `count` factors from 2 up."""
    if count == 1:
        return [(value,)] if value > 1 else []
    return [
        (first, *rest)
        for first in range(2, value)
        if value % first == 0
        for rest in _factors(value // first, count - 1)
    ]


#: Options of every family of problems, for whoever lets a user choose one by name.
FAMILIES: dict[str, type[ProblemOptions] | type[TreeOptions]] = {"sums": ProblemOptions, "trees": TreeOptions}


def predicted_steps(
    text: str, tokenizer: PreTrainedTokenizerBase, config: MultiverseConfig, max_paths: int | None = None
) -> int:
    """Sequential steps in which the engine writes `text` and the end of the sequence.

    A step samples one token of every branch that runs, and what the engine forces rides along (LAYOUT.md, section 7).
    So a branch takes a step for each of its tokens that is not forced, and for every block that it holds the steps of
    the block's longest path:

        steps(branch) = sampled(branch) + sum of max(steps(path) for the block's paths) over its blocks

    A text without tags takes a step per token.

    Args:
        text (`str`): an answer as `Problem.parallel` and `Problem.sequential` write it.
        tokenizer (`PreTrainedTokenizerBase`): with the tags.
        config (`MultiverseConfig`): of the model that `add_multiverse_tokens` gave the tags.
        max_paths (`int`, *optional*): as for `generate()`, whose default is taken.

    Returns:
        `int`: what `RequestReport.sequential_steps` says once the text is written.

    Raises:
        ValueError: if the structure of `text` is malformed, or so wide that paths may have to wait for each other.
    """
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    layout = BranchLayout.from_token_ids(ids, config.multiverse_token_ids or {})
    if layout.problems:
        raise ValueError(f"`text` is malformed ({layout.problems[0]}), so its steps cannot be told. Mend it first.")
    width, most = _width(layout.blocks), GENERATION_DEFAULTS["max_paths"] if max_paths is None else max_paths
    if width > most:
        raise ValueError(
            f"`text` may run {width} paths side by side, but `max_paths` is {most}: some would wait for others. Pass "
            f"`max_paths={width}` here and to `generate()`."
        )
    header = HeaderTokens(config.multiverse_separator_ids, config.multiverse_label_ids)
    asked = layout.branch_ids[~forced_token_mask(layout, ids, header)]
    return _critical_path(0, layout.blocks, torch.bincount(asked, minlength=len(layout.machine.parents)).tolist())


def _critical_path(branch: int, blocks: Iterable[Block], sampled: Sequence[int]) -> int:
    """Steps of a branch that holds `blocks`; `sampled` is the number of tokens asked for in every branch."""
    longest = (max(_critical_path(path.branch, path.blocks, sampled) for path in block.paths) for block in blocks)
    return sampled[branch] + sum(longest)


def _width(blocks: Iterable[Block]) -> int:
    """Most branches that can run at a time in a branch that holds `blocks`."""
    return max((sum(_width(path.blocks) for path in block.paths) for block in blocks), default=1)
