"""The labels of paths."""

import pytest
from multiverse.generation.branch import Choice
from scripted_requests import new_request
from tiny import goal, tiny_ids


@pytest.mark.parametrize(
    ("outlines", "labels"),
    [
        (["a", "b"], ["1", "2"]),
        (["2 : a", "1 : b"], ["2", "1"]),
        (["_ 3 : a", "b", "_ _ 3 : c"], ["3", "2", "3"]),
        (["1 0 : a", "1 2 . 1 0 : b"], ["10", "12.10"]),
        (["1 a", "1 . : b", ": c", ""], ["1", "2", "3", "4"]),
        (["7 :"] * 3, ["7", "7", "7"]),
        (["a"] * 20, [str(number) for number in range(1, 21)]),
    ],
)
def test_paths_carry_the_labels_of_their_outlines(outlines: list[str], labels: list[str]) -> None:
    text = goal(outlines)
    generated = new_request(tiny_ids("a"))
    for token_id in tiny_ids(text):
        generated.accept(generated.root, Choice(token_id))
    for request in (generated, new_request(tiny_ids(text)), new_request(tiny_ids(text + " _"))):
        paths = request.branches()[1:]
        assert [path.label for path in paths] == labels
        for path, label in zip(paths, labels, strict=True):
            assert [token.id for token in path.pending] == tiny_ids("<Path> _ " + " ".join(label) + " :")


@pytest.mark.parametrize(("outer", "inner"), [("a", ["1.1", "1.2"]), ("4 . 2 : a", ["4.2.1", "4.2.2"])])
def test_outline_without_a_label_is_numbered_below_its_path(outer: str, inner: list[str]) -> None:
    request = new_request(tiny_ids(goal([outer])))
    path = request.branches()[1]
    for token_id in tiny_ids(goal(["b", "c"])):
        request.accept(path, Choice(token_id))
    assert [branch.label for branch in request.branches()[2:]] == inner
