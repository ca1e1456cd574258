"""Majority voting among several answers to a question (maj@k)."""

from collections.abc import Mapping, Sequence
from typing import Any

from multiverse.curator.final_answer import normalised, same_answer


def majority_vote(records: Sequence[Mapping[str, Any]]) -> float:
    """The chance that a question's vote is right: 1 or 0, or between them where the vote is tied.

    Answers that are the same, as text or as mathematics, are votes for one answer, and so are all that were judged
    right. A generation without an answer does not vote, and where none votes, the outcome is wrong. A vote is right
    where the winner holds a right answer. Of tied winners one would have to be drawn; the expected value over the
    draw is taken, which favours nobody.

    Args:
        records (sequence of `Mapping`): of one question; `answer` and `right` are looked at.
    """
    groups = _groups([record for record in records if record["answer"] is not None])
    most = max(map(len, groups), default=0)
    winners = [any(vote["right"] for vote in group) for group in groups if len(group) == most]
    return sum(winners) / len(winners) if winners else 0.0


def _groups(votes: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    # Most answers are equal as texts, and mathematics is slow.
    by_text: dict[tuple[bool, str], list[Mapping[str, Any]]] = {}
    for vote in votes:
        by_text.setdefault((False, "") if vote["right"] else (True, normalised(vote["answer"])), []).append(vote)
    groups: list[list[Mapping[str, Any]]] = []
    for members in by_text.values():
        # Whatever the order: sameness as it is judged is neither symmetric nor transitive in all cases.
        same = [group for group in groups if _same(group, members)]
        groups = [group for group in groups if group not in same]
        groups.append([vote for group in (*same, members) for vote in group])
    return groups


def _same(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> bool:
    answers = [sorted({vote["answer"] for vote in group}) for group in (first, second)]
    return any(same_answer(one, other) or same_answer(other, one) for one in answers[0] for other in answers[1])
