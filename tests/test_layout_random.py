"""Layouts of random texts: equal to the brute-force reference, with blocks where they belong."""

from hypothesis import given
from hypothesis import strategies as st
from layout_samples import SAMPLES, every_kind_of_text, examples, layout_of
from multiverse import Block, BranchLayout
from reference_layout import reference_layout
from strategies import encode, token_ids


def blocks_below(blocks: list[Block]) -> list[Block]:
    return [found for b in blocks for found in [b, *(c for p in b.paths for c in blocks_below(p.blocks))]]


@every_kind_of_text
@examples(120)
@given(data=st.data())
def test_branches_positions_and_mask_equal_the_reference(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[kind])
    layout = layout_of(sample)
    reference = reference_layout(sample.ids, token_ids, sample.starts)
    assert len(layout) == len(sample.ids)
    assert layout.branch_ids.tolist() == reference.branches
    assert layout.position_ids.tolist() == reference.positions
    assert layout.attention_mask().tolist() == reference.visible


@every_kind_of_text
@examples(30)
@given(data=st.data())
def test_a_blocks_paths_see_nothing_of_each_other(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[kind])
    layout = layout_of(sample)
    mask = layout.attention_mask()
    for block in blocks_below(layout.blocks):
        spans = [slice(path.start, path.end if path.end is not None else len(layout)) for path in block.paths]
        for later, span in enumerate(spans):
            assert not any(mask[span, earlier].any() for earlier in spans[:later])


@every_kind_of_text
@examples(60)
@given(data=st.data())
def test_blocks_hang_below_the_path_whose_branch_holds_them(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[kind])
    layout = layout_of(sample)
    blocks = blocks_below(layout.blocks)
    assert sorted(block.start for block in blocks) == [
        index for index, token_id in enumerate(sample.ids) if token_id == token_ids["<Parallel>"]
    ]
    roots = {branch for branch, parent in enumerate(layout.machine.parents) if parent < 0}
    assert {block.branch for block in layout.blocks} <= roots
    for block in blocks:
        assert layout.branch_ids[block.start] == block.branch
        for path in block.paths:
            assert {nested.branch for nested in path.blocks} <= {path.branch}


def test_block_in_the_conclusion_of_a_nested_block_hangs_below_the_outer_path() -> None:
    block = "<Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> {} </Conclusion> </Parallel>"
    text = block.format("").replace("<Path>", "<Path> " + block.format(block.format("")))
    layout = BranchLayout.from_token_ids(encode(text), token_ids)
    assert layout.problems == []
    assert [outer.start for outer in layout.blocks] == [0]
    assert [nested.branch for nested in layout.blocks[0].paths[0].blocks] == [1, 1]
