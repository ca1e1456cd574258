"""Checkpoints pass between minor versions of transformers, through their own code and with the package.

The oldest and the newest supported version lie in folders of their own (see the Makefile); the one between them runs
the tests. What is exchanged is also spoken with: transformers 5.24 has renamed the argument that holds the cache.
"""

import inspect
import sys
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import bare_environment
import pytest
import torch
from cases import TOLERANCE
from multiverse import MultiverseForCausalLM
from packaging.requirements import Requirement
from placing import OPTIONS, PROMPT, check_forked, write_checkpoint
from tiny import goal, tiny_ids
from transformers import DynamicCache

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {name: Path(sys.prefix) / name for name in ("older", "newer")}
#: Behind the first turn: two more paths.
QUESTION = torch.tensor([tiny_ids(f"_ v w {goal('xy')}")])


def version_in(folder: Path) -> str | None:
    """The version of the transformers in a folder of packages, if there is one."""
    return next((found.version for found in distributions(name="transformers", path=[str(folder)])), None)


every_other = pytest.mark.parametrize(
    "beside",
    [
        pytest.param(
            folder,
            id=name,
            marks=pytest.mark.skipif(
                version_in(folder) in (None, version("transformers")),
                reason=f"needs another transformers than the installed one in {name} (`make venv`)",
            ),
        )
        for name, folder in FOLDERS.items()
    ],
)


def results(model: Any, data: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Two turns on one cache, and one forward pass that goes on from it."""
    model.eval()
    cache = DynamicCache()

    def turn(ids: torch.Tensor) -> Any:
        # Random weights may say the padding token.
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **data["options"])

    first = turn(data["prompt"])
    assert data["prompt"].shape[1] < cache.get_seq_length() < first.sequences.shape[1]
    conversation = torch.cat([first.sequences, data["question"]], dim=1)
    second = turn(conversation)
    cached = cache.get_seq_length()
    assert conversation.shape[1] < cached < second.sequences.shape[1]
    for output in (first, second):
        assert output.reports[0].sequential_steps < output.reports[0].generated_tokens
    with torch.no_grad():
        whole = model(second.sequences).logits
        rest = model(second.sequences[:, cached:], past_key_values=cache).logits
    # Not to the last bit from version to version: 5.23 attends from a single token in a way of its own.
    assert (rest - whole[:, cached:]).abs().max() <= data["tolerance"]
    return {"first": first.sequences, "second": second.sequences, "logits": whole}


#: What every environment runs on a checkpoint; the second argument says what it must give.
COMMON = f"""
from typing import Any
import torch
from transformers import AutoModelForCausalLM, DynamicCache, __version__

{inspect.getsource(results)}

def check(model, expected):
    found = results(model, expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    return found

def through_its_own_code(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    return model
"""

OTHER_SCRIPT = (
    COMMON
    + """
ours, theirs, package = sys.argv[1:4]
expected = torch.load(ours + ".pt")
check(through_its_own_code(ours), expected)
sys.path.append(package)
from multiverse import MultiverseForCausalLM
model = MultiverseForCausalLM.from_pretrained(ours)
torch.save({**expected, **check(model, expected)}, theirs + ".pt")
model.save_pretrained(theirs)
print("\\nran", __version__)
"""
)

INSTALLED_SCRIPT = (
    COMMON
    + """
theirs = sys.argv[1]
check(through_its_own_code(theirs), torch.load(theirs + ".pt"))
print("\\nran", __version__)
"""
)


@every_other
def test_checkpoints_pass_between_two_minor_versions(beside: Path, tmp_path: Path) -> None:
    ours, theirs = write_checkpoint(tmp_path / "ours", "qwen2"), tmp_path / "theirs"
    model = MultiverseForCausalLM.from_pretrained(ours)
    check_forked(model.generate(PROMPT, **OPTIONS))
    given: dict[str, Any] = {"prompt": PROMPT, "question": QUESTION, "options": OPTIONS}
    given["tolerance"] = TOLERANCE[model.dtype]
    expected = results(model, given)
    conversation = torch.cat([expected["first"], QUESTION], dim=1)
    without_cache = model.generate(conversation, attention_mask=torch.ones_like(conversation), **OPTIONS)
    assert torch.equal(expected["second"], without_cache.sequences)
    torch.save({**given, **expected}, f"{ours}.pt")

    package = tmp_path / "package"
    package.mkdir()
    (package / "multiverse").symlink_to(ROOT / "modeling_multiverse")
    homes = [tmp_path / name for name in ("home-other", "home-installed")]
    for home in homes:
        home.mkdir()
    with_other = with_transformers_of(beside, tmp_path / "with-other")
    printed = bare_environment.run(with_other, OTHER_SCRIPT, homes[0], str(ours), str(theirs), str(package))
    assert (ran := printed.split()[-1]) == version_in(beside) != version("transformers")
    assert f'"transformers_version": "{ran}"' in (theirs / "config.json").read_text()

    with_installed = bare_environment.build(tmp_path / "with-installed")
    printed = bare_environment.run(with_installed, INSTALLED_SCRIPT, homes[1], str(theirs))
    assert printed.split()[-1] == version("transformers")
    known = torch.load(f"{theirs}.pt")
    found = results(MultiverseForCausalLM.from_pretrained(theirs), given)
    assert all(torch.equal(found[name], known[name]) for name in found)


@pytest.mark.skipif(
    None in map(version_in, FOLDERS.values()), reason="needs an older and a newer transformers (`make venv`)"
)
def test_the_versions_beside_the_installed_one_are_the_ends_of_what_is_supported() -> None:
    lines = [line.strip(' ",') for line in (ROOT / "pyproject.toml").read_text().splitlines()]
    (supported,) = (line for line in lines if line.startswith("transformers"))
    ends = {each.operator: minor(each.version) for each in Requirement(supported).specifier}
    assert set(ends) == {">=", "<"}
    older, newer = (minor(version_in(folder) or "") for folder in FOLDERS.values())
    assert older == ends[">="]
    assert (newer[0], newer[1] + 1) == ends["<"]


def with_transformers_of(beside: Path, folder: Path) -> Path:
    """The bare environment, with another version in the place of the installed one."""
    bare_environment.build(folder)
    for link in folder.glob("transformers*"):
        link.unlink()
    for source in beside.glob("transformers*"):
        (folder / source.name).symlink_to(source)
    return folder


def minor(name: str) -> tuple[int, int]:
    """Major and minor part of a version's name."""
    first, second = name.split(".")[:2]
    return int(first), int(second)
