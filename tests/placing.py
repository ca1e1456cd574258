"""One small checkpoint and one prompt for all the ways in which a model can be placed, and what they are held to.

Its weights are large enough to be packed for decoding on a CPU, also when two processes share them.
"""

from pathlib import Path
from typing import Any

import torch
from decoding import PROMPTS
from multiverse import BranchLayout
from multiverse.generation.output import MultiverseGenerateOutput
from tiny import EOS, TOKEN_IDS, tiny_ids, tiny_model
from transformers import PreTrainedModel

PROMPT = torch.tensor([tiny_ids(PROMPTS["after a goal"])])
#: Three paths of some length and what comes after them.
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 60,
    "max_path_tokens": 12,
    "do_sample": False,
    "suppress_tokens": [EOS],
    "return_dict_in_generate": True,
    "output_logits": True,
}
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.1}


def write_checkpoint(folder: Path, architecture: str, **fields: Any) -> Path:
    """Saves a model with tags and random weights, in float32."""
    tiny_model(architecture, torch.float32, **{**SIZES, **fields}).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def places_drawn_from(output: MultiverseGenerateOutput) -> list[int]:
    """For every sampled token of the only row, the place whose logits it was drawn from."""
    branches = BranchLayout.from_token_ids(output.sequences[0].tolist(), TOKEN_IDS).branch_ids
    places = output.sampled[0].nonzero().flatten().tolist()
    return [max(index for index in range(place) if branches[index] == branches[place]) for place in places]


def check_forked(output: MultiverseGenerateOutput) -> None:
    """The paths of the prompt's goal were written side by side."""
    report = output.reports[0]
    assert {branch.label for branch in report.branches} >= {"", "1", "2", "3"}
    assert report.sequential_steps < report.generated_tokens
