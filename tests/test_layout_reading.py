"""Reading a text in parts: prefixes, token by token, truncated, in two parts, and at what cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layout_samples import (
    SAMPLES,
    SHORT_SAMPLES,
    TWO_PATHS,
    every_kind_of_text,
    examples,
    layout_of,
    machine_of,
    prefix,
)
from multiverse import BranchLayout, IncrementalLayout
from multiverse.layout import read_sequence
from multiverse.structure import StructureMachine
from strategies import NEWLINE, Sample, encode, token_ids


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
