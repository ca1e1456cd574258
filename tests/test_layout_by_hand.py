"""The layout contract, sections 3 to 6.1, on texts written by hand: branches, positions, masks and blocks."""

import pytest
import torch
from layout_samples import (
    NESTED,
    NESTED_BRANCHES,
    NESTED_MASK,
    NESTED_POSITIONS,
    TWO_PATHS,
    TWO_PATHS_BRANCHES,
    TWO_PATHS_MASK,
    TWO_PATHS_POSITIONS,
)
from multiverse import TAGS, BranchLayout
from reference_layout import reference_layout
from strategies import encode, token_ids


def drawn_mask(layout: BranchLayout) -> str:
    return "\n".join("".join("#" if seen else "." for seen in row) for row in layout.attention_mask().tolist())


HAND_WRITTEN = pytest.mark.parametrize(
    ("ids", "branches", "positions", "mask"),
    [
        pytest.param(TWO_PATHS, TWO_PATHS_BRANCHES, TWO_PATHS_POSITIONS, TWO_PATHS_MASK, id="two paths"),
        pytest.param(NESTED, NESTED_BRANCHES, NESTED_POSITIONS, NESTED_MASK, id="nested"),
    ],
)


def test_tags_are_the_twelve_of_the_contract() -> None:
    assert len(TAGS) == 12
    assert set(TAGS) == set(token_ids)


@HAND_WRITTEN
def test_hand_written_example_has_the_layout_drawn_by_hand(
    ids: list[int], branches: list[int], positions: list[int], mask: str
) -> None:
    layout = BranchLayout.from_token_ids(ids, token_ids)
    assert layout.branch_ids.tolist() == branches
    assert layout.position_ids.tolist() == positions
    assert drawn_mask(layout) == mask
    assert layout.branch_ids.dtype == layout.position_ids.dtype == torch.int64
    assert layout.attention_mask().dtype == torch.bool


@HAND_WRITTEN
def test_reference_gives_the_layout_drawn_by_hand(
    ids: list[int], branches: list[int], positions: list[int], mask: str
) -> None:
    reference = reference_layout(ids, token_ids)
    assert (reference.branches, reference.positions) == (branches, positions)
    assert "\n".join("".join(".#"[seen] for seen in row) for row in reference.visible) == mask


def test_hand_written_example_has_the_blocks_written_in_it() -> None:
    outer = BranchLayout.from_token_ids(NESTED, token_ids).blocks
    assert [(block.branch, block.start, block.end) for block in outer] == [(0, 0, 26)]
    assert (outer[0].goal_close, outer[0].goal_position, outer[0].path_position) == (2, 2, 3)
    assert [(p.branch, p.start, p.close, p.end, p.last_position) for p in outer[0].paths] == [
        (1, 4, 18, 20, 13),
        (4, 20, 22, 23, 5),
    ]
    assert (outer[0].conclusion, outer[0].outlines, outer[0].in_path) == (23, [], False)
    (inner,) = outer[0].paths[0].blocks
    assert (inner.branch, inner.start, inner.end, inner.goal_close, inner.path_position) == (1, 6, 18, None, 7)
    assert [(p.branch, p.start, p.close, p.end) for p in inner.paths] == [(2, 8, 10, 11), (3, 11, 14, 16)]
    assert BranchLayout.from_token_ids(TWO_PATHS, token_ids).blocks[0].outlines == [3, 6]


@pytest.mark.parametrize(
    ("text", "branches", "positions"),
    [
        pytest.param(
            "<Parallel> <Path> a b <Path> c <Conclusion>", "0111220", [0, 1, 2, 3, 1, 2, 4], id="cut paths count"
        ),
        pytest.param("<Parallel> </Goal> _ <Path> a </Goal> <Path>", "0001112", [0, 1, 2, 2, 3, 4, 2], id="late goal"),
        pytest.param("<Parallel> </Goal> a </Goal> <Path>", "00001", [0, 1, 2, 3, 2], id="second goal"),
        pytest.param(
            "<Parallel> <Path> </Path> </Path> a <Conclusion>", "011110", [0, 1, 2, 3, 4, 3], id="second close"
        ),
        pytest.param(
            "<Parallel> <Path> a b <Conclusion> c <Path> </Parallel>",
            "01110020",
            [0, 1, 2, 3, 4, 5, 1, 4],
            id="path after conclusion",
        ),
        pytest.param(
            "<Parallel> <Path> a </Parallel> b <Path> </Parallel>", "0110000", [0, 1, 2, 3, 4, 5, 6], id="no block"
        ),
        pytest.param("<Parallel> <Conclusion> </Parallel> a", "0000", [0, 1, 2, 3], id="no paths"),
        pytest.param(
            "<Parallel> <Path> <Parallel> </Path> <Path> </Parallel> <Path>",
            "0111213",
            [0, 1, 2, 3, 4, 5, 1],
            id="innermost open block",
        ),
    ],
)
def test_malformed_text_is_laid_out_by_the_written_decisions(text: str, branches: str, positions: list[int]) -> None:
    layout = BranchLayout.from_token_ids(encode(text), token_ids)
    assert layout.branch_ids.tolist() == [int(branch) for branch in branches]
    assert layout.position_ids.tolist() == positions


def test_path_after_the_conclusion_sees_a_block_in_the_conclusion() -> None:
    ids = encode("<Parallel> <Path> <Conclusion> <Parallel> <Path> a </Parallel> <Path> b")
    mask = BranchLayout.from_token_ids(ids, token_ids).attention_mask()
    assert mask[-1].tolist() == [True, False, True, True, True, True, True, True, True]


def test_packed_documents_restart_and_see_nothing_of_each_other() -> None:
    ids = TWO_PATHS + NESTED[:11] + TWO_PATHS
    layout = BranchLayout.from_token_ids(ids, token_ids, [len(TWO_PATHS), len(TWO_PATHS) + 11])
    alone = [BranchLayout.from_token_ids(part, token_ids) for part in (TWO_PATHS, NESTED[:11], TWO_PATHS)]
    assert torch.equal(layout.position_ids, torch.cat([part.position_ids for part in alone]))
    assert torch.equal(layout.attention_mask(), torch.block_diag(*[part.attention_mask() for part in alone]).bool())
    assert sorted({int(layout.branch_ids[start]) for start in (0, len(TWO_PATHS), len(TWO_PATHS) + 11)}) == [0, 3, 6]
