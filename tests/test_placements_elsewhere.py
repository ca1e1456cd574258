"""Placements where only torch and transformers are installed: a checkpoint's own code runs under device maps, in half
precision, and with its heads split over two processes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bare_environment
import pytest
import torch
from multiverse import MultiverseForCausalLM
from placing import OPTIONS, PROMPT, check_forked, logits_of, write_checkpoint

PLACED = """
import torch
from transformers import AutoModelForCausalLM

folder, given = sys.argv[1:3]
found = {}
for name, arguments in torch.load(given)["placements"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    data = torch.load(given)
    output = model.generate(data["prompt"], **data["options"])
    with torch.no_grad():
        found[name] = {"sequences": output.sequences, "logits": model(output.sequences).logits, "dtype": model.dtype}
assert "multiverse" not in sys.modules
torch.save(found, given + ".found")
"""

SPLIT = """
import os
folder, given, rank = sys.argv[1:4]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
import torch
from transformers import AutoModelForCausalLM

torch.distributed.init_process_group("gloo", f"file://{given}.meeting", rank=int(rank), world_size=2)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, tp_plan="auto").eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert "multiverse" not in sys.modules
data = torch.load(given)
output = model.generate(data["prompt"], **data["options"], pack_linears=False)
with torch.no_grad():
    found = {"sequences": output.sequences, "drawn": output.logits[0], "logits": model(output.sequences).logits}
found["rows"] = model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
torch.save(found, f"{given}.{rank}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Once in a while torch aborts while the interpreter is taken down and a thread of gloo still runs. By now all is said.
os._exit(0)
"""

PLACEMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "auto": {"device_map": "auto"},
    "one device": {"device_map": {"": "cpu"}},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("elsewhere") / "checkpoint", "qwen2")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Device maps are accelerate's.
    return bare_environment.build(tmp_path_factory.mktemp("bare") / "packages", "accelerate")


def test_placements_give_what_the_installed_package_gives(environment: Path, checkpoint: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.pt"
    torch.save({"placements": PLACEMENTS, "prompt": PROMPT, "options": OPTIONS}, given)
    bare_environment.run(environment, PLACED, tmp_path, str(checkpoint), str(given))
    found = torch.load(f"{given}.found")
    assert list(found) == list(PLACEMENTS)
    for name, arguments in PLACEMENTS.items():
        model = MultiverseForCausalLM.from_pretrained(checkpoint, **arguments)
        output = model.generate(PROMPT, **OPTIONS)
        check_forked(output)
        assert found[name]["dtype"] == arguments.get("dtype", torch.float32)
        assert torch.equal(found[name]["sequences"], output.sequences), name
        assert torch.equal(found[name]["logits"], logits_of(model, output.sequences)), name


def test_two_processes_give_what_one_gives(environment: Path, checkpoint: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.pt"
    torch.save({"prompt": PROMPT, "options": OPTIONS}, given)
    homes = [tmp_path / f"home-{rank}" for rank in range(2)]
    for home in homes:
        home.mkdir()
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(bare_environment.run, environment, SPLIT, homes[rank], str(checkpoint), str(given), str(rank))
            for rank in range(2)
        ]
    for run in runs:
        run.result()
    model = MultiverseForCausalLM.from_pretrained(checkpoint)
    output = model.generate(PROMPT, **OPTIONS, pack_linears=False)
    check_forked(output)
    expected = logits_of(model, output.sequences)
    for rank in range(2):
        found = torch.load(f"{given}.{rank}")
        assert found["rows"] * 2 == model.model.layers[0].self_attn.q_proj.weight.shape[0]
        assert torch.equal(found["sequences"], output.sequences)
        assert (found["logits"] - expected).abs().max() <= 1e-5
        assert (found["drawn"] - output.logits[0]).abs().max() <= 1e-5
