"""Checkpoints carry the code that others load them with, in an environment that has torch and transformers only."""

import ast
import sys
from pathlib import Path

import bare_environment
import pytest
import torch
from grpo_runs import fresh
from multiverse import MultiverseConfig, MultiverseQwen2Config, MultiverseQwen2ForCausalLM
from multiverse.hub_card import remote_code
from multiverse.hub_card.remote_code import flat_name, flat_sources, write_remote_code
from training import sft_config, short_samples
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_import_files
from trl import SFTTrainer

FORK = "a<Parallel>\n<Goal>\n<Outline>\n1: b\n</Outline>\n<Outline>\n2: c\n</Outline>\n</Goal>\n"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
#: What the environment without the package has, beside the standard library.
WITHOUT_PACKAGE = {"torch", "transformers", "huggingface_hub"}

LOAD = """
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TextStreamer

class Collected(TextStreamer):
    def on_finalized_text(self, text, stream_end=False):
        pieces.append(text)

folder = Path(sys.argv[1])
for checkpoint in sorted(folder.glob("*-checkpoint")):
    expected = torch.load(checkpoint / "expected.pt")
    ids = expected["ids"]
    try:
        AutoModelForCausalLM.from_pretrained(checkpoint)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without leave")
    again = checkpoint.with_name(checkpoint.name + "-again")
    for place in (checkpoint, again):
        config = AutoConfig.from_pretrained(place, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
        backbone = AutoModel.from_pretrained(place, trust_remote_code=True).eval()
        assert type(model).__name__ == expected["name"] and config.model_type == model.config.model_type
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected["logits"])
            assert torch.equal(model.lm_head(backbone(ids).last_hidden_state), expected["logits"])
        pieces = []
        output = model.generate(
            ids, max_new_tokens=40, do_sample=False, streamer=Collected(tokenizer, skip_prompt=True),
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences, expected["sequences"])
        assert len(output.reports[0].branches) == 3
        assert "".join(pieces).count("<Path>") == 2
        if place is checkpoint:
            model.save_pretrained(again)
            tokenizer.save_pretrained(again)
    names = {path.name for path in checkpoint.iterdir()} - {"expected.pt", "training_args.bin", "README.md"}
    assert names == {path.name for path in again.iterdir()}, names
    for path in again.glob("*.py"):
        assert path.read_bytes() == (checkpoint / path.name).read_bytes()
    print("\\nloaded", expected["name"])
"""

AUDITED = """
import os
import torch, transformers
try:
    import triton.language
except ImportError:
    pass
from transformers import LlamaModel, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, GenerationMixin
from transformers.integrations import flash_attention, sdpa_attention
from torch.nn.attention import flex_attention
sys.dont_write_bytecode = True
sys.path.append(sys.argv[1])
seen = []
# Modules of torch and transformers that nobody has needed before may be read, and nothing else.
packages = tuple(os.path.abspath(path) + os.sep for path in sys.path if path)

def foreign(path):
    if not isinstance(path, str | bytes):
        return True
    path = os.path.abspath(os.fsdecode(path))
    ours = path.startswith(os.path.abspath(sys.argv[1]) + os.sep)
    return not ours and not (path.startswith(packages) and path.endswith((".py", ".pyc", ".so")))

def audit(event, arguments):
    # Modes of `open` are letters, those of `os.open` are bits.
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    reads = event == "open" and foreign(arguments[0])
    if writes or reads or event.split(".")[0] in ("socket", "subprocess", "shutil", "ctypes") or event in (
        "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "os.putenv"
    ):
        seen.append((event, str(arguments)))

sys.addaudithook(audit)
import flat.modeling_multiverse
assert not seen, seen
print("quiet")
"""


