"""The cache of the engine: it grows, and its slots are written once."""

from typing import Any

import pytest
import torch
from decoding import FORK_AND_END, MIXED, PROMPTS, Watch, padded
from multiverse.generation.cache import GrowingCache, GrowingLayer
from tiny import tiny_ids, tiny_model
from transformers import LogitsProcessorList


def test_cache_slots_are_written_once_and_never_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[int, int] = {}
    plain_update = GrowingLayer.update

    def update(layer: GrowingLayer, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        used, address = layer.length, layer.keys.data_ptr() if layer.is_initialized else None
        before = layer.keys[:, :, :used].clone() if used else None
        result = plain_update(layer, keys, values, *args, **kwargs)
        assert written.get(id(layer), 0) == used
        written[id(layer)] = used + keys.shape[2]
        assert layer.length == result[0].shape[2] == result[1].shape[2] == written[id(layer)]
        assert torch.equal(result[0][:, :, used:], keys)
        if used:
            assert layer.keys.data_ptr() == address
            assert torch.equal(layer.keys[:, :, :used], before)
        return result

    monkeypatch.setattr(GrowingLayer, "update", update)
    prompts = [tiny_ids(PROMPTS[name]) for name in MIXED]
    watch = Watch()
    model = tiny_model()
    output = model.generate(
        **padded(prompts),
        streamer=watch,
        logits_processor=LogitsProcessorList([FORK_AND_END]),
        max_new_tokens=90,
        return_dict_in_generate=True,
    )
    generated = sum(report.generated_tokens for report in output.reports)
    pending = sum(len(branch.pending) for request in watch.requests for branch in request.branches())
    assert sum(len(report.branches) for report in output.reports) > 12
    assert list(written.values()) == [sum(map(len, prompts)) + generated - pending] * 2


def test_cache_that_grows_keeps_what_it_holds() -> None:
    cache = GrowingCache(num_layers=2, capacity=3)
    chunks = [torch.randn(1, 2, count, 4) for count in (2, 1, 1, 9, 1, 20)]
    for number in range(len(chunks)):
        for layer, sign in ((0, 1), (1, -1)):
            keys, values = cache.update(sign * chunks[number], 2 * sign * chunks[number], layer)
            everything = torch.cat(chunks[: number + 1], dim=2)
            assert torch.equal(keys, sign * everything)
            assert torch.equal(values, 2 * sign * everything)
            assert cache.get_seq_length(layer) == everything.shape[2]
            assert cache.get_mask_sizes(5, layer) == (everything.shape[2] + 5, 0)
