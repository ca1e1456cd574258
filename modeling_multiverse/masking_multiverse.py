"""From token ids to what the backbone's attention needs: positions and a branch-aware causal mask.

Shapes: B batch rows, Q new tokens, S slots (cached and new tokens), R branches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from multiverse.kernels.dispatch import PATH_MASK_ATTENTION, unsupported_attention_message
from multiverse.kernels.flex import flex_block_mask
from multiverse.kernels.path_mask import PathMask
from transformers.cache_utils import Cache

from .layout import compatible_branches, expand_runs, read_sequence
from .structure import StructureMachine


@dataclass
class CachedStructure:
    """What a KV cache must remember so that a continuation knows its branches. Travels as an attribute of the cache.

    Attributes:
        length (`int`): slots seen so far, equal to the cache's length.
        next_positions (`torch.Tensor` of shape `(B,)`, *optional*): position after the last slot of every row, while
            no row holds a block; `None` counts from the slot number.
        machines (`list[StructureMachine]`, *optional*): one per row, from the first block on.
        slot_branches (`list[torch.Tensor]`): branch of every slot, chunks of shape `(B, slots)`, -1 for padding.
        external (`bool`): slots were written under a mask that the caller made, so nothing is known of them.
        token_ids (`torch.Tensor` of shape `(B, columns)`, *optional*): ids of the first slots, padding included, where
            `generate()` has left them.
    """

    length: int = 0
    next_positions: torch.Tensor | None = None
    machines: list[StructureMachine] | None = None
    slot_branches: list[torch.Tensor] = field(default_factory=list)
    external: bool = False
    token_ids: torch.Tensor | None = None

    ATTRIBUTE = "multiverse_structure"

    @classmethod
    def of(cls, cache: Cache | None) -> "CachedStructure":
        """The structure recorded on `cache`, cut to its present length (`Cache.crop` shortens it unseen)."""
        length = int(cache.get_seq_length()) if cache is not None else 0
        state = getattr(cache, cls.ATTRIBUTE, None)
        if state is None or length == 0:
            # A cache from elsewhere (prefix tuning): an untagged prefix of that length.
            return cls(length=length)
        return state if length == state.length else state.cropped(length)

    @classmethod
    def reorder(cls, cache: Cache, rows: torch.LongTensor) -> None:
        """Gives every row of `cache` the contents of another, and the structure that goes with them.

        Args:
            rows (`torch.LongTensor` of shape `(new rows,)`): the row that each goes on from; some may be left out.
        """
        state = getattr(cache, cls.ATTRIBUTE, None)
        cache.reorder_cache(rows)
        if state is not None:
            setattr(cache, cls.ATTRIBUTE, cls.of(cache).selected(rows))

    def selected(self, rows: torch.Tensor) -> "CachedStructure":
        """The structure of the given rows. A row that is repeated goes several ways from here, so each has a copy."""
        positions = None if self.next_positions is None else self.next_positions[rows.to(self.next_positions.device)]
        ids = None if self.token_ids is None else self.token_ids[rows.to(self.token_ids.device)]
        if self.machines is None:
            return CachedStructure(self.length, positions, external=self.external, token_ids=ids)
        branches = torch.cat(self.slot_branches, dim=1)
        # Replayed from its tags, which is many times faster than a deep copy.
        machines = [self.machines[row].truncated(self.machines[row].length) for row in rows.tolist()]
        return CachedStructure(self.length, None, machines, [branches[rows.to(branches.device)]], self.external, ids)

    def cropped(self, length: int) -> "CachedStructure":
        """The structure of the first `length` slots."""
        if length > self.length:
            raise ValueError(
                f"`past_key_values` holds {length} slots, the structure recorded with it {self.length}. Continue with "
                "the cache object that this model returned, or start from an empty one."
            )
        removed = self.length - length
        positions = None if self.next_positions is None else self.next_positions - removed
        ids = None if self.token_ids is None else self.token_ids[:, :length]
        if self.machines is None:
            return CachedStructure(length, positions, external=self.external, token_ids=ids)
        branches = torch.cat(self.slot_branches, dim=1)[:, :length]
        real = (branches >= 0).sum(dim=1).tolist()
        machines = [machine.truncated(count) for machine, count in zip(self.machines, real, strict=True)]
        return CachedStructure(length, None, machines, [branches], self.external, ids)

    def rows(
        self,
        batch_size: int,
        device: torch.device,
        first_positions: torch.Tensor | None = None,
        cached_mask: torch.Tensor | None = None,
    ) -> None:
        """Makes sure that there is a machine for every row, reading what is cached as an untagged prefix.

        Args:
            first_positions (`torch.Tensor` of shape `(B,)`, *optional*): positions of the first new tokens, where the
                caller has given them.
            cached_mask (`torch.Tensor` of shape `(B, length)`, *optional*): 0 where a cached slot is padding.
        """
        if self.machines is None:
            self.machines = [StructureMachine() for _ in range(batch_size)]
            real = torch.ones(batch_size, self.length, dtype=torch.bool)
            if cached_mask is not None:
                real = cached_mask.bool().cpu()
            known = self.next_positions if first_positions is None else first_positions
            if known is not None and batch_size % len(known) == 0:
                # `Cache.batch_repeat_interleave` repeats rows unseen.
                known = known.repeat_interleave(batch_size // len(known))
            positions = [self.length] * batch_size if known is None else known.tolist()
            for machine, position, count in zip(self.machines, positions, real.sum(dim=1).tolist(), strict=True):
                machine.resume_at(position - count)
                machine.read_plain(count)
            self.slot_branches = [real.long().sub(1).to(device)]
        elif len(self.machines) != batch_size:
            raise ValueError(
                f"`input_ids` has {batch_size} rows, `past_key_values` was filled with {len(self.machines)}. Continue "
                "with the same rows, or choose them with `CachedStructure.reorder`, which takes their blocks along."
            )


def has_block(input_ids: torch.Tensor, token_ids: Mapping[str, int]) -> bool:
    """Whether any row opens a block: without `<Parallel>` no other tag means anything."""
    return bool((input_ids == token_ids["<Parallel>"]).any())


def structured_inputs(
    config,
    state: CachedStructure,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cumulative_lengths: torch.Tensor | None,
    past_key_values: Cache | None,
    dtype: torch.dtype,
) -> tuple[object, torch.Tensor]:
    """Reads the new tokens into `state` and returns the attention mask (in the backend's own form) and positions.

    Args:
        config (`MultiverseConfig`): names the tags and the attention implementation.
        state (`CachedStructure`): updated in place; a fresh one without a cache.
        input_ids (`torch.LongTensor` of shape `(B, Q)`): new tokens.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 where a slot is padding, on either side.
        position_ids (`torch.LongTensor` of shape `(1 or B, Q)`, *optional*): read for one thing only, the start of
            packed documents (every 0 in it, when there is neither a mask nor a cache).
        cumulative_lengths (`torch.Tensor`, *optional*): of the documents of a single packed row (`cu_seq_lens_q`),
            used in place of `position_ids`.
        dtype (`torch.dtype`): of the hidden states, for additive masks.

    Returns:
        The mask for the backbone and `position_ids` of shape `(B, Q)`. Padding gets position 0 and is never seen.
    """
    positions = read_tokens(
        config.multiverse_token_ids, state, input_ids, attention_mask, position_ids, cumulative_lengths
    )
    mask = branch_causal_mask(config, state, input_ids, attention_mask, past_key_values, dtype)
    return mask, positions.to(input_ids.device)


def read_tokens(
    token_ids: Mapping[str, int],
    state: CachedStructure,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cumulative_lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Reads the new tokens into `state` and returns their positions, on the CPU. Arguments as in `structured_inputs`,
    with `token_ids` the id of every tag."""
    batch_size, new = input_ids.shape
    device = input_ids.device
    real = torch.ones(batch_size, new, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask[:, -new:].bool().cpu()
    first_positions = None
    if state.machines is None and state.length and position_ids is not None:
        # The caller knows best which rows are cached: they may have been reordered or repeated since the prefill.
        first = real.int().argmax(dim=1, keepdim=True)
        first_positions = position_ids.cpu().expand(batch_size, -1).gather(1, first)[:, 0]
    cached_mask = None
    if attention_mask is not None and attention_mask.shape[1] == state.length + new:
        cached_mask = attention_mask[:, : state.length]
    state.rows(batch_size, device, first_positions, cached_mask)
    starts: list[list[int] | None] = [None] * batch_size
    if attention_mask is None and state.length == 0:
        starts = document_starts(position_ids, cumulative_lengths, batch_size, new)

    ids = input_ids.cpu()
    positions = torch.zeros(batch_size, new, dtype=torch.long)
    branches = torch.full((batch_size, new), -1, dtype=torch.long)
    assert state.machines is not None
    for row, machine in enumerate(state.machines):
        before = machine.length
        read_sequence(ids[row][real[row]], token_ids, starts[row], machine)
        branches[row, real[row]], positions[row, real[row]] = expand_runs(machine, before)
    state.slot_branches.append(branches.to(device))
    state.length += new
    return positions


def branch_causal_mask(
    config,
    state: CachedStructure,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    dtype: torch.dtype,
) -> object:
    """The causal mask of the new tokens over all slots, with incompatible branches taken out."""
    device = input_ids.device
    branches = torch.cat(state.slot_branches, dim=1)
    state.slot_branches = [branches]
    assert state.machines is not None
    # A static cache is longer than what it holds; the causal rule hides the rest, the index must merely exist.
    slots = past_key_values.get_mask_sizes(input_ids.shape[1], 0)[0] if past_key_values is not None else 0
    spare = max(0, int(slots) - branches.shape[1])
    if config._attn_implementation in (*PATH_MASK_ATTENTION, "flex_attention") and not spare:
        path_mask = PathMask.from_machines(state.machines, branches, input_ids.shape[1])
        return flex_block_mask(path_mask) if config._attn_implementation == "flex_attention" else path_mask
    if config._attn_implementation in PATH_MASK_ATTENTION:
        raise ValueError(
            f"`past_key_values` has room for {slots} slots beyond those in use, which {config._attn_implementation!r} "
            "cannot leave out. Pass a `DynamicCache`, or use `attn_implementation='sdpa'`."
        )
    first = branches.shape[1] - input_ids.shape[1]
    branches = torch.nn.functional.pad(branches, (0, spare), value=-1)
    compatible = branch_tables(state.machines).to(device)
    return dense_causal_mask(config, branches, compatible, first, input_ids.shape[1], attention_mask, dtype)


def branch_tables(machines: Sequence[StructureMachine]) -> torch.Tensor:
    """Which branches of each row may see each other, bool of shape `(B, R, R)`; False beyond those that it has."""
    tables = [compatible_branches(machine) for machine in machines]
    count = max(table.shape[0] for table in tables)
    return torch.stack([torch.nn.functional.pad(table, (0, count - table.shape[0]) * 2) for table in tables])


def dense_causal_mask(
    config,
    branches: torch.Tensor,
    compatible: torch.Tensor,
    first: int,
    queries: int,
    attention_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> object:
    """The causal mask with incompatible branches taken out, in the form of the model's attention.

    Two look-ups in the branch tables and the causal rule: a predicate for every pair of tokens, as transformers' own
    mask functions want it, takes nine times as long.

    Args:
        branches (`torch.LongTensor` of shape `(B, S)`): branch of every slot, -1 for padding.
        compatible (`torch.BoolTensor` of shape `(B, R, R)`): branch table of every row.
        first, queries (`int`): slot of the first new token, and how many there are.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 where a slot is padding.
    """
    rows, count = compatible.shape[:2]
    real = branches >= 0
    if attention_mask is not None:
        given = attention_mask.to(branches.device, torch.bool)
        real = real & torch.nn.functional.pad(given, (0, branches.shape[1] - given.shape[1]))
    # Padding is one more branch, which no other may see.
    keys = branches.masked_fill(~real, count)
    columns = torch.nn.functional.pad(compatible, (0, 1)).gather(2, keys[:, None].expand(-1, count, -1))
    new = branches[:, first : first + queries].clamp(min=0)
    visible = columns[torch.arange(rows, device=branches.device)[:, None], new].tril_(first)
    return explicit_mask(config._attn_implementation, visible[:, None], dtype)


def untagged_path_mask(
    batch_size: int,
    new: int,
    cached: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cumulative_lengths: torch.Tensor | None,
    device: torch.device,
) -> PathMask:
    """The mask of text without blocks: causal, without padding, each packed document by itself.

    Args:
        batch_size, new, cached (`int`): rows, new tokens, and slots that the cache holds already.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 where a slot is padding.
        position_ids, cumulative_lengths (`torch.Tensor`, *optional*): as in `structured_inputs`.
    """
    slots = cached + new
    real = torch.ones(batch_size, slots, dtype=torch.bool)
    if attention_mask is not None:
        real[:, slots - attention_mask.shape[1] :] = attention_mask.bool().cpu()
    starts: list[list[int] | None] = [None] * batch_size
    if attention_mask is None and not cached:
        starts = document_starts(position_ids, cumulative_lengths, batch_size, new)
    branches = torch.full((batch_size, slots), -1, dtype=torch.long)
    machines = []
    for row in range(batch_size):
        machine = StructureMachine()
        for start in starts[row] or ():
            machine.read_plain(start - machine.length)
            machine.start_document()
        machine.read_plain(int(real[row].sum()) - machine.length)
        branches[row, real[row]] = expand_runs(machine)[0]
        machines.append(machine)
    return PathMask.from_machines(machines, branches, new, device)


def explicit_mask(implementation: str | None, attention_mask: torch.Tensor, dtype: torch.dtype) -> object:
    """Brings a 4D mask into the form that an attention implementation really honours.

    A bool mask of shape `(B, 1, Q, S)` (True = may attend) is right on every supported backend after this; passed on
    as it is, eager attention would add 0 and 1 to the scores and leak without a word. Additive float masks are handed
    through.
    """
    if attention_mask.dtype != torch.bool:
        return attention_mask
    if implementation == "sdpa":
        return attention_mask
    if implementation in ("eager", None):
        zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
        return torch.where(attention_mask, zero, torch.finfo(dtype).min)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        batch_size, _, queries, slots = attention_mask.shape
        return create_block_mask(
            lambda b, h, q, kv: attention_mask[b, 0, q, kv],
            B=batch_size,
            H=None,
            Q_LEN=queries,
            KV_LEN=slots,
            device=str(attention_mask.device),
        )
    raise ValueError(unsupported_attention_message(implementation))


def document_starts(
    position_ids: torch.Tensor | None, cumulative_lengths: torch.Tensor | None, batch_size: int, length: int
) -> list[list[int] | None]:
    """Where the packed documents of a batch without padding begin.

    Args:
        position_ids (`torch.Tensor` of shape `(1 or batch_size, length)`, *optional*): every 0 in it is a start.
        cumulative_lengths (`torch.Tensor`, *optional*): of the documents of a single row (`cu_seq_lens_q`), used in
            place of `position_ids`.
        batch_size, length (`int`): shape of the batch.

    Returns:
        Indices for every row, `None` for rows that hold a single document.
    """
    if cumulative_lengths is not None and batch_size == 1:
        return [[start for start in cumulative_lengths.tolist() if start < length]]
    if position_ids is None:
        return [None] * batch_size
    rows = position_ids.cpu().expand(batch_size, -1)
    return [(row == 0).nonzero().flatten().tolist() for row in rows]
