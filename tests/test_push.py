"""`multiverse push`, `push_to_hub`, the Trainer: what arrives at the Hub is what was sent, and loads by its name."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import bare_environment
import pytest
import torch
from grpo_runs import fresh
from hub_http import whole_text
from hub_stand_in import STRANGERS_TOKEN, TOKEN, HubStandIn, connected
from huggingface_hub import HfApi
from huggingface_hub.utils import _http
from multiverse.hub_card.export import export
from multiverse.hub_card.push import push, pushed_files
from multiverse.hub_card.remote_code import flat_sources
from safetensors.torch import load_file, save_file
from training import sft_config, short_samples
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

FORK = "a<Parallel>\n<Goal>\n<Outline>\n1: b\n</Outline>\n<Outline>\n2: c\n</Outline>\n</Goal>\n"

LOAD = """
import json, os
os.environ.update(HF_ENDPOINT=sys.argv[1], HF_HUB_OFFLINE="0", HF_HUB_DISABLE_TELEMETRY="1")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for name, (repo, revision, token, text) in json.loads(sys.argv[2]).items():
    options = {"revision": revision, "trust_remote_code": True}
    if token is not None:
        try:
            AutoModelForCausalLM.from_pretrained(repo, token=False, **options)
        except OSError as error:
            assert "private" in str(error) and token not in str(error), error
        else:
            raise AssertionError("anybody can read it")
    tokenizer = AutoTokenizer.from_pretrained(repo, token=token or False, **options)
    model = AutoModelForCausalLM.from_pretrained(repo, token=token or False, **options).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        found[name] = {"ids": ids, "logits": model(ids).logits}
    found[name]["sequences"] = model.generate(ids, max_new_tokens=16, do_sample=False)
torch.save(found, "found.pt")
"""


class Pushed(NamedTuple):
    """Where a model was pushed to, what it gives, and the folder that was sent."""

    repo: str
    expected: dict[str, torch.Tensor]
    folder: Path | None = None
    revision: str | None = None
    token: str | None = None


def answers(model, tokenizer) -> dict[str, torch.Tensor]:
    """What the loaded model must give, bit by bit."""
    ids = tokenizer(FORK, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model.eval()(ids).logits
    return {"ids": ids, "logits": logits, "sequences": model.generate(ids, max_new_tokens=16, do_sample=False)}


def write_export(folder: Path, architecture: str = "qwen2", change: float = 0.0, size: str = "20KB"):
    """A tiny model as `multiverse export` writes it, and what it gives."""
    model, tokenizer = fresh(architecture)
    with torch.no_grad():
        model.model.norm.weight += change
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return export(folder / "model", folder / "exported", max_shard_size=size), answers(model, tokenizer)


def push_by_command(hub: HubStandIn, folder: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`multiverse push` in a process of its own, which finds the Hub by HF_ENDPOINT."""
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "multiverse", "push", str(folder), *arguments]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)


def push_everything(hub: HubStandIn, home: Path) -> dict[str, Pushed]:
    """One model after another, by every way there is."""
    found = {}
    folder, expected = write_export(home / "first")
    for name, xet in (("over LFS", False), ("over Xet", True)):
        repo = f"someone/{name[-3:]}"
        with connected(hub, home, xet=xet):
            push(folder, repo)
        found[name] = Pushed(repo, expected, folder)
    other, others = write_export(home / "second", "qwen3", size="5GB")
    with connected(hub, home):
        push(other, "hidden", private=True)
        push(other, "someone/LFS", revision="v2")
    found["private"] = Pushed("someone/hidden", others, other, token=TOKEN)
    found["branch"] = Pushed("someone/LFS", others, other, "v2")
    with connected(hub, home, STRANGERS_TOKEN, xet=True):
        push(other, "someone/Xet", create_pr=True)
    found["pull request"] = Pushed("someone/Xet", others, other, "refs/pr/1")

    done = push_by_command(hub, other, home, "someone/by-command")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    files = pushed_files(other)
    size = sum(file.stat().st_size for file in files) / 1e6
    assert done.stdout == f"{hub.url}/someone/by-command/tree/main: {len(files)} files, {size:.1f} MB\n"
    found["command"] = Pushed("someone/by-command", others, other)

    with connected(hub, home):
        model, tokenizer = fresh("llama")
        model.push_to_hub("by-hand")
        tokenizer.push_to_hub("by-hand")
        found["push_to_hub"] = Pushed("someone/by-hand", answers(model, tokenizer))
        model, tokenizer = fresh("llama")
        config = sft_config(home / "run", push_to_hub=True, hub_model_id="someone/by-trainer", hub_strategy="end")
        trainer = SFTTrainer(model, config, train_dataset=short_samples(), processing_class=tokenizer)
        trainer.train()
        trainer.push_to_hub()
        found["Trainer"] = Pushed("someone/by-trainer", answers(trainer.model, tokenizer))
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    stand_in = HubStandIn(tmp_path_factory.mktemp("hub"))
    yield stand_in
    stand_in.close()
    assert stand_in.unknown == []


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> dict[str, Pushed]:
    return push_everything(hub, tmp_path_factory.mktemp("pushed"))


