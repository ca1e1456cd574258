"""The same model under transformers and under Multiverse, and texts that fork as often as a benchmark wants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from multiverse import TAGS, MultiverseForCausalLM, add_multiverse_tokens
from multiverse.hub_card.base_model import DEFAULT_FOLDER, prepare_base_model
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = "the quick brown fox jumps over a lazy dog and runs away through the old forest until night "


@dataclass
class Pair:
    """One set of weights in both classes.

    Attributes:
        ours (`MultiverseForCausalLM`): with tags.
        stock (`PreTrainedModel`): transformers' own class, the same tensors.
        tokenizer: knows the tags.
    """

    ours: MultiverseForCausalLM
    stock: Any
    tokenizer: Any

    @classmethod
    def load(cls, dtype: torch.dtype = torch.float32, base: str | Path = DEFAULT_FOLDER) -> "Pair":
        """SmolLM2-135M-Instruct with tag rows that nothing has trained: texts are forced, so they need not be."""
        prepare_base_model(base)
        ours = MultiverseForCausalLM.from_pretrained(base, dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(base)
        add_multiverse_tokens(ours, tokenizer)
        config = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).config
        config.vocab_size = ours.config.vocab_size
        stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        stock.load_state_dict(ours.state_dict())
        return cls(ours, stock, tokenizer)

    def prompt(self, length: int, paths: int = 0) -> torch.Tensor:
        """`length` tokens that end in a goal for `paths` paths; shape `(1, length)`."""
        text = ""
        if paths:
            outlines = "".join(f"<Outline>\n{number}: look\n</Outline>\n" for number in range(1, paths + 1))
            text = f"<Parallel>\n<Goal>\n{outlines}</Goal>"
        end = self.tokenizer.encode(text)
        start = self.tokenizer.encode(WORDS * (length // 8))[: length - len(end)]
        if len(start) + len(end) != length:
            raise ValueError(f"`length` is {length}, but a goal of {paths} paths takes {len(end)} tokens.")
        return torch.tensor([start + end])

    def never_ending(self) -> dict[str, Any]:
        """Options under which no model ends a text, opens a block or leaves one by itself."""
        banned = [*(self.tokenizer.convert_tokens_to_ids(tag) for tag in TAGS), self.tokenizer.eos_token_id]
        return {"suppress_tokens": banned, "do_sample": False}

    def run_ours(self, ids: torch.Tensor, max_new_tokens: int, **options: Any) -> Any:
        """Generates, with everything that `generate()` can report unless `return_dict_in_generate=False`."""
        return self.ours.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            **{"return_dict_in_generate": True, **self.never_ending(), **options},
        )

    def run_stock(self, ids: torch.Tensor, new_tokens: int, **options: Any) -> Any:
        """Generates as many tokens as the other one did."""
        return self.stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            **{**self.never_ending(), **options},
        )


def tokens_of_paths(paths: int, each: int) -> tuple[int, int]:
    """Budgets for `paths` paths of `each` tokens beyond their header, followed by a conclusion.

    Returns:
        `max_path_tokens`, and the tokens that all paths make together, separators included.
    """
    header = 5  # <Path>, newline, number, colon, and the space of two-digit labels is not there
    limit = header + each
    return limit, paths * (limit + 1)