def expectations(model, tokenizer) -> dict:
    """What the loaded model must give, bit by bit."""
    ids = tokenizer(FORK, return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
    sequences = model.generate(ids, max_new_tokens=40, do_sample=False)
    return {"ids": ids, "logits": logits, "sequences": sequences, "name": type(model).__name__}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    return bare_environment.build(tmp_path_factory.mktemp("bare") / "packages")


def test_trained_checkpoints_load_answer_and_are_saved_again_without_the_package(environment, tmp_path):
    names = []
    for architecture in ARCHITECTURES:
        model, tokenizer = fresh(architecture)
        config = sft_config(tmp_path / architecture, max_steps=2, save_strategy="steps", save_steps=2)
        trainer = SFTTrainer(model, config, train_dataset=short_samples(), processing_class=tokenizer)
        trainer.train()
        folder = tmp_path / f"{architecture}-checkpoint"
        # What the Trainer itself has written while it was training.
        (tmp_path / architecture / "checkpoint-2").rename(folder)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
            (folder / name).unlink()
        torch.save(expectations(trainer.model, tokenizer), folder / "expected.pt")
        names.append(type(model).__name__)
    home = tmp_path / "home"
    home.mkdir()
    printed = bare_environment.run(environment, LOAD, home, str(tmp_path)).splitlines()
    # transformers asks on the terminal before it refuses.
    assert [line.split()[1] for line in printed if line.startswith("loaded")] == names


@pytest.mark.parametrize("more", [(), ("triton",)], ids=["no triton", "triton"])
def test_the_code_reads_and_writes_nothing_connects_to_nothing_and_starts_nothing(more, tmp_path):
    environment = bare_environment.build(tmp_path / "packages", *more)
    write_remote_code(tmp_path / "flat")
    (tmp_path / "flat" / "__init__.py").touch()
    assert bare_environment.run(environment, AUDITED, tmp_path, str(tmp_path)).split() == ["quiet"]


def test_transformers_finds_every_file_and_misses_no_package(tmp_path):
    files = write_remote_code(tmp_path)
    assert files == sorted(tmp_path.iterdir())
    found = {Path(name) for name in get_relative_import_files(tmp_path / "modeling_multiverse.py")}
    assert found | {tmp_path / "modeling_multiverse.py"} == set(files)
    for file in files:
        needed = set(get_imports(file)) - set(sys.stdlib_module_names)
        assert needed <= WITHOUT_PACKAGE, file
        compile(file.read_text(), file, "exec")


def test_nothing_but_imports_is_changed():
    for name, text in flat_sources().items():
        module = next(each for each in sys.modules if each.startswith("multiverse.") and flat_name(each) == name)
        original = Path(sys.modules[module].__file__).read_text()

        def without_imports(source: str) -> list[str]:
            nodes = ast.parse(source).body
            return [ast.dump(node) for node in nodes if not isinstance(node, ast.ImportFrom | ast.If)]

        assert without_imports(text) == without_imports(original)
        assert text.splitlines()[0].startswith("# Written by multiverse")
        kept = [line for line in original.splitlines() if line.lstrip().startswith("#")]
        assert [line for line in text.splitlines()[1:] if line.lstrip().startswith("#")] == kept


def test_the_installed_package_comes_first(tmp_path):
    model, _ = fresh("qwen2")
    model.save_pretrained(tmp_path)
    for trust in (None, True):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded) is MultiverseQwen2ForCausalLM
        assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is MultiverseQwen2Config
    # From a folder where the code is out of date, it is written anew.
    (tmp_path / "layout.py").write_text("nothing")
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / "layout.py").read_text() == flat_sources()["layout"]


def test_classes_of_users_are_theirs_to_publish(tmp_path):
    class Mine(MultiverseQwen2Config):
        model_type = "mine"

    own = Mine()
    assert MultiverseConfig.from_base(own) is own

    for number, config in enumerate((Mine(), MultiverseConfig())):
        config.save_pretrained(tmp_path / str(number))
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "statement", ["import multiverse.layout", "from multiverse import BranchLayout", "from . import layout"]
)
def test_what_cannot_be_flattened_is_named(statement, tmp_path, monkeypatch):
    odd = tmp_path / "odd.py"
    odd.write_text(f'"""Odd."""\n\nimport torch\n{statement}\n')
    find = remote_code._file_of
    monkeypatch.setattr(remote_code, "_file_of", lambda module: odd if module == "multiverse.odd" else find(module))
    monkeypatch.setattr(remote_code, "ROOTS", ("multiverse.odd",))
    with pytest.raises(ValueError, match=r"multiverse\.odd, line 4"):
        flat_sources()