@pytest.fixture(scope="module")
def loaded(hub, pushed, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What they give where only torch and transformers are installed."""
    home = tmp_path_factory.mktemp("elsewhere")
    environment = bare_environment.build(home / "packages")
    asked = {name: (each.repo, each.revision, each.token, FORK) for name, each in pushed.items()}
    bare_environment.run(environment, LOAD, home, hub.url, json.dumps(asked))
    return torch.load(home / "found.pt")


@pytest.mark.parametrize(
    "way", ["over LFS", "over Xet", "private", "branch", "pull request", "command", "push_to_hub", "Trainer"]
)
def test_what_was_pushed_loads_by_its_name_and_gives_the_same_logits_and_paths(way, hub, pushed, loaded):
    repo, expected, folder, revision, _ = pushed[way]
    assert loaded[way].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[way][name], value), name
    files = {name: blob.content for name, blob in hub.repos[repo].head(revision or "main").files.items()}
    for module, text in flat_sources().items():
        assert files[f"{module}.py"].decode() == text
    if folder is not None:
        sent = {file.name: file.read_bytes() for file in folder.iterdir()}
        assert {name: content for name, content in files.items() if name != ".gitattributes"} == sent


def test_branches_and_pull_requests_leave_main_as_it_was(hub, pushed):
    for way in ("over LFS", "over Xet"):
        (commit,) = hub.repos[pushed[way].repo].history()
        assert "model.safetensors" not in commit.files
    assert hub.repos["someone/hidden"].private
    assert not hub.repos["someone/LFS"].private


# Below, each test has a Hub of its own.


@pytest.fixture(params=[False, True], ids=["LFS", "Xet"])
def xet(request) -> bool:
    if request.param:
        pytest.importorskip("hf_xet")
    return request.param


@pytest.fixture
def own(tmp_path):
    stand_in = HubStandIn(tmp_path)
    yield stand_in
    stand_in.close()
    assert stand_in.unknown == []


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("sharded"))[0]


@pytest.fixture
def folder(sharded, tmp_path) -> Path:
    """A checkpoint in several files, which the test may change."""
    return Path(shutil.copytree(sharded, tmp_path / "folder"))


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Seconds that huggingface_hub would have waited between its tries."""
    found: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", found.append)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_second_push_sends_what_has_changed_and_nothing_else(own, folder, tmp_path, xet):
    shard = sorted(folder.glob("*.safetensors"))[0]
    with connected(own, tmp_path, xet=xet):
        first = push(folder, "someone/model")
        own.requests.clear()
        again = push(folder, "someone/model")
        assert again.oid == first.oid
        weights = load_file(shard)
        save_file({name: weight + 1 for name, weight in weights.items()}, shard, metadata={"format": "pt"})
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# Changed\n")
        push(folder, "someone/model", commit_message="Another weight")
    newest, oldest = own.repos["someone/model"].history()
    assert (newest.message, newest.changed) == ("Another weight", {shard.name, "README.md"})
    assert oldest.oid == first.oid
    assert len(own.sent("PUT /")) == (0 if xet else 1)


def test_weights_and_adapters_of_an_earlier_model_do_not_outlive_it(own, folder, tmp_path, xet):
    whole, _ = write_export(tmp_path / "whole", change=1.0, size="5GB")
    api = HfApi(own.url, TOKEN)
    with connected(own, tmp_path, xet=xet):
        push(whole, "someone/model")
        for name in ("adapter_config.json", "notes.md", "images/loss.svg", "onnx/adapter_model.safetensors"):
            api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id="someone/model")
        push(folder, "someone/model")
        kept = {"notes.md", "images/loss.svg", "onnx/adapter_model.safetensors", ".gitattributes"}
        assert own.repos["someone/model"].head().files.keys() == {*contents(folder), *kept}
        # Else the weights before would be loaded, without a word.
        loaded = AutoModelForCausalLM.from_pretrained("someone/model", trust_remote_code=True)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())


