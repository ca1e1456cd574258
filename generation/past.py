"""`past_key_values` of an earlier turn: taken over at the start of a call, given back at its end.

Between calls keys and values stand in linear order, in a transformers cache whose columns are those of the sequences;
so it serves `model.forward`, the decoding loops of transformers and the branch engine alike. Inside a call they stand
in the order in which tokens were run.
"""

from collections.abc import Sequence

import torch
from multiverse.layout import expand_runs
from multiverse.masking_multiverse import CachedStructure
from multiverse.structure import StructureMachine
from transformers.cache_utils import Cache, DynamicLayer

from .cache import PathCache
from .request import Request

#: Attribute of a cache that the caller has passed: it is wanted back in full.
WANTED = "multiverse_wanted"


def cached_columns(cache: Cache | None, input_ids: torch.Tensor, real: torch.Tensor) -> list[torch.Tensor] | None:
    """The columns of `past_key_values` that hold tokens of each row; `None` for an empty cache.

    Args:
        cache (`Cache`, *optional*): as given to `generate()`.
        input_ids (`torch.LongTensor` of shape `(B, N)`): the whole text so far, its cached beginning included.
        real (`torch.BoolTensor` of shape `(B, N)`): False where `input_ids` is padding.

    Raises:
        ValueError: if the cache cannot be what the beginning of `input_ids` gave.
    """
    if cache is None:
        return None
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__})
        raise ValueError(
            f"`past_key_values` has layers of the kind {', '.join(kinds)}; branches go on from a plain `DynamicCache` "
            "only. Pass the cache of an earlier `generate()` or forward pass, or leave it out."
        )
    if not (length := int(cache.get_seq_length())):
        return None
    held = cache.layers[0].keys  # type: ignore[union-attr]
    assert held is not None
    rows = held.shape[0]
    if rows != input_ids.shape[0]:
        raise ValueError(
            f"`past_key_values` holds {rows} rows, the call has {input_ids.shape[0]} (`num_return_sequences` "
            "included). Bring the cache to as many rows with its `batch_repeat_interleave`."
        )
    if length > input_ids.shape[1]:
        raise ValueError(
            f"`past_key_values` holds {length} tokens, `input_ids` only {input_ids.shape[1]}. Pass the whole text, "
            "the cached tokens first, or crop the cache."
        )
    state = _structure(cache, rows)
    if state.external:
        raise ValueError(
            "`past_key_values` was filled under a 4D `attention_mask`, so its branches are unknown. Leave it out."
        )
    if state.token_ids is not None:
        known = state.token_ids.to(input_ids.device)
        shown = real[:, : known.shape[1]].to(input_ids.device)
        hidden = shown != (known >= 0)
        if hidden.any():
            row, column = hidden.nonzero()[0].tolist()
            what = "shows padding" if shown[row, column] else "hides a token"
            raise ValueError(
                f"`attention_mask` {what} of `past_key_values` at row {row}, column {column}. Give it 0 for the "
                "padding of the returned `sequences` (where `branch_ids` is -1), and 1 for all else."
            )
        differs = (known != input_ids[:, : known.shape[1]]) & shown
        if differs.any():
            row, column = differs.nonzero()[0].tolist()
            raise ValueError(
                f"`input_ids` differs from the tokens of `past_key_values` at row {row}, column {column}: "
                f"{int(input_ids[row, column])} instead of {int(known[row, column])}. Put the new turn behind the "
                "returned `sequences`; text that is tokenised again need not give the same ids."
            )
    return [row.nonzero().flatten() for row in real[:, :length]]


def check_past_structure(cache: Cache, machines: Sequence[StructureMachine], cached: Sequence[int]) -> None:
    """Refuses a cache whose recorded blocks or positions are not those of the text.

    Args:
        cache (`Cache`): with the structure that a Multiverse model has recorded on it, if any.
        machines (`Sequence[StructureMachine]`): of every row's whole text.
        cached (`Sequence[int]`): how many tokens of each row are cached.
    """
    known = hasattr(cache, CachedStructure.ATTRIBUTE)
    state = _structure(cache, len(machines))
    for row, (machine, count) in enumerate(zip(machines, cached, strict=True)):
        # Without a record the cached beginning was read as plain text.
        recorded = None if state.machines is None else state.machines[row]
        if _tags_of_blocks(machine, count) != ([] if recorded is None else _tags_of_blocks(recorded, recorded.length)):
            raise ValueError(
                f"`past_key_values` was filled with other tags than row {row} of `input_ids` begins with. Put the new "
                "turn behind the returned `sequences`, or leave the cache out."
            )
        if not known or not count:
            continue
        if recorded is not None:
            position = recorded.next_position
        else:
            position = state.length if state.next_positions is None else int(state.next_positions[row])
        expected = machine.truncated(count).next_position
        if position != expected:
            raise ValueError(
                f"`past_key_values` goes on at position {position} in row {row}, its tokens at {expected}. Fill the "
                "cache with the `attention_mask` of this call and with `position_ids` that leave padding out, or "
                "leave it out."
            )


