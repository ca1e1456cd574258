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
    if cache is None or not (length := int(cache.get_seq_length())):
        return None
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers} - {DynamicLayer.__name__})
        raise ValueError(
            f"`past_key_values` has layers of the kind {', '.join(kinds)}; branches go on from a plain `DynamicCache` "
            "only. Pass the cache of an earlier `generate()` or forward pass, or leave it out."
        )
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
    state = CachedStructure.of(cache)
    if state.external:
        raise ValueError(
            "`past_key_values` was filled under a 4D `attention_mask`, so its branches are unknown. Leave it out."
        )
    if state.token_ids is not None:
        known = state.token_ids.to(input_ids.device)
        differs = (known != input_ids[:, : known.shape[1]]) & real[:, : known.shape[1]].to(input_ids.device)
        if differs.any():
            row, column = differs.nonzero()[0].tolist()
            raise ValueError(
                f"`input_ids` differs from the tokens of `past_key_values` at row {row}, column {column}: "
                f"{int(input_ids[row, column])} instead of {int(known[row, column])}. Put the new turn behind the "
                "returned `sequences`; text that is tokenised again need not give the same ids."
            )
    return [row.nonzero().flatten() for row in real[:, :length]]


def check_past_structure(cache: Cache, machines: Sequence[StructureMachine], cached: Sequence[int]) -> None:
    """Refuses a cache whose recorded blocks are not those of the text.

    Args:
        cache (`Cache`): with the structure that a Multiverse model has recorded on it, if any.
        machines (`Sequence[StructureMachine]`): of every row's whole text.
        cached (`Sequence[int]`): how many tokens of each row are cached.
    """
    recorded = CachedStructure.of(cache).machines
    for row, (machine, count) in enumerate(zip(machines, cached, strict=True)):
        tags = [event for event in machine.events if event[0] < count and event[1]]
        # Without a record the cached beginning was read as plain text.
        found = [] if recorded is None else [event for event in recorded[row].events if event[0] < count and event[1]]
        if recorded is None and not any(tag == "<Parallel>" for _, tag in tags):
            continue
        if tags != found:
            raise ValueError(
                f"`past_key_values` was filled with other tags than row {row} of `input_ids` begins with. Put the new "
                "turn behind the returned `sequences`, or leave the cache out."
            )


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
    if any(len(machine.parents) > 1 or machine.open_blocks or machine.blocks for machine in machines):
        state = CachedStructure(length, None, machines, [branches.to(sequences.device)])
    else:
        after = torch.tensor([machine.next_position for machine in machines], device=sequences.device)
        state = CachedStructure(length, after)
    state.token_ids = sequences[:, :length].clone()
    setattr(target, CachedStructure.ATTRIBUTE, state)


def _in_columns(
    buffer: torch.Tensor, columns: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], length: int
) -> torch.Tensor:
    """Slots of a layer's buffer, put into their columns: `(B, kv heads, length, head dim)`, 0 in padding."""
    linear = buffer.new_zeros((len(columns), buffer.shape[1], length, buffer.shape[3]))
    for row, (own, held) in enumerate(zip(columns, slots, strict=True)):
        linear[row, :, own.to(buffer.device)] = buffer[0, :, held.to(buffer.device)]
    return linear
