"""The benchmarks as modules, and a pair of tiny models for them."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from tiny import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent


def programs(*names: str) -> Iterator[SimpleNamespace]:
    """Benchmarks by name, which are programs of the repository and not of the package; for a fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


def tiny_pair(workloads: Any) -> Any:
    """The same random weights in both classes, in float64."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ours = MultiverseForCausalLM(tiny_config("llama", len(tokenizer), **ends)).double().eval()
    add_multiverse_tokens(ours, tokenizer)
    stock = LlamaForCausalLM(tiny_config("llama", ours.config.vocab_size, **ends)).double().eval()
    stock.load_state_dict(ours.state_dict())
    return workloads.Pair(ours, stock, tokenizer)