def _tags_of_blocks(machine: StructureMachine, end: int) -> list[tuple[int, str]]:
    """Tags before index `end`, from the first block on: what stands before it may have been read as plain text."""
    tags = [event for event in machine.events if event[0] < end and event[1]]
    first = next((place for place, (_, tag) in enumerate(tags) if tag == "<Parallel>"), len(tags))
    return tags[first:]


def _structure(cache: Cache, rows: int) -> CachedStructure:
    """The structure recorded on `cache`, brought to as many rows as it has: `Cache.batch_repeat_interleave` repeats
    them unseen."""
    state = CachedStructure.of(cache)
    records = (state.machines, state.token_ids, state.next_positions)
    count = next((len(record) for record in records if record is not None), rows)
    if count == rows:
        return state
    if rows % count:
        raise ValueError(
            f"`past_key_values` holds {rows} rows, the structure recorded with it {count}. Choose rows with "
            "`CachedStructure.reorder`, which takes their blocks along."
        )
    return state.selected(torch.arange(count).repeat_interleave(rows // count))


def return_past(
    target: Cache, source: PathCache, requests: Sequence[Request], sequences: torch.Tensor, real: torch.Tensor
) -> None:
    """Fills `target` with the longest beginning of `sequences` that has been run in every row.

    Args:
        target (`Cache`): emptied first.
        source (`PathCache`): of the call that is over.
        requests (`Sequence[Request]`): with the slot of every token.
        sequences (`torch.LongTensor` of shape `(B, N)`): what the call returns.
        real (`torch.BoolTensor` of shape `(B, N)`): False where `sequences` is padding.
    """
    columns, slots = [], []
    length = sequences.shape[1] - 1
    for row, request in enumerate(requests):
        own = real[row].nonzero().flatten()
        run = torch.tensor(request.linear_slots())
        missing = (run < 0).nonzero().flatten()
        if len(missing):
            length = min(length, int(own[missing[0]]))
        columns.append(own)
        slots.append(run)
    target.reset()
    if length <= 0:
        return
    machines, branches = [], torch.full((len(requests), length), -1, dtype=torch.long)
    for row, request in enumerate(requests):
        kept = columns[row] < length
        columns[row], slots[row] = columns[row][kept], slots[row][kept] + source.regions[row].start
        machine = request.linear_machine().truncated(len(columns[row]))
        branches[row, columns[row]] = expand_runs(machine)[0]
        machines.append(machine)
    for number in range(len(source.layers)):
        keys, values = (_in_columns(buffer, columns, slots, length) for buffer in source.buffers(number))
        target.update(keys, values, number)
    # Without a machine, padding may stand on the left only: `crop` takes off as many positions as columns.
    left_padded = all(len(own) == 0 or int(own[0]) + len(own) == length for own in columns)
    if not left_padded or any(machine.blocks for machine in machines):
        state = CachedStructure(length, None, machines, [branches.to(sequences.device)])
    else:
        after = torch.tensor([machine.next_position for machine in machines], device=sequences.device)
        state = CachedStructure(length, after)
    state.token_ids = sequences[:, :length].masked_fill(~real[:, :length].to(sequences.device), -1)
    setattr(target, CachedStructure.ATTRIBUTE, state)


def _in_columns(
    buffer: torch.Tensor, columns: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], length: int
) -> torch.Tensor:
    """Slots of a layer's buffer, put into their columns: `(B, kv heads, length, head dim)`, 0 in padding."""
    # index_select copies whole slots, indexing goes through them element by element.
    picked = [buffer[0].index_select(1, held.to(buffer.device)) for held in slots]
    if len(columns) == 1 and len(columns[0]) == length:
        return picked[0][None]
    linear = buffer.new_zeros((len(columns), buffer.shape[1], length, buffer.shape[3]))
    for row, own in enumerate(columns):
        linear[row].index_copy_(1, own.to(buffer.device), picked[row])
    return linear
