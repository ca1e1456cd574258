"""A tiny model and its tokenizer for tests that go in by a standard front door: text in, text out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.generation.report import RequestReport
from tiny import tiny_config, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

#: A block that is about to fork.
GOAL = "<Parallel>\n<Goal>\n<Outline>\n1: one\n</Outline>\n<Outline>\n2: two\n</Outline>\n</Goal>\n"


def front_door(architecture: str = "llama") -> tuple[MultiverseForCausalLM, PreTrainedTokenizerFast]:
    """A random model in float64, and a tokenizer whose generation prompt ends in [`GOAL`], so that chats fork.

    It writes printable ASCII: other bytes in random order are rarely UTF-8, and streams show whole characters only.
    """
    tokenizer = tiny_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = MultiverseForCausalLM(tiny_config(architecture, len(tokenizer), **special)).to(torch.float64).eval()
    tags = set(add_multiverse_tokens(model, tokenizer).values())
    opening = "<|im_start|>assistant\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        f"{opening}{{% endif %}}", f"{opening}{GOAL}{{% endif %}}"
    )
    kept = tags | {tokenizer.eos_token_id}
    unprintable = [
        token_id
        for token_id in range(len(tokenizer))
        if token_id not in kept and (token_id in tokenizer.all_special_ids or not _printable(tokenizer, token_id))
    ]
    model.generation_config.suppress_tokens = unprintable
    model.generation_config.max_path_tokens = 20
    return model, tokenizer


def _printable(tokenizer: PreTrainedTokenizerFast, token_id: int) -> bool:
    text = tokenizer.decode([token_id])
    return text.isascii() and text.isprintable()


@dataclass
class Answer:
    """What `generate()` makes of a prompt.

    Attributes:
        text (`str`): the new tokens, as a front door shows them.
        prompt_tokens (`int`): length of the prompt.
        report (`RequestReport`): of its only row.
    """

    text: str
    prompt_tokens: int
    report: RequestReport


def answer(
    model: MultiverseForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str | list[Mapping[str, str]],
    **options: Any,
) -> Answer:
    """Calls `generate()` itself on a text or a chat."""
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, return_dict_in_generate=True, **options)
    text = tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True)
    return Answer(text, length, output.reports[0])


def check_forked(text: str) -> None:
    """The text goes on from [`GOAL`]: both paths in their order, each with a text of its own, then the conclusion."""
    second, conclusion = text.index("<Path>\n2:"), text.index("<Conclusion>")
    assert text.startswith("<Path>\n1:")
    assert second < conclusion < text.index("</Parallel>")
    bodies = [part.split("</Path>")[0].strip() for part in (text[9:second], text[second + 9 : conclusion])]
    assert all(bodies)
    assert bodies[0] != bodies[1]
