"""The layout contract, sections 3 to 6.1: branches, positions, masks, prefixes, problems and errors."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse import TAGS, Block, BranchLayout, IncrementalLayout
from multiverse.layout import read_sequence
from multiverse.problems import ProblemKind
from multiverse.structure import StructureMachine
from reference_layout import reference_layout
from strategies import NEWLINE, Sample, encode, packed, shuffled, skeleton, token_ids, trees, truncated

SAMPLES = {
    "trees": trees(),
    "truncated": truncated(trees()),
    "shuffled": shuffled(),
    "skeletons": skeleton(),
    "packed": packed(),
}
SHORT_SAMPLES = {
    "trees": trees(50),
    "truncated": truncated(trees(60)),
    "shuffled": shuffled(50),
    "skeletons": skeleton(20),
    "packed": packed(16),
}

every_kind_of_text = pytest.mark.parametrize("kind", list(SAMPLES))


def examples(count: int) -> settings:
    return settings(deadline=None, derandomize=True, max_examples=count)


def layout_of(sample: Sample) -> BranchLayout:
    return BranchLayout.from_token_ids(sample.ids, token_ids, sample.starts)


def prefix(sample: Sample, length: int) -> Sample:
    starts = None if sample.starts is None else [start for start in sample.starts if start < length]
    return Sample(sample.ids[:length], starts)


def machine_of(sample: Sample) -> StructureMachine:
    return read_sequence(sample.ids, token_ids, sample.starts)


def drawn_mask(layout: BranchLayout) -> str:
    return "\n".join("".join("#" if seen else "." for seen in row) for row in layout.attention_mask().tolist())


def blocks_below(blocks: list[Block]) -> list[Block]:
    return [found for b in blocks for found in [b, *(c for p in b.paths for c in blocks_below(p.blocks))]]


# Path 1 is tokens 9..12, path 2 tokens 13..17: each keeps the newline after its `</Path>`.
TWO_PATHS = encode(
    "a <Parallel> <Goal> <Outline> b </Outline> <Outline> </Outline> </Goal> "
    "<Path> c </Path> _ "
    "<Path> d e </Path> _ "
    "<Conclusion> f </Conclusion> </Parallel> g"
)
TWO_PATHS_BRANCHES = [0] * 9 + [1] * 4 + [2] * 5 + [0] * 5
TWO_PATHS_POSITIONS = [*range(9), 9, 10, 11, 12, 9, 10, 11, 12, 13, 13, 14, 15, 16, 17]
TWO_PATHS_MASK = """
#......................
##.....................
###....................
####...................
#####..................
######.................
#######................
########...............
#########..............
##########.............
###########............
############...........
#############..........
#########....#.........
#########....##........
#########....###.......
#########....####......
#########....#####.....
###################....
####################...
#####################..
######################.
#######################
""".strip()

# Path 1 (tokens 4..19) holds a block without a goal, whose paths are tokens 8..10 and 11..15. Path 2 is tokens 20..22.
NESTED = encode(
    "<Parallel> <Goal> </Goal> _ "
    "<Path> a <Parallel> _ "
    "<Path> b </Path> "
    "<Path> c d </Path> _ "
    "<Conclusion> </Parallel> </Path> _ "
    "<Path> e </Path> "
    "<Conclusion> </Conclusion> </Parallel>"
)
NESTED_BRANCHES = [0] * 4 + [1] * 4 + [2] * 3 + [3] * 5 + [1] * 4 + [4] * 3 + [0] * 3
NESTED_POSITIONS = [
    *(0, 1, 2, 3),
    *(3, 4, 5, 6),
    *(7, 8, 9),
    *(7, 8, 9, 10, 11),
    *(11, 12, 13, 14),
    *(3, 4, 5),
    *(14, 15, 16),
]
NESTED_MASK = """
#.........................
##........................
###.......................
####......................
#####.....................
######....................
#######...................
########..................
#########.................
##########................
###########...............
########...#..............
########...##.............
########...###............
########...####...........
########...#####..........
#################.........
##################........
###################.......
####################......
####................#.....
####................##....
####................###...
########################..
#########################.
##########################
""".strip()

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


@every_kind_of_text
@examples(25)
@given(data=st.data())
def test_layout_of_a_prefix_is_the_prefix_of_the_layout(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SHORT_SAMPLES[kind])
    whole = layout_of(sample)
    mask = whole.attention_mask()
    for length in range(len(sample.ids) + 1):
        part = layout_of(prefix(sample, length))
        assert torch.equal(part.branch_ids, whole.branch_ids[:length])
        assert torch.equal(part.position_ids, whole.position_ids[:length])
        assert torch.equal(part.attention_mask(), mask[:length, :length])


@every_kind_of_text
@examples(20)
@given(data=st.data())
def test_incremental_layout_equals_branch_layout_token_by_token(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SHORT_SAMPLES[kind])
    incremental = IncrementalLayout(token_ids)
    for index, token_id in enumerate(sample.ids):
        if sample.starts is not None and index in sample.starts:
            incremental.start_document()
        branch, position = incremental.append(token_id)
        whole, twin = layout_of(prefix(sample, index + 1)), incremental.layout()
        assert (branch, position) == (int(whole.branch_ids[-1]), int(whole.position_ids[-1]))
        assert torch.equal(twin.branch_ids, whole.branch_ids)
        assert torch.equal(twin.position_ids, whole.position_ids)
        assert torch.equal(twin.compatible, whole.compatible)
        assert twin.blocks == whole.blocks
        assert twin.problems == whole.problems


@every_kind_of_text
@examples(30)
@given(data=st.data())
def test_truncated_machine_equals_reading_fewer_tokens(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SHORT_SAMPLES[kind])
    machine = machine_of(sample)
    for length in range(len(sample.ids) + 1):
        assert vars(machine.truncated(length)) == vars(machine_of(prefix(sample, length)))
    assert vars(machine) == vars(machine_of(sample))


@pytest.mark.parametrize("length", [-1, 24])
def test_truncating_to_more_or_less_than_was_read_is_refused(length: int) -> None:
    machine = machine_of(Sample(TWO_PATHS))
    with pytest.raises(ValueError, match="`length`"):
        machine.truncated(length)


@examples(60)
@given(st.data(), st.one_of(*SAMPLES.values()))
def test_reading_in_two_parts_equals_reading_at_once(data: st.DataObject, sample: Sample) -> None:
    cut = data.draw(st.integers(0, len(sample.ids)))
    starts = sample.starts or []
    machine = read_sequence(sample.ids[:cut], token_ids, [start for start in starts if start < cut])
    rest = [start - cut for start in starts if start >= cut]
    assert read_sequence(sample.ids[cut:], token_ids, rest, machine) is machine
    assert vars(machine) == vars(machine_of(sample))
    tail = BranchLayout.from_machine(machine, start=cut)
    assert torch.equal(tail.branch_ids, layout_of(sample).branch_ids[cut:])
    assert torch.equal(tail.position_ids, layout_of(sample).position_ids[cut:])


def test_packed_documents_restart_and_see_nothing_of_each_other() -> None:
    ids = TWO_PATHS + NESTED[:11] + TWO_PATHS
    layout = BranchLayout.from_token_ids(ids, token_ids, [len(TWO_PATHS), len(TWO_PATHS) + 11])
    alone = [BranchLayout.from_token_ids(part, token_ids) for part in (TWO_PATHS, NESTED[:11], TWO_PATHS)]
    assert torch.equal(layout.position_ids, torch.cat([part.position_ids for part in alone]))
    assert torch.equal(layout.attention_mask(), torch.block_diag(*[part.attention_mask() for part in alone]).bool())
    assert sorted({int(layout.branch_ids[start]) for start in (0, len(TWO_PATHS), len(TWO_PATHS) + 11)}) == [0, 3, 6]


def test_first_document_start_may_be_given_or_implied() -> None:
    ids = TWO_PATHS + TWO_PATHS
    implied = BranchLayout.from_token_ids(ids, token_ids, [len(TWO_PATHS)])
    for starts in ([0, len(TWO_PATHS)], [len(TWO_PATHS), 0, 0], torch.tensor([0, len(TWO_PATHS)])):
        given_layout = BranchLayout.from_token_ids(ids, token_ids, starts)
        assert torch.equal(given_layout.branch_ids, implied.branch_ids)
        assert torch.equal(given_layout.position_ids, implied.position_ids)


MINIMAL_PROBLEMS: list[tuple[ProblemKind, str, int]] = [
    (
        "unclosed block",
        "a <Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Path> <Conclusion> </Conclusion>",
        1,
    ),
    ("stray close", "a </Path>", 1),
    ("stray close", "</Parallel>", 0),
    ("path outside a block", "a b <Path> </Path>", 2),
    ("block without goal", "a <Parallel> <Path> </Path> <Conclusion> </Conclusion> </Parallel>", 1),
    ("empty goal", "<Parallel> <Goal> a </Goal> <Conclusion> </Conclusion> </Parallel>", 1),
    (
        "paths unequal outlines",
        "a <Parallel> <Goal> <Outline> </Outline> <Outline> </Outline> </Goal> "
        "<Path> </Path> <Conclusion> </Conclusion> </Parallel>",
        1,
    ),
    (
        "missing conclusion",
        "a <Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Path> </Parallel>",
        1,
    ),
    ("unclosed tag", "a <Think> b", 1),
    (
        "unclosed tag",
        "<Parallel> <Goal> <Outline> </Outline> </Goal> <Path> a <Conclusion> </Conclusion> </Parallel>",
        5,
    ),
    ("misplaced tag", "a <Goal> <Outline> </Outline> </Goal>", 1),
    (
        "misplaced tag",
        "<Parallel> <Goal> <Outline> </Outline> </Goal> <Path> </Path> "
        "<Conclusion> </Conclusion> <Conclusion> </Conclusion> </Parallel>",
        9,
    ),
]


@pytest.mark.parametrize(("kind", "text", "index"), MINIMAL_PROBLEMS)
def test_problem_is_named_at_the_offending_token(kind: ProblemKind, text: str, index: int) -> None:
    problems = BranchLayout.from_token_ids(encode(text), token_ids).problems
    assert (kind, index) in [(problem.kind, problem.index) for problem in problems]
    problem = next(problem for problem in problems if problem.kind == kind)
    assert kind in str(problem)
    assert str(index) in str(problem)
    assert problem.message in str(problem)


@pytest.mark.parametrize(
    ("kind", "text", "index"), [example for example in MINIMAL_PROBLEMS if not example[1].startswith("a <Goal>")]
)
def test_minimal_example_has_one_problem_only(kind: ProblemKind, text: str, index: int) -> None:
    problems = BranchLayout.from_token_ids(encode(text), token_ids).problems
    assert [(problem.kind, problem.index) for problem in problems] == [(kind, index)]


def test_every_kind_of_problem_has_a_minimal_example() -> None:
    assert {kind for kind, _, _ in MINIMAL_PROBLEMS} == set(get_args(ProblemKind))


@examples(100)
@given(trees())
def test_well_formed_text_has_no_problems(sample: Sample) -> None:
    assert layout_of(sample).problems == []


@examples(100)
@given(st.data(), trees())
def test_text_that_lost_a_tag_has_a_problem(data: st.DataObject, sample: Sample) -> None:
    tags = [index for index, token_id in enumerate(sample.ids) if token_id < NEWLINE]
    if tags:
        lost = data.draw(st.sampled_from(tags))
        assert layout_of(Sample(sample.ids[:lost] + sample.ids[lost + 1 :])).problems


@every_kind_of_text
@examples(60)
@given(data=st.data())
def test_problems_come_in_order_and_point_at_tags(kind: str, data: st.DataObject) -> None:
    sample = data.draw(SAMPLES[kind])
    indices = [problem.index for problem in layout_of(sample).problems]
    assert indices == sorted(indices)
    assert all(sample.ids[index] < NEWLINE for index in indices)


def test_block_cut_by_the_next_document_is_unclosed() -> None:
    ids = encode("<Parallel> <Goal> <Outline> </Outline> </Goal> a </Parallel>")
    problems = BranchLayout.from_token_ids(ids, token_ids, [5]).problems
    assert [(problem.kind, problem.index) for problem in problems] == [("unclosed block", 0), ("stray close", 6)]


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


def test_32768_tokens_are_read_with_python_steps_for_the_tags_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"read_tag": 0, "read_plain": 0}

    def counted(name: str) -> None:
        original = getattr(StructureMachine, name)

        def wrapper(self: StructureMachine, argument: str | int) -> None:
            calls[name] += 1
            original(self, argument)

        monkeypatch.setattr(StructureMachine, name, wrapper)

    path = [*encode("<Path> 1 :"), *encode("a") * 2000, *encode("</Path> _")]
    block = encode("<Parallel> <Goal> </Goal>") + path * 3 + encode("<Conclusion> b </Conclusion> </Parallel>")
    ids = torch.full((32_768,), *encode("c"))
    ids[: 5 * len(block)] = torch.tensor(block * 5)
    tags = 5 * (3 + 3 * 2 + 3)
    assert int((ids < NEWLINE).sum()) == tags

    counted("read_tag")
    counted("read_plain")
    layout = BranchLayout.from_token_ids(ids, token_ids, [0])
    assert calls["read_tag"] == tags
    assert calls["read_plain"] <= 2 * tags + 2

    assert layout.branch_ids.unique().tolist() == list(range(1 + 5 * 3))
    block_positions = 3 + (len(path) - 1) + 4
    assert int(layout.position_ids[len(block)]) == block_positions
    assert int(layout.position_ids[-1]) == 32_767 - 5 * (len(block) - block_positions)