def test_a_branch_goes_on_where_it_stands_and_so_does_a_pull_request(own, folder, tmp_path, xet):
    with connected(own, tmp_path, xet=xet):
        push(folder, "someone/model")
        opened = push(_with_card(folder, "pull"), "someone/model", create_pr=True)
        assert opened.pr_revision == "refs/pr/1"
        push(_with_card(folder, "pull again"), "someone/model", revision="refs/pr/1")
        for text in ("branch", "branch again"):
            push(_with_card(folder, text), "someone/model", revision="v2")
    repo = own.repos["someone/model"]
    assert {ref: len(repo.history(ref)) for ref in repo.refs} == {"main": 1, "refs/pr/1": 3, "v2": 3}
    for ref, text in (("refs/pr/1", "pull again"), ("v2", "branch again")):
        assert text in repo.head(ref).files["README.md"].content.decode()
        assert repo.head(ref).changed == {"README.md"}


def _with_card(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {text}\n")
    return folder


@pytest.mark.parametrize("drop", [False, True], ids=["error 500", "broken connection"])
def test_a_shard_that_was_cut_off_once_is_sent_again(drop, own, folder, tmp_path, waits):
    fault = own.fail("PUT /", drop=drop)
    with connected(own, tmp_path):
        push(folder, "someone/model")
    assert (len(fault.spoilt), waits) == (1, [1])
    assert len(own.sent("PUT /")) == len(list(folder.glob("*.safetensors"))) + 1
    files = own.repos["someone/model"].head().files
    assert {name: files[name].content for name in contents(folder)} == contents(folder)


@pytest.mark.parametrize("drop", [False, True], ids=["error 500", "broken connection"])
def test_an_upload_that_fails_for_good_says_so_and_the_next_sends_the_rest(drop, own, folder, tmp_path, waits):
    before, shards = contents(folder), sorted(folder.glob("*.safetensors"))
    stuck = own.fail(f"PUT /.*{hashlib.sha256(before[shards[-1].name]).hexdigest()}", times=float("inf"), drop=drop)
    with connected(own, tmp_path):
        told = rf"someone/model was not pushed.*{shards[-1].name}.*{folder} is as it was.*same call"
        with pytest.raises(OSError, match=told) as error:
            push(folder, "someone/model")
        assert TOKEN not in whole_text(error.value)
        assert "signature" not in str(error.value)
        assert len(stuck.spoilt) == len(waits) + 1 > 3
        assert own.repos["someone/model"].history() == []
        assert contents(folder) == before
        arrived = len(own.repos["someone/model"].objects)
        assert arrived > 0
        own.faults.clear()
        own.requests.clear()
        push(folder, "someone/model")
    assert len(own.sent("PUT /")) == len(shards) - arrived
    files = own.repos["someone/model"].head().files
    assert {name: files[name].content for name in before} == before


def test_a_commit_that_fails_leaves_the_branch_as_it_was(own, folder, tmp_path, waits, xet):
    with connected(own, tmp_path, xet=xet):
        push(_with_card(folder, "first"), "someone/model")
        fault = own.fail("POST .*/commit/", times=float("inf"))
        with pytest.raises(OSError, match=r"was not pushed.*500.*same call"):
            push(_with_card(folder, "second"), "someone/model")
        assert len(own.repos["someone/model"].history()) == 1
        fault.times = 0
        push(folder, "someone/model")
    assert own.repos["someone/model"].head().changed == {"README.md"}


def test_a_hub_that_is_not_there_is_named(own, folder, tmp_path, waits):
    own.close()
    with connected(own, tmp_path), pytest.raises(OSError, match=r"someone/model was not pushed.*refused") as error:
        push(folder, "someone/model")
    assert TOKEN not in whole_text(error.value)
