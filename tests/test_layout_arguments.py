"""Arguments of the layout: what is refused, and the forms in which the same ids and starts may come."""

import pytest
import torch
from layout_samples import NESTED, NESTED_BRANCHES, NESTED_POSITIONS, TWO_PATHS
from multiverse import TAGS, BranchLayout, IncrementalLayout
from strategies import token_ids


def test_first_document_start_may_be_given_or_implied() -> None:
    ids = TWO_PATHS + TWO_PATHS
    implied = BranchLayout.from_token_ids(ids, token_ids, [len(TWO_PATHS)])
    for starts in ([0, len(TWO_PATHS)], [len(TWO_PATHS), 0, 0], torch.tensor([0, len(TWO_PATHS)])):
        given_layout = BranchLayout.from_token_ids(ids, token_ids, starts)
        assert torch.equal(given_layout.branch_ids, implied.branch_ids)
        assert torch.equal(given_layout.position_ids, implied.position_ids)


@pytest.mark.parametrize("tag", TAGS)
def test_token_ids_without_a_tag_are_refused(tag: str) -> None:
    lacking = {name: token_id for name, token_id in token_ids.items() if name != tag}
    for build in (lambda: BranchLayout.from_token_ids([20], lacking), lambda: IncrementalLayout(lacking)):
        with pytest.raises(ValueError, match=f"`token_ids`.*{tag}"):
            build()


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({}, id="empty"),
        pytest.param({**token_ids, "<Path>": token_ids["</Path>"]}, id="one id for two tags"),
        pytest.param({**token_ids, "<Path>": -1}, id="negative"),
        pytest.param({**token_ids, "<Path>": "8"}, id="text"),
        pytest.param({**token_ids, "<Path>": True}, id="bool"),
    ],
)
def test_unusable_token_ids_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="`token_ids"):
        BranchLayout.from_token_ids([20], wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(torch.zeros(2, 3, dtype=torch.long), id="2-D tensor"),
        pytest.param([[20, 21], [22, 23]], id="2-D list"),
        pytest.param(torch.tensor(20), id="0-D tensor"),
        pytest.param(torch.tensor([20.0, 21.0]), id="float tensor"),
        pytest.param([20.0, 21.0], id="float list"),
    ],
)
def test_input_ids_of_another_shape_or_kind_are_refused(wrong: torch.Tensor | list) -> None:
    with pytest.raises(ValueError, match="`input_ids`"):
        BranchLayout.from_token_ids(wrong, token_ids)


@pytest.mark.parametrize("starts", [[3], [-1], [0, 1, 99], torch.tensor([1, 3])])
def test_document_start_outside_is_refused(starts: torch.Tensor | list[int]) -> None:
    with pytest.raises(ValueError, match="`document_starts`"):
        BranchLayout.from_token_ids([20, 21, 22], token_ids, starts)


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(tuple(NESTED), id="tuple"),
        pytest.param(torch.tensor(NESTED), id="int64"),
        pytest.param(torch.tensor(NESTED, dtype=torch.int32), id="int32"),
        pytest.param(torch.tensor([NESTED, NESTED]).T[:, 1], id="strided"),
    ],
)
def test_input_ids_may_be_a_list_or_a_tensor(same: torch.Tensor | tuple[int, ...]) -> None:
    layout = BranchLayout.from_token_ids(same, token_ids)
    assert layout.branch_ids.tolist() == NESTED_BRANCHES
    assert layout.position_ids.tolist() == NESTED_POSITIONS


@pytest.mark.parametrize("empty", [[], torch.zeros(0, dtype=torch.long)])
def test_empty_text_has_an_empty_layout(empty: torch.Tensor | list[int]) -> None:
    layout = BranchLayout.from_token_ids(empty, token_ids)
    assert len(layout) == 0
    assert (layout.branch_ids.tolist(), layout.position_ids.tolist(), layout.problems) == ([], [], [])
    assert layout.attention_mask().shape == (0, 0)
