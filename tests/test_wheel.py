"""The wheel is all that others install: it has the whole package with its data, and what it saves runs without it."""

import ast
import compileall
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import bare_environment
import pytest
import torch
from front_door import GOAL
from published import write_published
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
#: Folder of every package in the repository and in the wheel.
PACKAGES = {
    "modeling_multiverse": "multiverse",
    "curator": "multiverse/curator",
    "evaluation": "multiverse/evaluation",
    "generation": "multiverse/generation",
    "hub_card": "multiverse/hub_card",
    "kernels": "multiverse/kernels",
    "trainer": "multiverse/trainer",
}
#: What the packages read at run time, beside their modules.
DATA = (
    "modeling_multiverse/py.typed",
    "curator/*.jinja",
    "curator/prompts/*",
    "evaluation/*.jinja",
    "evaluation/*.json",
    "evaluation/results/demo/summary.json",
    "hub_card/*.jinja",
    "hub_card/adapter/*",
    "trainer/configs/*",
)

SAVE = """
import torch
import multiverse
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.hub_card.checkpoint import ADAPTER
from multiverse.hub_card.model_card import FACTS_FILE, CardFacts
from transformers import AutoTokenizer

assert CardFacts.read(ADAPTER / FACTS_FILE).results["conditions"]
environment, published, folder, given = sys.argv[1:5]
assert multiverse.__file__ == f"{environment}/multiverse/__init__.py", multiverse.__file__
data = torch.load(given)
model, tokenizer = MultiverseForCausalLM.from_pretrained(published).eval(), AutoTokenizer.from_pretrained(published)
add_multiverse_tokens(model, tokenizer)
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
with torch.no_grad():
    logits = model(data["ids"]).logits
sequences = model.generate(data["ids"], **data["options"])
torch.save({**data, "logits": logits, "sequences": sequences}, given)
print("\\nsaved by", multiverse.__version__)
"""

LOAD = """
import torch
from importlib.util import find_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, given = sys.argv[1:3]
assert find_spec("multiverse") is None
data = torch.load(given)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(data["ids"]).logits, data["logits"])
output = model.generate(data["ids"], **data["options"], return_dict_in_generate=True)
assert torch.equal(output.sequences, data["sequences"])
assert len(output.reports[0].branches) == 3
assert len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)) < model.config.vocab_size
print("\\nloaded", type(model).__name__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: a build leaves things behind."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    pip(*command, str(sources))
    return next(folder.glob("*.whl"))


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def needed_modules(folder: Path) -> set[str]:
    """Files of code that the two which `auto_map` names import, themselves included."""
    found, waiting = set(), ["configuration_multiverse", "modeling_multiverse"]
    while waiting:
        name = waiting.pop()
        if f"{name}.py" in found:
            continue
        found.add(f"{name}.py")
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                waiting.append(node.module)
    return found


def test_wheel_has_every_module_and_the_data_that_they_read(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"{PACKAGES[folder]}/{file.name}" for folder in PACKAGES for file in (ROOT / folder).glob("*.py")}
    files = [file.relative_to(ROOT) for pattern in DATA for file in ROOT.glob(pattern)]
    data = {str(Path(PACKAGES[file.parts[0]], *file.parts[1:])) for file in files}
    assert {"multiverse/py.typed", "multiverse/hub_card/adapter/adapter_model.safetensors"} < data
    assert len([name for name in data if name.startswith("multiverse/trainer/configs/")]) > 5
    assert names == modules | data


def test_what_the_wheel_saves_runs_without_it(wheel: Path, tmp_path: Path) -> None:
    published, folder, given = write_published(tmp_path / "published"), tmp_path / "saved", tmp_path / "given.pt"
    ids = AutoTokenizer.from_pretrained(published)("Find A+B.\n" + GOAL, return_tensors="pt").input_ids
    torch.save({"ids": ids, "options": {"max_new_tokens": 40, "max_path_tokens": 8, "seed": 0}}, given)

    having = bare_environment.build(tmp_path / "having")
    pip("install", "--no-deps", "--no-index", "--quiet", "--target", str(having), str(wheel))
    arguments = [str(path) for path in (having, published, folder, given)]
    assert "saved by" in bare_environment.run(having, SAVE, tmp_path, *arguments)

    names = {path.name for path in folder.iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert code == needed_modules(folder)
    assert names - code <= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    compiled = shutil.copytree(folder, tmp_path / "compiled")
    assert compileall.compile_dir(compiled, quiet=1, force=True)
    assert len(list(compiled.glob("__pycache__/*.pyc"))) == len(code)

    without = bare_environment.build(tmp_path / "without")
    printed = bare_environment.run(without, LOAD, tmp_path, str(folder), str(given))
    assert printed.split() == ["loaded", "MultiverseQwen2ForCausalLM"]
