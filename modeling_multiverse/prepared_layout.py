"""`PreparedLayout`: what the backbone makes of the tags of a batch, worked out before the batch reaches it.

Reading tags is Python, one step per tag, during which an accelerator waits. A dataloader's worker can do it while the
model trains on the batch before (`multiverse.trainer.collator`). The result travels as keyword arguments of `forward`:
plain tensors with the batch in front, which pinning, device placement, sharding and wrappers treat like `input_ids`.

Shapes: B batch rows, S tokens of a row, R branches, K intervals per key.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from multiverse.kernels.dispatch import PATH_MASK_ATTENTION, SUPPORTED_ATTENTION, unsupported_attention_message
from multiverse.kernels.flex import flex_block_mask
from multiverse.kernels.path_mask import PathMask
from transformers.cache_utils import Cache

from .masking_multiverse import (
    CachedStructure,
    branch_tables,
    dense_causal_mask,
    has_block,
    read_tokens,
    untagged_path_mask,
)
from .tags import check_token_ids

_PREFIX = "layout_"


@dataclass(eq=False)
class PreparedLayout:
    """The structure of a batch that starts from an empty cache. In `forward`, every field is named `layout_...`.

    Attributes:
        branch_ids (`torch.IntTensor` of shape `(B, S)`): branch of every token, -1 for padding.
        position_ids (`torch.LongTensor` of shape `(B, S)`): rotary position of every token; shape `(B, 0)` says that
            no row holds a block, so that mask and positions are the base model's own.
        compatible (`torch.BoolTensor` of shape `(B, R, R)`, *optional*): branch tables, for attention by a dense mask.
        hidden_start, hidden_end (`torch.IntTensor` of shape `(B, K, S)`, *optional*): the intervals of a `PathMask`,
            for all other attention.
    """

    branch_ids: torch.Tensor
    position_ids: torch.Tensor
    compatible: torch.Tensor | None = None
    hidden_start: torch.Tensor | None = None
    hidden_end: torch.Tensor | None = None

    @classmethod
    def prepare(
        cls,
        config: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cumulative_lengths: torch.Tensor | None = None,
    ) -> "PreparedLayout":
        """Reads a batch as the backbone would.

        Args:
            config (`MultiverseConfig`): names the tags and the attention implementation that the mask is for.
            input_ids (`torch.LongTensor` of shape `(B, S)`): the batch.
            attention_mask, position_ids, cumulative_lengths (`torch.Tensor`, *optional*): what `forward` gets besides,
                as in `structured_inputs`.

        Raises:
            ValueError: if the configuration names no tags, or its attention cannot express branches.
        """
        token_ids = check_token_ids(config.multiverse_token_ids)
        implementation = config._attn_implementation
        if implementation not in SUPPORTED_ATTENTION:
            raise ValueError(unsupported_attention_message(implementation))
        rows, length = input_ids.shape
        dense = implementation not in _INTERVAL_ATTENTION
        if not has_block(input_ids, token_ids):
            mask = untagged_path_mask(
                rows, length, 0, attention_mask, position_ids, cumulative_lengths, torch.device("cpu")
            )
            no_positions = torch.empty(rows, 0, dtype=torch.long)
            if dense:
                return cls(mask.branch_ids, no_positions, torch.empty(rows, 0, 0, dtype=torch.bool))
            return cls(mask.branch_ids, no_positions, None, mask.hidden_start, mask.hidden_end)
        state = CachedStructure()
        positions = read_tokens(token_ids, state, input_ids.cpu(), attention_mask, position_ids, cumulative_lengths)
        assert state.machines is not None
        if dense:
            return cls(state.slot_branches[-1].int(), positions, branch_tables(state.machines))
        mask = PathMask.from_machines(state.machines, state.slot_branches[-1])
        return cls(mask.branch_ids, positions, None, mask.hidden_start, mask.hidden_end)

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> "PreparedLayout | None":
        """Takes the layout out of the keyword arguments of `forward`; `None` where there is none."""
        names = [field.name for field in fields(cls)]
        found = {name: arguments.pop(_PREFIX + name) for name in names if _PREFIX + name in arguments}
        if not found:
            return None
        for name in ("branch_ids", "position_ids"):
            if found.get(name) is None:
                raise ValueError(
                    f"`{_PREFIX}{name}` is missing next to {sorted(_PREFIX + other for other in found)}. Pass "
                    "all that the collator made, or nothing of it."
                )
        return cls(**found)

    def arguments(self) -> dict[str, torch.Tensor]:
        """The layout as keyword arguments of `forward`."""
        tensors = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {_PREFIX + name: tensor for name, tensor in tensors if tensor is not None}

    @property
    def tagged(self) -> bool:
        """Whether any row holds a block; known without looking at values, so that no device is waited for."""
        return self.position_ids.shape[1] > 0

    def check(
        self, config: Any, input_ids: torch.Tensor | None, attention_mask: Any, past_key_values: Cache | None
    ) -> None:
        """Raises `ValueError` unless the layout fits the other arguments of `forward`."""
        check_token_ids(config.multiverse_token_ids)
        if input_ids is None:
            raise ValueError(
                f"`input_ids` is missing next to `{_PREFIX}branch_ids`, which describes its tokens. Pass it; soft "
                "prompts, which pass `inputs_embeds` in its place, carry no tags."
            )
        rows, length = input_ids.shape
        wanted = {"branch_ids": [(rows, length)], "position_ids": [(rows, length), (rows, 0)]}
        if self.compatible is not None:
            wanted["compatible"] = [(rows, *self.compatible.shape[-1:] * 2)]
        for name in ("hidden_start", "hidden_end"):
            if getattr(self, name) is not None:
                wanted[name] = [(rows, *getattr(self, name).shape[1:2], length)]
        for name, shapes in wanted.items():
            shape = tuple(getattr(self, name).shape)
            if shape not in shapes:
                raise ValueError(
                    f"`{_PREFIX}{name}` has shape {shape}, but `input_ids` has {(rows, length)}. Let nothing change "
                    f"`input_ids` after the layout was prepared, or drop the `{_PREFIX}...` arguments."
                )
        if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {(rows, length)}, next to "
                f"`{_PREFIX}branch_ids`, got {getattr(attention_mask, 'shape', type(attention_mask).__name__)}. Drop "
                f"the `{_PREFIX}...` arguments to use a mask of your own."
            )
        if past_key_values is not None and past_key_values.get_mask_sizes(length, 0)[0] != length:
            raise ValueError(
                f"`past_key_values` adds slots to those that `{_PREFIX}branch_ids` describes. Drop the `{_PREFIX}...` "
                "arguments to go on from a cache."
            )

    def path_mask(self) -> PathMask:
        """The mask for attention that takes a `PathMask`."""
        if self.hidden_start is None or self.hidden_end is None:
            raise ValueError(self._made_for_another_attention("hidden_start"))
        return PathMask(self.hidden_start, self.hidden_end, self.branch_ids, self.branch_ids.shape[1])

    def attention_mask(self, config: Any, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> object:
        """The mask of a tagged batch, in the form of the model's attention. Arguments as in `structured_inputs`."""
        if config._attn_implementation in _INTERVAL_ATTENTION:
            mask = self.path_mask()
            return flex_block_mask(mask) if config._attn_implementation == "flex_attention" else mask
        if self.compatible is None:
            raise ValueError(self._made_for_another_attention("compatible"))
        branches = self.branch_ids.long()
        return dense_causal_mask(config, branches, self.compatible, 0, branches.shape[1], attention_mask, dtype)

    @staticmethod
    def _made_for_another_attention(name: str) -> str:
        return (
            f"`{_PREFIX}{name}` is missing: the layout was prepared for another `attn_implementation` than the model "
            "has now. Choose it before batches are made, and give the collator the model's own `config`."
        )


#: Attention implementations whose mask is made from intervals.
_INTERVAL_ATTENTION = (*PATH_MASK_ATTENTION, "flex_attention")
