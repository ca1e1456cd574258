"""Checkpoints pass between two minor versions of transformers, through their own code and with the package.

The older version lies in a folder of its own (see the Makefile); the newer is the one that runs the tests.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bare_environment
import pytest
import torch
from multiverse import MultiverseForCausalLM
from placing import OPTIONS, PROMPT, check_forked, logits_of, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
OLDER = Path(sys.prefix) / "older"

pytestmark = pytest.mark.skipif(
    not (OLDER / "transformers").is_dir(), reason="needs an older transformers beside the installed one (`make venv`)"
)

#: What both environments run on a checkpoint; the second argument says what it must give, if that is known.
COMMON = """
import torch
from transformers import AutoModelForCausalLM, __version__

def results(model, data):
    model.eval()
    sequences = model.generate(data["prompt"], **data["options"]).sequences
    with torch.no_grad():
        return {"sequences": sequences, "logits": model(sequences).logits}

def check(model, expected):
    found = results(model, expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)

def through_its_own_code(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    return model
"""

OLDER_SCRIPT = (
    COMMON
    + """
newer, older, package = sys.argv[1:4]
expected = torch.load(newer + ".pt")
check(through_its_own_code(newer), expected)
sys.path.append(package)
from multiverse import MultiverseForCausalLM
model = MultiverseForCausalLM.from_pretrained(newer)
check(model, expected)
model.save_pretrained(older)
torch.save({**expected, **results(model, expected)}, older + ".pt")
print("\\nran", __version__)
"""
)

NEWER_SCRIPT = (
    COMMON
    + """
older = sys.argv[1]
check(through_its_own_code(older), torch.load(older + ".pt"))
print("\\nran", __version__)
"""
)


def test_checkpoints_pass_between_two_minor_versions(tmp_path: Path) -> None:
    newer, older = write_checkpoint(tmp_path / "newer", "qwen2"), tmp_path / "older"
    model = MultiverseForCausalLM.from_pretrained(newer)
    output = model.generate(PROMPT, **OPTIONS)
    check_forked(output)
    expected: dict[str, Any] = {"prompt": PROMPT, "options": OPTIONS, "sequences": output.sequences}
    torch.save({**expected, "logits": logits_of(model, output.sequences)}, f"{newer}.pt")

    with_older = with_older_transformers(tmp_path / "with-older")
    package = tmp_path / "package"
    package.mkdir()
    (package / "multiverse").symlink_to(ROOT / "modeling_multiverse")
    homes = [tmp_path / name for name in ("home-older", "home-newer")]
    for home in homes:
        home.mkdir()
    printed = bare_environment.run(with_older, OLDER_SCRIPT, homes[0], str(newer), str(older), str(package))
    installed = version("transformers")
    assert (ran := printed.split()[-1]) != installed
    assert minor(ran) == (5, minor(installed)[1] - 1)
    assert f'"transformers_version": "{ran}"' in (older / "config.json").read_text()

    with_newer = bare_environment.build(tmp_path / "with-newer")
    printed = bare_environment.run(with_newer, NEWER_SCRIPT, homes[1], str(older))
    assert printed.split()[-1] == installed
    known = torch.load(f"{older}.pt")
    loaded = MultiverseForCausalLM.from_pretrained(older)
    assert torch.equal(loaded.generate(PROMPT, **OPTIONS).sequences, known["sequences"])
    assert torch.equal(logits_of(loaded, known["sequences"]), known["logits"])


def with_older_transformers(folder: Path) -> Path:
    """The bare environment, with the older version in the place of the installed one."""
    bare_environment.build(folder)
    for link in folder.glob("transformers*"):
        link.unlink()
    for source in OLDER.glob("transformers*"):
        (folder / source.name).symlink_to(source)
    return folder


def minor(name: str) -> tuple[int, int]:
    """Major and minor part of a version's name."""
    first, second = name.split(".")[:2]
    return int(first), int(second)
