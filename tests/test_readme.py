"""What README.md shows works: its snippets, the commands it names, its table of arguments and its links."""

import functools
import importlib
import importlib.util
import re
from pathlib import Path

import datasets
import pytest
import torch
import trl
from front_door import front_door
from multiverse import TAGS, MultiverseForCausalLM
from multiverse.generation.arguments import GENERATION_DEFAULTS
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from tiny import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    """Fenced parts of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


PYTHON = snippets("python")
#: Fenced commands, and those in running text.
COMMANDS = "\n".join([*snippets("bash"), *re.findall(r"`([^`\n]+)`", README)])


def snippet(*words: str) -> str:
    """The only snippet that holds all of the given words."""
    (found,) = (each for each in PYTHON if all(word in each for word in words))
    return found


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_snippet_compiles(number: int) -> None:
    compile(PYTHON[number], f"README.md, snippet {number}", "exec")


def test_publishing_snippet_saves_and_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Elsewhere is here, where the installed package comes first; tests/test_remote_code.py goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = front_door()
    names = {"model": model, "tokenizer": tokenizer}
    exec(snippet("trust_remote_code=True"), names)
    assert (tmp_path / "my-model" / "modeling_multiverse.py").is_file()
    loaded = names["elsewhere"]
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in model.state_dict().items())
    assert names["tokenizer"].get_vocab() == tokenizer.get_vocab()


def test_snippets_run_one_after_another(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first answer over a second turn and a streamer to the structure, on a model made on the spot."""
    loaded = front_door()
    # A random model rarely ends by itself.
    loaded[0].generation_config.max_sequential_steps = 60
    checkpoint = importlib.import_module("multiverse.hub_card.checkpoint")
    monkeypatch.setattr(checkpoint, "load_demo_model", lambda: loaded)
    names: dict[str, object] = {}
    exec(snippet("load_demo_model()", "degree_of_parallelism"), names)
    output, model = names["output"], names["model"]
    shown = capsys.readouterr().out
    assert "<Parallel>" in shown
    assert float(shown.splitlines()[-1]) == output.reports[0].degree_of_parallelism > 1

    first = output.sequences.clone()
    exec(snippet("DynamicCache()", "conversation"), names)
    conversation = names["conversation"]
    # Greedy decoding: the first turn is the same with a cache.
    assert conversation[:, : first.shape[1]].tolist() == first.tolist()
    again = model.generate(conversation, max_new_tokens=100)
    assert names["output"].sequences.tolist() == again.tolist()
    assert names["cache"].get_seq_length() == again.shape[1] - 1

    exec(snippet("EventStreamer", "on_event"), names)
    told = capsys.readouterr().out
    assert {line.split()[0] for line in told.splitlines() if line} >= {"root", "1", "2"}

    names["ids"] = output.sequences[0].tolist()
    exec(snippet("BranchLayout.from_token_ids", "layout.problems"), names)
    layout = names["layout"]
    assert layout.branch_ids.tolist() == output.branch_ids[0].tolist()
    assert layout.position_ids.tolist() == output.position_ids[0].tolist()
    assert [block.start for block in layout.blocks] == [block.start for block in output.blocks[0]]


def test_training_snippet_trains_a_plain_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As it stands, but for two steps and on a CPU, which TRL's defaults are not made for."""
    monkeypatch.chdir(tmp_path)
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 2, "disable_tqdm": True}
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, **options))
    tokenizer = tiny_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(tiny_config("llama", len(tokenizer), **special)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    problems = generate_problems(2, seed=1, options=ProblemOptions(paths=(2, 2), terms=(2, 2), nested=0.0))
    dataset = datasets.Dataset.from_list([problem.messages("parallel") for problem in problems])
    names: dict[str, object] = {"base": "base", "dataset": dataset}
    exec(snippet("SFTTrainer", "add_multiverse_tokens"), names)
    trainer, model = names["trainer"], names["model"]
    assert trainer.state.global_step == 2
    assert isinstance(model, MultiverseForCausalLM)
    assert set(model.config.multiverse_token_ids) == set(TAGS)
    assert names["tokenizer"].convert_tokens_to_ids("<Path>") == model.config.multiverse_token_ids["<Path>"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"python -m ([\w.]+)", COMMANDS)) - {"pip"}))
def test_module_that_is_run_exists_and_is_a_program(name: str) -> None:
    if name.startswith("benchmarks."):
        path = ROOT / f"{name.replace('.', '/')}.py"
    else:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        path = Path(spec.origin)
    assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make ([\w-]+)", COMMANDS, flags=re.MULTILINE))))
def test_target_of_make_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_commands_are_found() -> None:
    assert "python -m multiverse.trainer.sft" in COMMANDS
    assert "python -m benchmarks.branching" in COMMANDS
    assert "make demo" in COMMANDS


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(multiverse(?:\.\w+)+)`", README))))
def test_name_that_is_mentioned_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute) or importlib.util.find_spec(name)


def test_table_of_arguments_is_that_of_generate() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README, flags=re.MULTILINE)
    written = {name: default.strip().strip("`").strip('"') for name, default in rows}
    assert written == {name: "none" if value is None else str(value) for name, value in GENERATION_DEFAULTS.items()}


LINKS = sorted({link for link in re.findall(r"\]\(([^)#\s]+)\)", README) if "://" not in link})


@pytest.mark.parametrize("link", LINKS)
def test_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()
