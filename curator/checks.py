"""What a record must pass, after which stage, and where it goes back to where it does not.

| after | check | measure | back to |
|---|---|---|---|
| intake | the source: no tags in it, and the attempt comes to the known answer | | rejected |
| `structure` | blocks are there, at most two deep, and hold every step once | | `groups` |
| `refill` | content: edit distance to the original, every sentence once and in order | `content_distance` | `refill` |
| `branches` | grammar of the rendered text | | `branches` |
| | content of every path: edits, numbers, formulas | `path_distance`, the largest | `branches` |
| | independence: words that point at siblings, content that only siblings hold | | `branches` |
| | the final answer | `answer_checked`, 1 or 0 | `branches` |
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from multiverse.curator.final_answer import LONGEST, gives_answer, same_answer, stated_answer
from multiverse.curator.grammar import check_grammar
from multiverse.curator.outline import (
    MAX_DEPTH,
    all_blocks,
    depth,
    leaf_labels,
    leaves,
    nested_blocks,
    original_text,
    surroundings,
)
from multiverse.curator.quantities import (
    content_distance,
    formulas,
    lines_beyond,
    numbers,
    squeezed,
    symbols,
    without_numbering,
    word_edits,
)
from multiverse.curator.records import SOURCE, Chain, Draft, Node, StageFailure
from multiverse.curator.rendering import find_placeholders, render, sequential_twin, without_placeholders
from multiverse.curator.sentences import split_sentences
from multiverse.curator.sibling_words import OPENING_WORDS, SIBLING_WORDS
from multiverse.tags import TAGS

#: Largest `content_distance` between the original and the refilled texts (arXiv 2506.09991, section 5.1).
CONTENT_BOUND = 0.2
#: Largest share of a path's words that differ from its original's, as an edit distance in words over the longer text.
#: Two texts on one subject with nothing else in common are at 0.8 and above; what stands alone after a few changes is
#: below 0.3. The paper has no such bound, and what capable models need is not known: it is an option, and dataset
#: cards and `multiverse curate status` show how much of it is used.
PATH_BOUND = 0.5
#: Words that may differ whatever the share: a short path has to name what a long one has named anyway.
FREE_EDITS = 12

_POINTING = re.compile(rf"(?<!\w)(?:{'|'.join(SIBLING_WORDS)})(?!\w)", re.IGNORECASE)
# Six times faster than without regard to case: `re` then skips what begins with another letter.
_POINTING_IN_LOWER_CASE = re.compile(_POINTING.pattern)
_OPENING = re.compile(rf"(?:{'|'.join(OPENING_WORDS)})(?!\w)", re.IGNORECASE)
# In nearly every text by some way or other.
_COMMON = {"0", "1"}


@dataclass(frozen=True)
class Checks:
    """The checks after each stage, for the `check` of `multiverse.curator.pipeline.run`.

    Args:
        path_bound (`float`): most of a path's words that may differ from its original's, from 0 to 1.

    Raises:
        ValueError: if the bound is no share.
    """

    path_bound: float = PATH_BOUND

    def __post_init__(self) -> None:
        if not 0 <= self.path_bound <= 1:
            raise ValueError(f"`path_bound` is {self.path_bound}. Give a share of words from 0 to 1.")

    def settings(self) -> dict[str, float]:
        """What the results depend on."""
        return {"path_bound": self.path_bound}

    def __call__(self, chain: Chain, draft: Draft, stage_name: str) -> Draft:
        """Runs the checks that belong after a stage.

        Args:
            chain (`Chain`): the source.
            draft (`Draft`): after that stage.
            stage_name (`str`): one of `STAGES`.

        Returns:
            `Draft`: with what was measured in `measures`.

        Raises:
            StageFailure: by the first check that fails, with the stage to go back to and a reason for the model.
        """
        measures: dict[str, float] = {}
        if stage_name == "structure":
            check_structure(draft)
        elif stage_name == "refill":
            measures["content_distance"] = check_content(chain, draft)
        elif stage_name == "branches":
            text = render(draft)
            check_grammar(text, draft.structure)
            measures["path_distance"] = check_paths(draft, self.path_bound)
            check_independence(chain, draft)
            measures["answer_checked"] = float(check_answer(chain, text))
        return replace(draft, measures={**draft.measures, **measures}) if measures else draft


check = Checks()


def check_source(chain: Chain) -> None:
    """A chain that no answer of a model could mend is refused before anything is asked about it; the `intake` of
    `multiverse.curator.pipeline.run`.

    Raises:
        StageFailure: if the trajectory holds tags or placeholders or is a single sentence, or the attempt misses the
            known answer.
    """
    if found := next((tag for tag in TAGS if tag in chain.trajectory), None):
        raise StageFailure(SOURCE, f"The source cannot be used: its trajectory holds the tag {found}.")
    if places := find_placeholders(chain.trajectory):
        raise StageFailure(SOURCE, f"The source cannot be used: its trajectory holds {places[0].group()}.")
    if len(split_sentences(chain.trajectory)) < 2:
        raise StageFailure(SOURCE, "The source cannot be used: its trajectory is a single sentence.")
    if _comparable(chain.answer) and not gives_answer(chain.attempt, str(chain.answer)):
        raise StageFailure(
            SOURCE, f"The source cannot be used: its attempt does not come to the known answer {chain.answer!r}."
        )


def check_structure(draft: Draft) -> None:
    """The blocks hold the steps as they should.

    Raises:
        StageFailure: if there is no block, blocks are too deep, or a leaf step is missing, doubled or out of order.
    """
    if not all_blocks(draft.structure):
        raise StageFailure("groups", "There is no parallel block. Find at least one group.")
    if (deepest := depth(draft.structure)) > MAX_DEPTH:
        raise StageFailure(
            "groups", f"Blocks are nested {deepest} deep; at most {MAX_DEPTH} are allowed. Drop inner groups."
        )
    held = [label for node in draft.structure for label in leaves(node)]
    if held != (wanted := leaf_labels(draft.steps)):
        raise StageFailure("groups", f"The structure holds the steps {', '.join(held)}, not {', '.join(wanted)}.")


def check_content(chain: Chain, draft: Draft) -> float:
    """The refilled texts, put together, are the original.

    Returns:
        `float`: their `content_distance`.

    Raises:
        StageFailure: if it is larger than `CONTENT_BOUND`, or a sentence is missing, doubled, added or out of order.
    """
    refilled = "".join(draft.texts.get(label, "") for label in leaf_labels(draft.steps))
    if refilled == chain.trajectory:
        return 0.0
    distance = content_distance(chain.trajectory, refilled)
    if distance > CONTENT_BOUND:
        raise StageFailure(
            "refill",
            f"The refilled text is at an edit distance of {distance:.2f} from the original; "
            f"{CONTENT_BOUND} is allowed. Assign every sentence once.",
        )
    wanted, found = (_normalised(split_sentences(text)) for text in (chain.trajectory, refilled))
    for fault, sentences in (
        ("is missing", Counter(wanted) - Counter(found)),
        ("is there too often, or not in the original", Counter(found) - Counter(wanted)),
    ):
        if sentences:
            raise StageFailure("refill", f"The sentence {_short(next(iter(sentences)))} {fault}. Assign each once.")
    if moved := next((b for a, b in zip(wanted, found, strict=True) if a != b), None):
        raise StageFailure("refill", f"The sentence {_short(moved)} is out of order. Keep the order of the original.")
    return distance


def check_paths(draft: Draft, bound: float = PATH_BOUND) -> float:
    """Every path holds the content of its original.

    Args:
        draft (`Draft`): with `blocks`.
        bound (`float`): see `PATH_BOUND`.

    Returns:
        `float`: the largest share of words that were edited.

    Raises:
        StageFailure: if it is larger than `bound` and more than `FREE_EDITS` words are, or a number or a formula is
            lost.
    """
    largest = 0.0
    for block, number, node, path in _paths(draft):
        where = f"In block {block.label}, path {number}"
        original, path = map(without_placeholders, (original_text(node, draft.texts), path))
        original = without_numbering(original)
        edits, words = word_edits(original, path)
        share = edits / max(words, 1)
        largest = max(largest, share)
        if edits > FREE_EDITS and share > bound:
            raise StageFailure(
                "branches",
                f"{where}: {edits} of {words} words differ from the original. Keep its sentences, and change "
                "only what points at other parts.",
            )
        # What was mostly keeps its line: the whole path is read for those that do not.
        lost = numbers(lines_beyond(original, path)) - numbers(lines_beyond(path, original))
        if lost := lost and sorted(lost - numbers(path)):
            raise StageFailure(
                "branches", f"{where}: the number {lost[0]} of the original is missing. Keep all of them."
            )
        squeezed_path = squeezed(path)
        if gone := [shown for form, shown in formulas(original).items() if form not in squeezed_path]:
            raise StageFailure(
                "branches", f"{where}: the formula {_short(gone[0])} of the original is missing. Keep it as it is."
            )
    return largest


def check_independence(chain: Chain, draft: Draft) -> None:
    """No path points at a sibling, or uses what only a sibling holds.

    A path may use the numbers and symbols of the question, of the text before its block, and of its own original. What
    it has beyond these must not be found in its siblings, those of an outer path included.

    Raises:
        StageFailure: if one does.
    """
    for block, number, node, path in _paths(draft):
        where = f"In block {block.label}, path {number}"
        own = without_placeholders(path)
        if found := _OPENING.match(own.lstrip(" *_#\n")) or _pointing(own):
            raise StageFailure(
                "branches",
                f"{where}: {_short(found.group().strip())} points at other parts, which cannot be seen from it. "
                "Say what is meant, or leave it out.",
            )
        original = without_placeholders(original_text(node, draft.texts))
        changed, instead = lines_beyond(own, original), lines_beyond(original, own)
        for noun, find in (("number", numbers), ("symbol", symbols)):
            # Most have nothing beyond what stood there before; the others are looked for text by text, for the same
            # texts come up with every path.
            beyond = find(changed).difference(_COMMON, find(instead))
            if not beyond:
                continue
            beyond = beyond.difference(find(chain.question), *map(find, _texts([node], draft)))
            before, outer = surroundings(draft.structure, block.label)
            known = [*_texts(before, draft), *_conclusions([*before, node], draft)]
            beyond = beyond.difference(*map(find, known))
            others = [other for other in block.children if other is not node]
            hidden = [*_texts([*others, *outer], draft), *_rewritten(block, number, draft)]
            if taken := sorted(each for each in beyond if any(each in find(text) for text in hidden)):
                raise StageFailure(
                    "branches",
                    f"{where}: the {noun} {taken[0]} is found in another part only, which cannot be seen from it. Do "
                    "without it.",
                )


def check_answer(chain: Chain, text: str) -> bool:
    """The final answer survives: where the original states one at its end, the tagged text states the same.

    Args:
        chain (`Chain`): the source.
        text (`str`): the tagged text.

    Returns:
        `bool`: whether there was an answer that can be compared.

    Raises:
        StageFailure: if it states another one, or none where the original did.
    """
    before, after = stated_answer(chain.trajectory), stated_answer(sequential_twin(text))
    known = chain.answer or stated_answer(chain.attempt)
    expected = [answer for answer in (before, known) if _comparable(answer)]
    if after is None:
        if before is not None and expected:
            raise StageFailure("branches", f"The final answer {_short(before)} is missing in the text. Keep it.")
        return False
    if expected and not any(same_answer(str(answer), after) for answer in expected):
        raise StageFailure(
            "branches", f"The text ends with the answer {_short(after)}; it should be {_short(str(expected[-1]))}."
        )
    return bool(expected)


def _pointing(text: str) -> re.Match[str] | None:
    """The first words of a text that point at a sibling."""
    return _POINTING.search(text) if _POINTING_IN_LOWER_CASE.search(text.lower()) else None


def _paths(draft: Draft) -> list[tuple[Node, int, Node, str]]:
    """Every path: its block, its number, its node and its text."""
    return [
        (block, number, node, path)
        for block in all_blocks(draft.structure)
        for number, (node, path) in enumerate(
            zip(block.children, draft.blocks[block.label].paths, strict=True), start=1
        )
    ]


def _texts(nodes: Sequence[Node], draft: Draft) -> list[str]:
    """The original's texts of the leaf steps in some nodes."""
    return [draft.texts[label] for node in nodes for label in leaves(node)]


def _conclusions(nodes: Sequence[Node], draft: Draft) -> list[str]:
    """Conclusions of the blocks in some nodes."""
    return [draft.blocks[block.label].conclusion for block in all_blocks(nodes) if block.label in draft.blocks]


def _rewritten(block: Node, number: int, draft: Draft) -> list[str]:
    """The paths of a block but one, as they were rewritten, with the blocks in them."""
    texts = []
    for other, (node, path) in enumerate(zip(block.children, draft.blocks[block.label].paths, strict=True), start=1):
        if other != number:
            inner = [draft.blocks[nested.label] for nested in nested_blocks(node)]
            texts += [path, *(text for each in inner for text in (*each.paths, each.conclusion))]
    return texts


def _comparable(answer: str | None) -> bool:
    return answer is not None and 0 < len(answer.strip()) <= LONGEST and "\n" not in answer.strip()


def _normalised(sentences: Sequence[str]) -> list[str]:
    return [" ".join(sentence.split()) for sentence in sentences]


def _short(text: str) -> str:
    return f"'{text if len(text) <= 80 else text[:77] + '...'}'"
