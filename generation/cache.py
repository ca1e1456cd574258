"""One KV cache for all requests of a call, in which a step writes its own tokens and nothing else is moved.

Every request owns a contiguous region of slots. Regions grow geometrically, so each slot is copied O(1) times over a
generation, and never at a fork or a merge.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer


@dataclass
class Region:
    """The slots of one request: `start` to `start + length` are in use, `capacity` are reserved."""

    start: int
    capacity: int
    length: int = 0


class SlotRegions:
    """Gives out the slots of all requests. Cache and layers share it, so that neither refers to the other: a cache is
    freed with its last user, not at some later garbage collection.

    Args:
        capacities (`list[int]`): slots to reserve at first, per request.

    Attributes:
        regions (`list[Region]`): per request.
        slots (`int`): slots of all regions, reserved ones included.
        writes (`list[tuple[int, int]]`): `(first slot, count)` per run of new tokens of the present step.
    """

    def __init__(self, capacities: list[int]) -> None:
        self.regions: list[Region] = []
        self.slots = 0
        for capacity in capacities:
            self.regions.append(Region(self.slots, capacity))
            self.slots += capacity
        self.writes: list[tuple[int, int]] = []

    def reserve(self, new: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Gives slots to `(request, tokens)` pairs; returns what must be moved first, as `(from, to, slots)`."""
        full = any(self.regions[request].length + count > self.regions[request].capacity for request, count in new)
        moves = self._grow(dict(new)) if full else []
        self.writes = []
        for request, count in new:
            region = self.regions[request]
            self.writes.append((region.start + region.length, count))
            region.length += count
        return moves

    def _grow(self, new: dict[int, int]) -> list[tuple[int, int, int]]:
        """Doubles what is more than half full: requests of similar length then grow together, not one by one."""
        moves = []
        self.slots = 0
        for request, region in enumerate(self.regions):
            needed = region.length + new.get(request, 0)
            if 2 * needed > region.capacity:
                region.capacity = 2 * needed
            moves.append((region.start, self.slots, region.length))
            region.start = self.slots
            self.slots += region.capacity
        return moves


class PathCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, shape `(1, kv heads, slots, head dim)`, regions side by side.

    `update` writes the new tokens to the slots that `PathCache.reserve` gave out and returns the whole buffers, since
    attention runs region by region.
    """

    is_sliding = False

    def __init__(self, slots: SlotRegions) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._buffer(key_states)
        self.values = self._buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `(1, kv heads, new, head dim)` and returns the buffers of all regions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None  # noqa: PT018
        first = 0
        for start, count in self.slots.writes:
            self.keys[:, :, start : start + count] = key_states[:, :, first : first + count]
            self.values[:, :, start : start + count] = value_states[:, :, first : first + count]
            first += count
        return self.keys, self.values

    def move(self, moves: list[tuple[int, int, int]]) -> None:
        """Goes over to buffers of the present size; `moves` are `(from, to, slots)`."""
        if self.is_initialized:
            assert self.keys is not None and self.values is not None  # noqa: PT018
            self.keys = self._moved(self.keys, moves)
            self.values = self._moved(self.values, moves)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return sum(region.length for region in self.slots.regions)

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        for region in self.slots.regions:
            region.length = 0

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty((*like.shape[:2], self.slots.slots, like.shape[-1]))

    def _moved(self, buffer: torch.Tensor, moves: list[tuple[int, int, int]]) -> torch.Tensor:
        larger = self._buffer(buffer)
        for source, target, count in moves:
            larger[:, :, target : target + count] = buffer[:, :, source : source + count]
        return larger


class PathCache(Cache):
    """The cache of a call of `generate()`.

    Args:
        num_layers (`int`): layers of the model.
        capacities (`list[int]`): slots to reserve at first, per request.

    Attributes:
        regions (`list[Region]`): per request.
        moved_slots (`int`): slots copied so far because regions had to grow.
    """

    def __init__(self, num_layers: int, capacities: list[int]) -> None:
        self._slots = SlotRegions(capacities)
        self.moved_slots = 0
        super().__init__(layers=[PathCacheLayer(self._slots) for _ in range(num_layers)])

    @property
    def regions(self) -> list[Region]:
        return self._slots.regions

    def adopt(self, cache: Cache, columns: list[torch.Tensor]) -> None:
        """Copies what an earlier turn has left to the beginning of every region.

        Args:
            cache (`Cache`): layers of shape `(B, kv heads, length, head dim)`.
            columns (`list[torch.Tensor]`): per request the columns of its tokens.
        """
        self.reserve([(request, len(own)) for request, own in enumerate(columns)])
        for number, layer in enumerate(cache.layers):
            assert isinstance(layer, DynamicLayer)
            keys, values = (
                torch.cat([held[row][:, own.to(held.device)] for row, own in enumerate(columns)], dim=1)[None]
                for held in (layer.keys, layer.values)
                if held is not None
            )
            self.update(keys, values, number)

    def buffers(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, shape `(1, kv heads, slots, head dim)`, regions side by side."""
        layer = self.layers[number]
        assert isinstance(layer, PathCacheLayer)
        assert layer.keys is not None and layer.values is not None  # noqa: PT018
        return layer.keys, layer.values

    @property
    def slots(self) -> int:
        """Slots of all regions, reserved ones included."""
        return self._slots.slots

    def reserve(self, new: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        """Gives slots to the tokens of the next forward pass.

        Args:
            new (`list[tuple[int, int]]`): `(request, tokens)` in the order of the flat row.

        Returns:
            `list[tuple[int, int, int]]`: what has moved since a region had to grow, as `(from, to, slots)`.
        """
        moves = self._slots.reserve(new)
        self.moved_slots += sum(count for _, _, count in moves)
        for layer in self.layers:
            assert isinstance(layer, PathCacheLayer)
            if moves:
                layer.move(moves)
        return moves
