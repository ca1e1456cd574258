"""One forward pass over the new tokens of every branch of every request.

All new tokens stand in one flat row, so every linear layer runs once per step; attention runs request by request over
the request's region of the cache. Forks and merges change the table of visible slots and never a slot.

Shapes: T new tokens, n of them of one request, S slots in use of that request afterwards, F tokens of the flat row,
which is T or, with static shapes, the next size that steps are filled up to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from multiverse.cache_argument import CACHE_ARGUMENT
from multiverse.kernels.decode_plan import ROWS_PER_WORD, DecodePlan, RequestQueries, pack_rows
from multiverse.kernels.folded import fold_mask
from multiverse.kernels.path_mask import PathMask
from multiverse.layout import BranchLayout, read_sequence
from multiverse.masking_multiverse import explicit_mask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .attention import Segment, StepPlan
from .branch import Branch
from .cache import PathCache
from .request import Request
from .slot_bits import SlotBits
from .transfer import on_device
from .visibility import VisibleSlots

#: Prompts are run together up to this many tokens: enough to keep a device busy, few enough for its memory.
PREFILL_TOKENS = 4096

#: With static shapes, steps of more tokens than this are filled up to a multiple of it, others to a power of two.
_LARGE_STEP = 64


def filled_up(tokens: int) -> int:
    """The length of the flat row that a decode step of `tokens` runs in under static shapes."""
    if tokens > _LARGE_STEP:
        return -(-tokens // _LARGE_STEP) * _LARGE_STEP
    return 1 << (tokens - 1).bit_length()


@dataclass
class NewTokens:
    """What one request adds to the flat row of a step.

    Attributes:
        request (`int`): index of the request.
        ids, positions (`list[int]`): the tokens, in an order in which each comes after all it may see.
        visible (`torch.Tensor` of shape `(n, S)`, *optional*): what each sees; `None`: every slot (or see `causal`).
        causal (`bool`): whether these are the request's first tokens, each seeing those up to itself.
        keep (`list[int]`): indices of the tokens whose logits are wanted.
        queries (`RequestQueries`, *optional*): the same as `visible` in the form of the decode kernel.
        path_mask (`PathMask`, *optional*): likewise for a prompt, in the form of the kernel that runs it.
    """

    request: int
    ids: list[int]
    positions: list[int]
    visible: torch.Tensor | None
    causal: bool
    keep: list[int]
    queries: RequestQueries | None = None
    path_mask: PathMask | None = None


class ModelStep:
    """Owns the cache and builds what the model needs.

    Args:
        model (`PreTrainedModel`): a Multiverse causal LM whose attention runs through `path_attention`.
        requests (`Sequence[Request]`): the requests of the call.
        headroom (`int`): slots to reserve at first per request, beyond its prompt.
        implementation (`str`): `"folded"`, `"path_decode"`, or an attention implementation of the model itself.
        static_shapes (`bool`): whether the flat row of a decode step is filled up to one of a few lengths. What it is
            filled with is written to no slot, attends to nothing and is seen by nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        headroom: int,
        implementation: str,
        static_shapes: bool = False,
    ) -> None:
        self.model = model
        self.requests = requests
        self.implementation = implementation
        self.static_shapes = static_shapes
        capacities = [len(request.prompt) + headroom for request in requests]
        self.cache = PathCache(model.config.num_hidden_layers, capacities)
        self.bits = SlotBits(self.cache, model.device) if implementation == "path_decode" else None
        self.tables = [VisibleSlots(capacity, self.bits, number) for number, capacity in enumerate(capacities)]
        config = model.config
        self._group = config.num_attention_heads // config.num_key_value_heads
        # Stands for a mask that has been prepared, so that the backbone prepares none; attention reads the plan.
        self._prepared = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def adopt(self, cache: Cache, columns: list[torch.Tensor]) -> None:
        """Takes over keys and values of an earlier turn.

        Args:
            cache (`Cache`): in linear order.
            columns (`list[torch.Tensor]`): per request the columns of the first tokens of its prompt. At least the
                last token of a prompt is run again, since its logits are wanted.
        """
        for request, own in zip(self.requests, columns, strict=True):
            request.cached = min(len(own), len(request.prompt) - 1)
        kept = [own[: request.cached] for request, own in zip(self.requests, columns, strict=True)]
        self.cache.adopt(cache, kept)

    def run_rest(self) -> None:
        """Runs what is still pending of finished requests, so that their cache is whole."""
        new = [self._rest(number) for number in range(len(self.requests))]
        if new := [tokens for tokens in new if tokens.ids]:
            self._reserve([(each.request, len(each.ids)) for each in new])
            self._forward(new, None if self.bits is None else self._rest_plan(new))

    def prefill(self) -> Iterator[tuple[Request, torch.Tensor]]:
        """Runs the prompts; yields each request with the logits after its last token, shape `(vocabulary,)`."""
        waiting: list[NewTokens] = []
        for number in range(len(self.requests)):
            tokens = self._prompt(number)
            if waiting and sum(len(each.ids) for each in waiting) + len(tokens.ids) > PREFILL_TOKENS:
                yield from self._run_prompts(waiting)
                waiting = []
            waiting.append(tokens)
        yield from self._run_prompts(waiting)

    def decode(self, plan: Sequence[tuple[int, Sequence[Branch]]]) -> torch.Tensor:
        """Runs the pending tokens of branches; logits after each branch's last one, `(branches, vocabulary)`.

        Args:
            plan (`Sequence[tuple[int, Sequence[Branch]]]`): per request its index and branches with pending tokens,
                which are taken off their queues; in an order in which every token comes after all it may see.
        """
        self._reserve([(number, sum(len(branch.pending) for branch in branches)) for number, branches in plan])
        new = [self._branches(number, branches) for number, branches in plan]
        row = filled_up(sum(len(each.ids) for each in new)) if self.static_shapes else 0
        if self.bits is None:
            return self._forward(new, row=row)
        self.bits.flush()
        return self._forward(new, DecodePlan.build([_queries(each) for each in new], self.bits.words), row)

    def _reserve(self, new: list[tuple[int, int]]) -> None:
        """Gives slots to `(request, tokens)` pairs, in the order of the flat row."""
        moves = self.cache.reserve(new)
        if moves and self.bits is not None:
            self.bits.move(moves)

    def _run_prompts(self, prompts: list[NewTokens]) -> Iterator[tuple[Request, torch.Tensor]]:
        self._reserve([(each.request, len(each.ids)) for each in prompts])
        logits = self._forward(prompts)
        for row, tokens in enumerate(prompts):
            yield self.requests[tokens.request], logits[row]

    def _prompt(self, number: int) -> NewTokens:
        """The prompt of a request, and the rows of the branches that it opens."""
        request, table = self.requests[number], self.tables[number]
        layout = BranchLayout.from_machine(request.machine)
        sees = {}
        for branch in request.branches():
            if branch.visible is not None:
                branch.row = table.open_row()
                allowed = torch.zeros(len(request.machine.parents), dtype=torch.bool)
                allowed[list(branch.visible)] = True
                sees[branch.row] = allowed[layout.branch_ids]
        table.append_block(sees)
        plain, cached = len(request.machine.parents) == 1, request.cached
        new = len(layout) - cached
        tokens = NewTokens(
            request=number,
            ids=request.prompt[cached:],
            positions=layout.position_ids[cached:].tolist(),
            visible=None,
            causal=plain and not cached,
            keep=[new - 1],
        )
        if self.bits is not None:
            # Read again: the blocks of `request.machine` have got the paths that the request has opened.
            machine = read_sequence(request.prompt, request.rules.token_ids)
            branches = layout.branch_ids[None]
            tokens.path_mask = PathMask.from_machines([machine], branches, new, self.model.device)
        elif not (plain and (new == 1 or not cached)):
            tokens.visible = layout.attention_mask(cached)
        return tokens

    def _rest(self, number: int) -> NewTokens:
        """Tokens of a finished request that no step has run."""
        request = self.requests[number]
        layout = BranchLayout.from_machine(request.linear_machine())
        ids, slots = request.linear_ids(), torch.tensor(request.linear_slots())
        missing = (slots < 0).nonzero().flatten()
        first = self.cache.regions[number].length
        slots[missing] = torch.arange(first, first + len(missing))
        for branch in request.branches():
            branch.pending.clear()
        tokens = request.root.tokens()
        for place in missing.tolist():
            tokens[place - len(request.prompt)].slot = int(slots[place])
        visible = layout.compatible[layout.branch_ids[missing]][:, layout.branch_ids]
        visible &= torch.arange(len(layout)) <= missing[:, None]
        return NewTokens(
            request=number,
            ids=[ids[place] for place in missing.tolist()],
            positions=layout.position_ids[missing].tolist(),
            # Slots stand in the order in which their tokens were run.
            visible=visible[:, slots.argsort()],
            causal=False,
            keep=[0],
        )

    def _branches(self, number: int, branches: Sequence[Branch]) -> NewTokens:
        """The pending tokens of branches, and what they see."""
        table = self.tables[number]
        tokens = NewTokens(number, [], [], None, causal=False, keep=[])
        rows: list[int] = []
        merged: list[Branch] = []
        for branch in branches:
            if branch.row is None:
                # Opens now; its parent waits and has run all it wrote before the fork.
                assert branch.parent is not None
                assert branch.parent.row is not None
                branch.row = table.open_row(branch.parent.row)
            for child in branch.absorbed:
                # Those that ended in this step have just run their last tokens: they stand before their parent.
                if child.row is not None:
                    table.absorb(branch.row, child.row)
                    merged.append(child)
            branch.absorbed.clear()
            for slot, token in enumerate(branch.pending, start=table.length):
                token.slot = slot
            table.append([branch.row] * len(branch.pending))
            rows += [branch.row] * len(branch.pending)
            tokens.ids += [token.id for token in branch.pending]
            tokens.positions += [token.position for token in branch.pending]
            tokens.keep.append(len(tokens.ids) - 1)
            branch.pending.clear()
        if self.bits is None:
            tokens.visible = table.mask(rows)
        else:
            region = self.cache.regions[number]
            end = region.start + table.length
            limits = range(end - len(rows) + 1, end + 1)
            tokens.queries = RequestQueries(rows, limits, table.seen_by_any(rows) + region.start)
        # Not before: their own last tokens are among the queries.
        for child in merged:
            assert child.row is not None
            table.close_row(child.row)
            child.row = None
        return tokens

    def _rest_plan(self, new: list[NewTokens]) -> DecodePlan:
        """What `_rest` has found, for the decode kernel: every token is a row of its own."""
        most = max(len(each.ids) for each in new)
        bits = torch.zeros(-(-most // ROWS_PER_WORD), self.cache.slots, dtype=torch.int32)
        queries = []
        for each in new:
            region = self.cache.regions[each.request]
            end = region.start + region.length
            assert each.visible is not None
            packed = pack_rows(each.visible)
            bits[: packed.shape[0], region.start : end] = packed
            count = len(each.ids)
            queries.append(RequestQueries(range(count), [end] * count, range(region.start, end)))
        return DecodePlan.build(queries, bits.to(self.model.device))

    def _forward(self, new: list[NewTokens], decode: DecodePlan | None = None, row: int = 0) -> torch.Tensor:
        """Runs new tokens that have their slots, in a flat row of at least `row`; logits, `(kept, vocabulary)`.

        With `row`, logits are computed for as many columns as there are, so that they have a static shape as well.
        """
        device = self.model.device
        segments, keep, first = [], [], 0
        for each in new:
            region = self.cache.regions[each.request]
            end = first + len(each.ids)
            segments.append(
                Segment(first, end, region.start, region.length, each.causal, self._mask(each, region.length))
            )
            keep += [first + place for place in each.keep]
            first = end
            self.requests[each.request].kv_slots = region.length
        filling = [0] * max(0, row - first)
        outputs = self.model(
            input_ids=on_device([[token for each in new for token in each.ids] + filling], device),
            attention_mask=self._prepared,
            position_ids=on_device([[place for each in new for place in each.positions] + filling], device),
            use_cache=True,
            logits_to_keep=on_device(keep + [0] * max(0, row - len(keep)), device),
            return_dict=True,
            path_plan=StepPlan(segments, self.implementation, decode),
            **{CACHE_ARGUMENT: self.cache},
        )
        return outputs.logits[0, : len(keep)]

    def _mask(self, new: NewTokens, slots: int) -> object:
        """What the tokens see in the form that the implementation wants."""
        if self.bits is not None:
            return new.path_mask
        visible, dtype, device = new.visible, self.model.dtype, self.model.device
        if self.implementation == "folded":
            return None if visible is None else fold_mask(visible.to(device, non_blocking=True), self._group, dtype)
        if new.causal and len(new.ids) > 1:
            visible = torch.ones(slots, slots, dtype=torch.bool).tril_()
        if visible is None:
            return None
        return explicit_mask(self.implementation, visible.to(device)[None, None], dtype)


def _queries(new: NewTokens) -> RequestQueries:
    assert new.queries is not None
    return new.queries
