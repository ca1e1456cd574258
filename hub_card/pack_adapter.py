"""Makes a trained adapter small enough to ship: bfloat16, trained tensors only, the base model by its public name.

PEFT also saves the whole embedding when the vocabulary has grown. All rows but the tags' are the base model's, and
`add_multiverse_tokens` makes the tags' starting rows again, so the trained tag rows are enough.

`python -m multiverse.hub_card.pack_adapter runs/smollm2-parallel hub_card/adapter`
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(
    source: Annotated[Path, typer.Argument(help="Folder that the trainer wrote.")],
    target: Annotated[Path, typer.Argument(help="Folder to ship.")],
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json to `target`."""
    weights = source / "adapter_model.safetensors"
    if not weights.is_file():
        raise ValueError(f"`source` ({source}) holds no adapter_model.safetensors. Train with `--use_peft`.")
    target.mkdir(parents=True, exist_ok=True)
    trained = {name: weight for name, weight in load_file(weights).items() if "lora_" in name or "trainable_" in name}
    packed = {name: weight.to(torch.bfloat16) for name, weight in trained.items()}
    save_file(packed, target / weights.name, metadata={"format": "pt"})
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = BASE_MODEL
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    megabytes = (target / weights.name).stat().st_size / 1e6
    print(f"{len(packed)} tensors, {megabytes:.1f} MB in {target}")


if __name__ == "__main__":
    typer.run(main)
