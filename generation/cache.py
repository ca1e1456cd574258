"""A KV cache that grows geometrically, so that a decode step writes its own tokens and copies nothing else."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values, shape `(1, kv heads, slots, head dim)`, in a buffer with room to spare.

    Slots stand in the order in which tokens were run; the branches of all requests share them. Nothing is moved when
    paths fork or merge. The buffer doubles when it is full, which copies each slot O(1) times over a generation.

    Args:
        capacity (`int`): slots to reserve at first.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._buffer(key_states, self.capacity)
        self.values = self._buffer(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends `(1, kv heads, new, head dim)` and returns views of all slots in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        assert self.keys is not None and self.values is not None  # noqa: PT018
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            self.keys = self._grown(self.keys)
            self.values = self._grown(self.values)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0

    def _buffer(self, like: torch.Tensor, capacity: int) -> torch.Tensor:
        return like.new_empty((*like.shape[:2], capacity, like.shape[-1]))

    def _grown(self, buffer: torch.Tensor) -> torch.Tensor:
        larger = self._buffer(buffer, self.capacity)
        larger[:, :, : self.length] = buffer[:, :, : self.length]
        return larger


class GrowingCache(Cache):
    """One [`GrowingLayer`] per layer of the model.

    Args:
        num_layers (`int`): layers of the model.
        capacity (`int`): slots to reserve at first.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[GrowingLayer(capacity) for _ in range(num_layers)])
