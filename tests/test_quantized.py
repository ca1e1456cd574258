"""Weights in 8 and 4 bits: decoding in parallel gives the logits of a forward pass, and a quantised checkpoint loads.

bitsandbytes and torchao are imported by transformers and PEFT wherever they are installed, so they lie in a folder of
their own (see the Makefile), and what needs them runs in processes that are told of it: one with the package, one
without, which loads the checkpoint through its own code.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bare_environment
import pytest
import torch
from cases import TOLERANCE
from placing import OPTIONS, PROMPT, logits_of, places_drawn_from, write_checkpoint

PACKAGES = Path(sys.prefix) / "quantized"
BACKENDS = ("bitsandbytes", "torchao")

pytestmark = pytest.mark.skipif(
    not all(find_spec(name) or (PACKAGES / name).is_dir() for name in BACKENDS),
    reason="needs bitsandbytes and torchao (`make venv`, or the extra `quantized`)",
)

#: What each kind keeps in the place of a weight.
KINDS = {
    "torchao 8 bits": "Int8Tensor",
    "torchao 4 bits": "IntxUnpackedToInt8Tensor",
    "bitsandbytes 8 bits": "Int8Params",
    "bitsandbytes 4 bits": "Params4bit",
    "bitsandbytes 4 bits, nested": "Params4bit",
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))

ELSEWHERE = """
sys.path.append(sys.argv[1])
import torch
from transformers import AutoModelForCausalLM

folder, given = sys.argv[2:4]
data = torch.load(given)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
assert torch.equal(model.generate(data["prompt"], **data["options"]).sequences, data["sequences"])
with torch.no_grad():
    assert torch.equal(model(data["sequences"]).logits, data["logits"])
print("\\nloaded", type(model).__name__)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker below reports."""
    folder = tmp_path_factory.mktemp("quantized")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


@every_kind
def test_quantised_model_decodes_in_parallel(results: dict[str, Any], kind: str) -> None:
    found = results[kind]
    assert found["weight"] == KINDS[kind]
    assert found["change"] > 0.01, "the weights are not quantised"
    assert {"1", "2", "3"} <= set(found["labels"])
    assert found["steps"] < 0.75 * found["tokens"]


@every_kind
def test_forward_pass_gives_the_logits_that_tokens_were_drawn_from(results: dict[str, Any], kind: str) -> None:
    largest, mean = results[kind]["difference"]
    if kind.startswith("torchao"):
        # Products of the weights that are kept, in the precision of the activations.
        assert largest <= TOLERANCE[torch.float32]
    else:
        # bitsandbytes rounds a product of one row otherwise than one of several, and in 8 bits by what stands in all
        # rows. The yardstick is what that costs ordinary decoding: the same model on the same text without tags.
        ordinary_largest, ordinary_mean = results[kind]["ordinary difference"]
        assert largest <= max(1.5 * ordinary_largest, TOLERANCE[torch.float32])
        assert mean <= max(1.2 * ordinary_mean, TOLERANCE[torch.float32] / 10)


@pytest.mark.parametrize("name", ["saved", "plain"])
def test_quantised_checkpoint_is_loaded_as_it_was_saved(results: dict[str, Any], name: str) -> None:
    assert results[name] == {"layer": "Linear4bit", "logits": True, "text": True}


def test_quantised_checkpoint_is_loaded_through_its_own_code(results: dict[str, Any], tmp_path: Path) -> None:
    environment = bare_environment.build(tmp_path / "packages", "accelerate", *BACKENDS)
    arguments = [str(PACKAGES), str(results["folder"] / "saved"), str(results["folder"] / "expected.pt")]
    printed = bare_environment.run(environment, ELSEWHERE, tmp_path, *arguments)
    assert printed.split()[-2:] == ["loaded", "MultiverseQwen2ForCausalLM"]


# The worker: everything below runs in a process that finds the backends.


def kinds() -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import BitsAndBytesConfig, TorchAoConfig

    nested = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four_bits = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    return {
        "bitsandbytes 4 bits": BitsAndBytesConfig(load_in_4bit=True),
        "bitsandbytes 4 bits, nested": BitsAndBytesConfig(load_in_4bit=True, **nested),
        "bitsandbytes 8 bits": BitsAndBytesConfig(load_in_8bit=True),
        "torchao 8 bits": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao 4 bits": TorchAoConfig(four_bits),
    }


def report_on(model: Any, exact: Any) -> dict[str, Any]:
    """How a model decodes, and how far that is from one forward pass and from ordinary decoding."""
    output = model.generate(PROMPT, **OPTIONS)
    report = output.reports[0]
    difference = (output.logits[0] - logits_of(model, output.sequences)[0, places_drawn_from(output)]).abs()
    ordinary = ordinary_difference(model, output.sequences)
    change = (logits_of(model, PROMPT) - logits_of(exact, PROMPT)).abs().max()
    return {
        "weight": type(model.model.layers[0].mlp.up_proj.weight).__name__,
        "labels": [branch.label for branch in report.branches],
        "steps": report.sequential_steps,
        "tokens": report.generated_tokens,
        "difference": (float(difference.max()), float(difference.mean())),
        "ordinary difference": (float(ordinary.max()), float(ordinary.mean())),
        "change": float(change),
    }


@torch.no_grad()
def ordinary_difference(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """How far one token after another is from one forward pass, for a model that knows no tags."""
    from transformers import DynamicCache

    tags, model.config.multiverse_token_ids = model.config.multiverse_token_ids, None
    cache = DynamicCache()
    steps = [model(ids[:, [place]], past_key_values=cache).logits[:, -1] for place in range(ids.shape[1])]
    difference = (torch.stack(steps, dim=1) - model(ids).logits).abs()
    model.config.multiverse_token_ids = tags
    return difference


def worker(folder: Path) -> None:
    from multiverse import MultiverseForCausalLM
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    write_checkpoint(folder / "whole", "qwen2")
    exact = MultiverseForCausalLM.from_pretrained(folder / "whole").eval()
    found: dict[str, Any] = {}
    for kind, config in kinds().items():
        model = MultiverseForCausalLM.from_pretrained(folder / "whole", quantization_config=config)
        found[kind] = report_on(model, exact)

    config = kinds()["bitsandbytes 4 bits"]
    model = MultiverseForCausalLM.from_pretrained(folder / "whole", quantization_config=config)
    # Before anything is computed: bitsandbytes 0.50 reorders weights for some CPUs then, and saves them wrongly.
    model.save_pretrained(folder / "saved")
    sequences = model.generate(PROMPT, **OPTIONS).sequences
    expected = {"prompt": PROMPT, "options": OPTIONS, "sequences": sequences, "logits": logits_of(model, sequences)}
    torch.save(expected, folder / "expected.pt")
    # The same weights as a checkpoint of the base class, such as others have published.
    Qwen2ForCausalLM.from_pretrained(folder / "whole", quantization_config=config).save_pretrained(folder / "plain")
    for name, loader in (("saved", AutoModelForCausalLM), ("plain", MultiverseForCausalLM)):
        loaded = loader.from_pretrained(folder / name)
        loaded.config.update({key: value for key, value in exact.config.to_dict().items() if "multiverse_" in key})
        found[name] = {
            "layer": type(loaded.model.layers[0].mlp.up_proj).__name__,
            "logits": torch.equal(logits_of(loaded, sequences), expected["logits"]),
            "text": torch.equal(loaded.generate(PROMPT, **OPTIONS).sequences, sequences),
        }
    (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
