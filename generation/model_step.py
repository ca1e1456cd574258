"""One forward pass over the new tokens of every branch of every request.

All new tokens stand in one row, all requests share one KV cache, and a boolean mask says which slots each token sees.
Slots carry the label of the branch that wrote them; a branch sees a set of labels. Forks and merges change such sets
and never a slot.

Shapes: T new tokens, S slots in use afterwards, L labels given out so far.
"""

import torch
from multiverse.layout import BranchLayout
from transformers import PreTrainedModel

from .branch import Branch
from .cache import GrowingCache
from .request import Request


class ModelStep:
    """Owns the cache and builds what the model needs.

    Args:
        model (`PreTrainedModel`): a Multiverse causal LM.
        capacity (`int`): cache slots to reserve at first.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model = model
        self.cache = GrowingCache(model.config.num_hidden_layers, capacity)
        self.labels = 0
        self._slot_labels = torch.empty(max(capacity, 1), dtype=torch.long, device=model.device)
        self._slots = 0

    def new_label(self) -> int:
        """A cache-slot label that no branch has yet."""
        self.labels += 1
        return self.labels - 1

    def prefill(self, request: Request) -> torch.Tensor:
        """Runs a prompt and returns the logits after its last token, shape `(vocabulary,)`."""
        layout = BranchLayout.from_machine(request.machine)
        length = len(layout)
        first = self._slots
        device = self.model.device
        self._add_slots(torch.tensor(request.prompt_labels)[layout.branch_ids])
        mask = torch.zeros(length, self._slots, dtype=torch.bool, device=device)
        mask[:, first:] = layout.attention_mask().to(device)
        ids = torch.tensor([request.prompt], device=device)
        return self._forward(ids, layout.position_ids[None].to(device), mask, torch.tensor([length - 1]))[0]

    def decode(self, branches: list[Branch]) -> torch.Tensor:
        """Runs the pending tokens of `branches`; logits after each branch's last one, `(branches, vocabulary)`.

        Args:
            branches (`list[Branch]`): each with pending tokens, which are taken off its queue; in an order in which
                every token comes after all it may see.
        """
        device = self.model.device
        tokens = [(row, token) for row, branch in enumerate(branches) for token in branch.pending]
        rows = torch.tensor([row for row, _ in tokens])
        last = torch.cumsum(torch.tensor([len(branch.pending) for branch in branches]), 0) - 1
        first = self._slots
        self._add_slots(torch.tensor([branch.number for branch in branches])[rows])

        sees = torch.zeros(len(branches), self.labels, dtype=torch.bool)
        for row, branch in enumerate(branches):
            sees[row, list(branch.visible)] = True
        slot_labels = self._slot_labels[: self._slots]
        mask = sees.to(device)[rows.to(device)][:, slot_labels]
        own_slots = torch.arange(first, self._slots, device=device)
        mask &= torch.arange(self._slots, device=device) <= own_slots[:, None]

        ids = torch.tensor([[token.id for _, token in tokens]], device=device)
        positions = torch.tensor([[token.position for _, token in tokens]], device=device)
        for branch in branches:
            branch.pending.clear()
        return self._forward(ids, positions, mask, last)

    def _forward(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """Runs `ids` of shape `(1, T)` under `mask` of shape `(T, S)`; logits of the positions `keep`."""
        outputs = self.model(
            input_ids=ids,
            attention_mask=mask[None, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep.to(ids.device),
            return_dict=True,
        )
        return outputs.logits[0]

    def _add_slots(self, labels: torch.Tensor) -> None:
        end = self._slots + labels.shape[0]
        if end > self._slot_labels.shape[0]:
            larger = self._slot_labels.new_empty(max(end, 2 * self._slot_labels.shape[0]))
            larger[: self._slots] = self._slot_labels[: self._slots]
            self._slot_labels = larger
        self._slot_labels[self._slots : end] = labels.to(self._slot_labels.device)
        self._slots = end
