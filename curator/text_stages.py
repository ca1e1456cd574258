"""The stages that work on the text: the original's sentences put back, and Map and Reduce around the paths."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from multiverse.curator import answers as reading
from multiverse.curator import templates
from multiverse.curator.outline import (
    all_blocks,
    block_label,
    leaf_labels,
    nested_blocks,
    original_text,
    placeholder,
    surroundings,
    whole_text,
)
from multiverse.curator.outline_stages import outline
from multiverse.curator.records import BlockText, Call, Chain, Draft, Node, StageFailure
from multiverse.curator.rendering import LABEL, find_placeholders
from multiverse.curator.sentences import numbered, split_sentences

#: Characters of the text before a block that a model is shown, counted from the block.
CONTEXT = 6000

_KINDS = {
    "collective": "All parts are needed.",
    "selective": "The parts are alternative attempts, of which one is enough.",
}
_NAMED_BLOCK = re.compile(r"\bblock (\d+(?:\.\d+)?-\d+(?:\.\d+)?)")


class Refill:
    """Asks which sentences belong to which leaf step, and cuts the texts out of the original, so that no model can
    change a word of it."""

    name = "refill"
    version = templates.version("refill")

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        """One call."""
        sentences = split_sentences(chain.trajectory)
        shown = {
            "sentences": numbered(sentences),
            "count": len(sentences),
            "outline": outline(draft.steps, marked=True),
        }
        return [Call(self.name, templates.messages(self.name, **shown, complaint=complaint))]

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        """Fills in `texts`.

        Raises:
            StageFailure: if a leaf step is missing or has no sentence, a label is unknown, or the ranges do not cover
                all sentences in order, each of them once.
        """
        values = reading.read_object(self.name, answers[self.name])
        given = reading.member(self.name, values, "sentences", dict)
        sentences, labels = split_sentences(chain.trajectory), leaf_labels(draft.steps)
        if unknown := [label for label in given if label not in labels]:
            raise StageFailure(self.name, f"{unknown[0]!r} is no marked step. They are {', '.join(labels)}.")
        texts, expected = {}, 1
        for label in labels:
            if label not in given:
                raise StageFailure(self.name, f"Step {label} is missing. Give [first, last] for every marked step.")
            first, last = self._range(given[label], label)
            if last > len(sentences):
                raise StageFailure(
                    self.name, f"Step {label} ends with {last}, but there are {len(sentences)} sentences."
                )
            if first > expected:
                raise StageFailure(
                    self.name,
                    f"Step {label} begins with sentence {first}, but {_sentences(expected, first - 1)} in no step "
                    f"yet. Begin it with {expected}, or end the step before it with {first - 1}.",
                )
            if first < expected:
                raise StageFailure(
                    self.name,
                    f"Step {label} begins with sentence {first}, which a step before it has already. Begin with "
                    f"{expected}, and keep the order of the steps.",
                )
            texts[label] = "".join(sentences[first - 1 : last])
            expected = last + 1
        if expected <= len(sentences):
            raise StageFailure(
                self.name,
                f"The last step ends with sentence {expected - 1}, but {_sentences(expected, len(sentences))} in no "
                "step. No sentence may be left out.",
            )
        return replace(draft, texts=texts, done=(*draft.done, self.name))

    def _range(self, given: Any, label: str) -> tuple[int, int]:
        pair = reading.of_kind(self.name, given, list, f"The sentences of {label}")
        if len(pair) != 2:
            raise StageFailure(self.name, f"The sentences of {label} must be [first, last], got {len(pair)} values.")
        first, last = (reading.of_kind(self.name, each, int, f"A sentence number of {label}") for each in pair)
        if not 1 <= first <= last:
            raise StageFailure(
                self.name, f"Step {label} goes from {first} to {last}. Give [first, last] with 1 <= first <= last."
            )
        return first, last


class Branches:
    """Asks, block by block, for the goal, outlines, paths that stand alone, and the conclusion.

    Inner blocks come first, since the outer ones hold them: as long as there are blocks without text, `calls` asks for
    those whose nested blocks are written.
    """

    name = "branches"
    version = templates.version("branches")

    def calls(self, chain: Chain, draft: Draft, complaint: str | None = None) -> list[Call]:
        """One call per block that can be written now, by its label.

        A complaint about one block, which names it, is shown to that block alone: the others ask as they did before.
        """
        blamed = _NAMED_BLOCK.search(complaint) if complaint else None
        calls = []
        for block in _ready(draft):
            told = complaint if blamed is None or blamed[1] == block.label else None
            values = self._values(chain, draft, block)
            calls.append(Call(block.label, templates.messages(self.name, **values, complaint=told)))
        return calls

    def accept(self, chain: Chain, draft: Draft, answers: Mapping[str, str]) -> Draft:
        """Adds the blocks of this round to `blocks`.

        Raises:
            StageFailure: if a text is missing, empty, labelled or tagged, there is not one outline and one path for
                each part, or the placeholders of nested blocks are not where they belong.
        """
        by_label = {block.label: block for block in all_blocks(draft.structure)}
        written = {label: self._read(by_label[label], answer) for label, answer in answers.items()}
        draft = replace(draft, blocks={**draft.blocks, **written})
        return draft if _ready(draft) else replace(draft, done=(*draft.done, self.name))

    def _values(self, chain: Chain, draft: Draft, block: Node) -> dict[str, Any]:
        before = whole_text(surroundings(draft.structure, block.label)[0], draft.texts).strip()
        titles = {step.label: step.title for top in draft.steps for step in (top, *top.children)}
        reasons = {block_label(group): group.reason for group in draft.groups}
        assert block.kind is not None
        return {
            "question": chain.question,
            "before": before if len(before) <= CONTEXT else f"[...] {before[-CONTEXT:]}",
            "kind": _KINDS[block.kind],
            "reason": reasons.get(block.label, ""),
            "paths": [
                {"title": titles[path.label], "text": original_text(path, draft.texts).strip()}
                for path in block.children
            ],
            "nested": [placeholder(inner) for path in block.children for inner in nested_blocks(path)],
        }

    def _read(self, block: Node, answer: str) -> BlockText:
        try:
            values = reading.read_object(self.name, answer)
            outlines = self._texts(values, "outlines", len(block.children))
            paths = self._texts(values, "paths", len(block.children))
            goal = reading.passage(self.name, reading.member(self.name, values, "goal", str), "`goal`", empty=True)
            conclusion = reading.passage(
                self.name, reading.member(self.name, values, "conclusion", str), "`conclusion`"
            )
            outlines = [" ".join(each.split()) for each in outlines]
            for where, texts in (("`goal`", [goal]), ("`outlines`", outlines), ("`conclusion`", [conclusion])):
                if found := [place.group() for text in texts for place in find_placeholders(text)]:
                    raise StageFailure(self.name, f"{where} holds {found[0]}, which belongs into a path.")
            for number, (node, path) in enumerate(zip(block.children, paths, strict=True), start=1):
                self._check_placeholders(node, path, number)
        except StageFailure as failure:
            raise StageFailure(self.name, f"In block {block.label}, {failure.reason}") from failure
        return BlockText(goal, tuple(outlines), tuple(paths), conclusion)

    def _texts(self, values: Mapping[str, Any], name: str, count: int) -> list[str]:
        listed = reading.member(self.name, values, name, list)
        if len(listed) != count:
            raise StageFailure(
                self.name, f"`{name}` has {len(listed)} texts for {count} parts. Give one for each part."
            )
        texts = []
        for number, each in enumerate(listed, start=1):
            where = f"text {number} of `{name}`"
            texts.append(reading.passage(self.name, each, where))
            if found := LABEL.match(texts[-1]):
                raise StageFailure(
                    self.name, f"{where} begins with {found.group().strip()!r}. Labels are added later: leave it out."
                )
        return texts

    def _check_placeholders(self, node: Node, path: str, number: int) -> None:
        wanted = [placeholder(inner) for inner in nested_blocks(node)]
        places = find_placeholders(path)
        alone = [match.group().strip() for match in places if match["alone"]]
        found = [match.group().strip() for match in places]
        if found != wanted:
            raise StageFailure(
                self.name,
                f"text {number} of `paths` holds {', '.join(found) or 'no placeholder'}, but "
                f"{', '.join(wanted) or 'none'} belong into it, each once and in this order.",
            )
        if alone != wanted:
            raise StageFailure(
                self.name, f"text {number} of `paths` has a placeholder within a line. Put it on a line of its own."
            )


def _ready(draft: Draft) -> Sequence[Node]:
    """The blocks that have no text yet, while all that stand in them have theirs."""
    return [
        block
        for block in all_blocks(draft.structure)
        if block.label not in draft.blocks
        and all(inner.label in draft.blocks for path in block.children for inner in nested_blocks(path))
    ]


def _sentences(first: int, last: int) -> str:
    return f"sentence {first} is" if first == last else f"sentences {first} to {last} are"
