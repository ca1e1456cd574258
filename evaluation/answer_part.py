"""What of a generated text may state the final answer."""

import re
from bisect import bisect_right
from itertools import accumulate

from multiverse.curator.rendering import Pieces, read_pieces
from multiverse.structure import Block
from multiverse.tags import TAGS

#: Ends of a stretch of thought: Multiverse's own tag and what other models write.
_THOUGHT_END = re.compile(
    r"</\s*(?:think|thinking|thoughts?|reasoning)\s*>|\[/think\]|<\|end_of_thought\|>|<\|/think\|>|◁/think▷",
    re.IGNORECASE,
)
_ROLES = "system|user|assistant|tool|human|ai"
_MARKED_TURN = re.compile(rf"<\|(?:im_start|start_header_id)\|>\s*({_ROLES})(?:<\|end_header_id\|>)?", re.IGNORECASE)
_BARE_TURN = re.compile(rf"^({_ROLES}):?[ \t]*$", re.IGNORECASE | re.MULTILINE)
_TAG = re.compile("|".join(map(re.escape, TAGS)))
_SPECIAL = re.compile(r"<\|[A-Za-z_/]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn)>")


def answer_part(text: str) -> str:
    r"""What of a generation may state the final answer, by these rules in this order:

    1. Of a text that goes on with turns of a chat, only the model's first turn counts; a user's or a system's turn is
       an echo of the prompt, or made up.
    2. Where a stretch of thought is closed (`</Think>`, `</think>`, `[/THINK]`, ...), only what comes after its last
       closing tag. A tag inside a path whose `</Path>` comes after it closes no thought of the whole.
    3. Of that, only the root branch, from its last block on: from the block's `<Conclusion>`, else from its
       `</Parallel>`. A block that has no paths, and holds neither, counts from its `</Goal>`. A block that was left
       open before its conclusion leaves nothing.
    4. Tags and special tokens are taken out.

    So the text of a path never counts, nor that of a goal or an outline: a sub-result that is boxed there is no final
    answer, even if nothing else follows. Structure is read by `BranchLayout`; a tag that means nothing where it stands
    (`<Path>` outside a block) is passed over. Without tags, thoughts and turns, the whole text counts.

    Args:
        text (`str`): the generated continuation in linear order, tags as written, malformed or cut off if need be.

    Returns:
        `str`: without blanks at its ends; empty where nothing counts.
    """
    turn = _first_turn(text)
    read = read_pieces(turn)
    if ends := list(_THOUGHT_END.finditer(turn)):
        starts = list(accumulate(map(len, read.pieces), initial=0))
        inside = _inside_closed_path(read)
        outside = (end for end in reversed(ends) if not inside[bisect_right(starts, end.start()) - 1])
        if (last := next(outside, None)) is not None:
            read = read_pieces(turn[last.end() :])
    return _SPECIAL.sub("", "\n".join(_root_text(read))).strip()


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but blanks, tags and special tokens."""
    return not _SPECIAL.sub("", _TAG.sub("", text)).strip()


def _first_turn(text: str) -> str:
    """What the model says before another speaks; in an echo of a chat, its first turn that holds something."""
    first = _BARE_TURN.match(text.lstrip())
    turns = _MARKED_TURN if first is None else _BARE_TURN
    marks = list(turns.finditer(text))
    if not marks:
        return text
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    spoken = [("assistant", text[: marks[0].start()])]
    spoken += [(mark[1].lower(), text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
    own = (said for role, said in spoken if role in ("assistant", "ai") and _SPECIAL.sub("", said).strip())
    return next(own, "")


def _inside_closed_path(read: Pieces) -> list[bool]:
    """For every piece, whether a path around it is closed after it."""
    opened = [0] * (len(read.pieces) + 1)
    waiting = list(read.layout.blocks)
    while waiting:
        for path in waiting.pop().paths:
            waiting += path.blocks
            if path.close is not None:
                opened[path.start] += 1
                opened[path.close] -= 1
    return [depth > 0 for depth in accumulate(opened)]


def _root_text(read: Pieces) -> list[str]:
    """The texts of the root branch from its last block on."""
    blocks = read.layout.blocks
    first = _after(read, blocks[-1]) if blocks else 0
    branches = read.layout.branch_ids.tolist()
    kept = range(first, len(read.pieces))
    return [read.pieces[index] for index in kept if branches[index] == 0 and not read.is_tag(index)]


def _after(read: Pieces, block: Block) -> int:
    """The piece from which on a block has come to its end."""
    if block.conclusion is not None:
        return block.conclusion
    if block.end is not None:
        return block.end
    if block.paths or "<Goal>" in read.pieces[block.start :]:
        return len(read.pieces) if block.paths or block.goal_close is None else block.goal_close
    # A stray tag opens nothing.
    return len(read.pieces) if block.outlines else block.start
