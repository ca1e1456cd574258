"""A checkpoint gives the same logits and the same parallel text wherever it is placed: device maps, half precision,
heads split over two processes."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TOLERANCE, every_architecture
from launching import run_script
from multiverse import MultiverseForCausalLM
from placing import OPTIONS, PROMPT, check_forked, logits_of, places_drawn_from, write_checkpoint
from tiny import ARCHITECTURES
from transformers import AutoModelForCausalLM

DEVICE_MAPS: dict[str, Any] = {
    "auto": {"device_map": "auto"},
    "one device": {"device_map": {"": "cpu"}},
    # A layer stays on the disk and is fetched whenever it is run.
    "offloaded": {
        "device_map": {
            **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu"),
            **{"model.layers.1": "disk", "lm_head": "cpu"},
        }
    },
}
front_doors = pytest.mark.parametrize("loader", [MultiverseForCausalLM, AutoModelForCausalLM], ids=["ours", "auto"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint per architecture."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for architecture in ARCHITECTURES:
        write_checkpoint(folder / architecture, architecture)
    return folder


@front_doors
@every_architecture
@pytest.mark.parametrize("placement", list(DEVICE_MAPS))
def test_device_map_changes_nothing(
    checkpoints: Path, architecture: str, placement: str, loader: Any, tmp_path: Path
) -> None:
    plain = MultiverseForCausalLM.from_pretrained(checkpoints / architecture)
    arguments = dict(DEVICE_MAPS[placement])
    if placement == "offloaded":
        arguments["offload_folder"] = tmp_path
    placed = loader.from_pretrained(checkpoints / architecture, **arguments)
    assert type(placed) is type(plain)
    if placement == "offloaded":
        assert placed.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(logits_of(placed, PROMPT), logits_of(plain, PROMPT))
    outputs = [model.generate(PROMPT, **OPTIONS) for model in (placed, plain)]
    check_forked(outputs[0])
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    # Offloaded weights are not packed, so their products are rounded otherwise.
    assert (outputs[0].logits[0] - outputs[1].logits[0]).abs().max() <= TOLERANCE[torch.float32]


@front_doors
@every_architecture
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_decodes_as_exactly_as_a_forward_pass_computes(
    checkpoints: Path, architecture: str, dtype: torch.dtype, loader: Any
) -> None:
    model = loader.from_pretrained(checkpoints / architecture, dtype=dtype)
    assert {weight.dtype for weight in model.state_dict().values()} == {dtype}
    exact = MultiverseForCausalLM.from_pretrained(checkpoints / architecture, dtype=dtype).to(torch.float64)
    output = model.generate(PROMPT, **OPTIONS)
    check_forked(output)
    places = places_drawn_from(output)
    # The yardstick is the same weights in float64: what one forward pass in half precision is off, decoding may be
    # off too, and both together at most.
    truth, forward = (logits_of(each, output.sequences)[0, places].double() for each in (exact, model))
    drawn = output.logits[0].double()
    error = (forward - truth).abs()
    assert error.max() > 1e-3, "the yardstick says nothing"
    assert (drawn - truth).abs().max() <= 1.5 * error.max()
    assert (drawn - truth).abs().mean() <= 1.1 * error.mean()
    assert (drawn - forward).abs().max() <= 2 * error.max()


# Two processes that share every layer's heads and channels.


@pytest.fixture(scope="module")
def ranks(checkpoints: Path) -> list[dict[str, Any]]:
    """What each of two processes computed, by architecture."""
    codes, printed = run_script(__file__, checkpoints, processes=2)
    assert codes == [0, 0], printed[-8000:]
    return [torch.load(checkpoints / f"rank-{rank}.pt") for rank in range(2)]


@every_architecture
def test_tensor_parallelism_gives_the_logits_of_one_process(
    checkpoints: Path, ranks: list[dict[str, Any]], architecture: str
) -> None:
    plain = MultiverseForCausalLM.from_pretrained(checkpoints / architecture)
    expected = logits_of(plain, ranks[0][architecture]["greedy"][0])
    for rank in ranks:
        assert rank[architecture]["heads"] == (2, 1)  # of four and two
        assert (rank[architecture]["logits"] - expected).abs().max() <= 1e-5


@every_architecture
@pytest.mark.parametrize("name", ["greedy", "sampled", "sequential", "packed"])
def test_tensor_parallelism_gives_the_text_of_one_process(
    checkpoints: Path, ranks: list[dict[str, Any]], architecture: str, name: str
) -> None:
    plain = MultiverseForCausalLM.from_pretrained(checkpoints / architecture)
    output = plain.generate(PROMPT, **OPTIONS | DECODING[name])
    if name != "sequential":
        check_forked(output)
    for rank in ranks:
        sequences, logits = rank[architecture][name]
        assert torch.equal(sequences, output.sequences)
        # Shared weights are not packed, one process's are where it was asked to.
        tolerance = TOLERANCE[torch.float32] if name == "packed" else 1e-5
        assert (logits - output.logits[0]).abs().max() <= tolerance


DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"pack_linears": False},
    "sampled": {"pack_linears": False, "do_sample": True, "seed": 5},
    "sequential": {"pack_linears": False, "parallel": False},
    "packed": {"pack_linears": True},
}


def worker(folder: Path) -> None:
    """One of the two processes."""
    found: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        model = MultiverseForCausalLM.from_pretrained(folder / architecture, tp_plan="auto").eval()
        attention = model.model.layers[0].self_attn
        rows = [each.weight.to_local().shape[0] for each in (attention.q_proj, attention.k_proj)]
        found[architecture] = {"heads": tuple(number // attention.head_dim for number in rows)}
        for name, options in DECODING.items():
            output = model.generate(PROMPT, **OPTIONS | options)
            found[architecture][name] = (output.sequences, output.logits[0])
        found[architecture]["logits"] = logits_of(model, found[architecture]["greedy"][0])
    torch.save(found, folder / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    worker(parser.parse_args().folder)
