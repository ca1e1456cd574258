"""Walks over steps and structure: leaves, blocks, the original text of a path, and what it can see."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from multiverse.curator.records import Group, Node, Step

#: Most blocks around a text.
MAX_DEPTH = 2


def leaf_labels(steps: Iterable[Step]) -> list[str]:
    """Labels of the steps that text belongs to, in order."""
    return [leaf.label for step in steps for leaf in step.leaves()]


def families(steps: Sequence[Step]) -> Iterator[Sequence[Step]]:
    """The steps, and the sub-steps of each one that has any: groups stay within one of these."""
    yield steps
    for step in steps:
        if step.children:
            yield step.children


def build_structure(steps: Sequence[Step], groups: Iterable[Group]) -> tuple[Node, ...]:
    """Steps as nodes, with those of a group under one block."""
    grouped = {group.labels[0]: group for group in groups}
    nodes, waiting = [], list(steps)
    while waiting:
        group = grouped.get(waiting[0].label)
        size = len(group.labels) if group else 1
        members = [
            Node(step.label, children=build_structure(step.children, grouped.values())) for step in waiting[:size]
        ]
        nodes.append(Node(block_label(group), group.kind, tuple(members)) if group else members[0])
        waiting = waiting[size:]
    return tuple(nodes)


def block_label(group: Group) -> str:
    """The label of the block that a group becomes."""
    return f"{group.labels[0]}-{group.labels[-1]}"


def flat(nodes: Iterable[Node]) -> Iterator[Node]:
    """Leaf steps and blocks in order, steps with sub-steps opened, blocks not."""
    for node in nodes:
        if node.kind is None and node.children:
            yield from flat(node.children)
        else:
            yield node


def leaves(node: Node) -> Iterator[str]:
    """Labels of the leaf steps from a node down, those in blocks included."""
    for child in node.children:
        yield from leaves(child)
    if not node.children:
        yield node.label


def nested_blocks(path: Node) -> list[Node]:
    """The blocks that stand directly in a path."""
    return [node for node in flat([path]) if node.kind is not None]


def all_blocks(structure: Iterable[Node]) -> list[Node]:
    """Every block, inner ones first."""
    return [block for node in structure for block in node.blocks()]


def depth(nodes: Iterable[Node]) -> int:
    """Most blocks around a text."""
    return max(((node.kind is not None) + depth(node.children) for node in nodes), default=0)


def placeholder(block: Node | str) -> str:
    """What stands in a path's text in the place of a nested block."""
    return f"{{{{block {block if isinstance(block, str) else block.label}}}}}"


def original_text(path: Node, texts: Mapping[str, str]) -> str:
    """The original's text of a path, with placeholders for its blocks."""
    parts: list[str] = []
    for node in flat([path]):
        if node.kind is None:
            parts.append(texts[node.label])
        else:
            if parts and not parts[-1].endswith("\n"):
                parts.append("\n")
            parts.append(placeholder(node) + "\n")
    return "".join(parts)


def whole_text(nodes: Iterable[Node], texts: Mapping[str, str]) -> str:
    """The original's text of some nodes, everything in their blocks included."""
    return "".join(texts[label] for node in nodes for label in leaves(node))


def surroundings(structure: Iterable[Node], label: str) -> tuple[list[Node], list[Node]]:
    """What the paths of a block can see of what precedes it, and what they can never see.

    Args:
        structure (`Iterable[Node]`): the whole of it.
        label (`str`): of the block.

    Returns:
        The nodes before the block, those of its own outer path included, and the siblings of that path. (The paths of
        the block themselves are siblings of one another as well, and are not among them.)
    """
    found = _surroundings(structure, label)
    if found is None:
        raise ValueError(f"`label`: the structure has no block {label!r}.")
    return found


def _surroundings(nodes: Iterable[Node], label: str) -> tuple[list[Node], list[Node]] | None:
    before: list[Node] = []
    for node in flat(nodes):
        if node.label == label and node.kind is not None:
            return before, []
        for path in node.children:
            if found := _surroundings(path.children, label):
                siblings = [other for other in node.children if other is not path]
                return before + found[0], siblings + found[1]
        before.append(node)
    return None
