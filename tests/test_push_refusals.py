"""What `multiverse push` refuses: what others could not load, before anything is sent; and what the Hub refuses."""

import json
import re
import shutil
from pathlib import Path

import pytest
from grpo_runs import fresh, with_adapter
from hub_http import whole_text
from hub_objects import shard_files
from hub_stand_in import READ_TOKEN, STRANGERS_TOKEN, TOKEN, HubStandIn, connected
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from multiverse.cli import app
from multiverse.hub_card.export import export
from multiverse.hub_card.push import push, pushed_files
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model, tokenizer = fresh("qwen2")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return export(folder / "model", folder / "exported", max_shard_size="20KB")


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "folder"))


@pytest.fixture
def hub(tmp_path, capfd):
    stand_in = HubStandIn(tmp_path)
    with connected(stand_in, tmp_path):
        yield stand_in
    stand_in.close()
    assert stand_in.unknown == []
    for text in capfd.readouterr():
        assert not any(token in text for token in (TOKEN, READ_TOKEN, STRANGERS_TOKEN))


def edit_json(path: Path, **fields) -> None:
    content = json.loads(path.read_text())
    content.update(fields)
    path.write_text(json.dumps(content))


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model-00002-of-00006.safetensors")
    weights.popitem()
    save_file(weights, folder / "model-00002-of-00006.safetensors", metadata={"format": "pt"})


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def a_tokenizer_without_tags(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != "<Path>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


#: What may be wrong with a folder, how it comes about, and what the message must say besides `folder`.
FAULTS = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), r"config\.json.*multiverse export"),
    "a list for a configuration": (lambda folder: (folder / "config.json").write_text("[]"), "model_type"),
    "a plain model": (
        lambda folder: edit_json(folder / "config.json", model_type="qwen2"),
        r"'qwen2', none of multiverse_qwen2.*multiverse export",
    ),
    "no auto_map": (lambda folder: edit_json(folder / "config.json", auto_map=None), "auto_map.*multiverse export"),
    "code of another repository": (
        lambda folder: edit_json(
            folder / "config.json",
            auto_map={
                name: f"someone/other--modeling_multiverse.{name}"
                for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
            },
        ),
        "someone/other--modeling_multiverse",
    ),
    "no tags": (lambda folder: edit_json(folder / "config.json", multiverse_token_ids=None), "twelve tags"),
    "no code": (lambda folder: (folder / "modeling_multiverse.py").unlink(), r"modeling_multiverse\.Multiverse"),
    "a module missing": (
        lambda folder: (folder / "layout.py").unlink(),
        r"lacks layout\.py, which modeling_multiverse\.py needs\. Export",
    ),
    "code that is no Python": (
        lambda folder: (folder / "layout.py").write_text("def broken(:\n"),
        r"layout\.py.*not valid Python.*line 1",
    ),
    "a class missing": (
        lambda folder: (folder / "configuration_multiverse.py").write_text("x = 1\n"),
        r"configuration_multiverse\.MultiverseQwen2Config",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*safetensors*")],
        r"no weights \(model\.safetensors\)",
    ),
    "a shard missing": (
        lambda folder: (folder / "model-00002-of-00006.safetensors").unlink(),
        r"lacks model-00002-of-00006\.safetensors, which model\.safetensors\.index\.json names",
    ),
    "a shard cut off": (
        lambda folder: cut_off(folder / "model-00003-of-00006.safetensors"),
        r"model-00003-of-00006\.safetensors, which is damaged or cut off",
    ),
    "a weight missing": (lose_a_weight, r"has no model\..* in model-00002-of-00006\.safetensors"),
    "an index that is no index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "weight_map",
    ),
    "weights of another export": (
        lambda folder: save_file({}, folder / "model-00001-of-00002.safetensors"),
        r"nothing loads \(model-00001-of-00002\.safetensors\)\. Remove",
    ),
    "a checkpoint within": (
        lambda folder: shutil.copytree(folder, folder / "checkpoint-2"),
        r"nothing loads \(checkpoint-2/model-00001.* and 2 more\)",
    ),
    "a tokenizer without tags": (a_tokenizer_without_tags, "encodes <Path> as .*add_multiverse_tokens"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer that loads|encodes"),
    "no card": (lambda folder: (folder / "README.md").unlink(), r"README\.md.*`multiverse export` writes one"),
    "a card without metadata": (lambda folder: (folder / "README.md").write_text("# Model\n"), "without metadata"),
    "metadata that is no YAML": (
        lambda folder: (folder / "README.md").write_text("---\nlicense: [mit\n---\n"),
        "metadata cannot be read.*Mend",
    ),
    "metadata that is no mapping": (
        lambda folder: (folder / "README.md").write_text("---\n- mit\n---\n"),
        "metadata cannot be read",
    ),
    "results that are none": (
        lambda folder: (folder / "README.md").write_text("---\nmodel-index: [{results: 1}]\n---\n"),
        "metadata cannot be read",
    ),
    "a folder as base model": (
        lambda folder: (folder / "README.md").write_text("---\nbase_model: /models/base\n---\n"),
        "`base_model` is '/models/base'",
    ),
    **{
        f"a file {name}": (lambda folder, name=name: (folder / name).touch(), rf"holds {re.escape(name)}: pickles")
        for name in ("pytorch_model.bin", "model.pt", "model.pth", "x.pkl", "last.ckpt", "rng_state_0.safetensors")
    },
    "optimizer and arguments": (
        lambda folder: [(folder / name).touch() for name in ("training_args.bin", "optimizer.safetensors")],
        r"optimizer\.safetensors, training_args\.bin.*multiverse export .* CLEAN",
    ),
    "pickles further down": (
        lambda folder: [(folder / "runs").mkdir(), (folder / "runs" / "weights.PT").touch()],
        r"holds runs/weights\.PT",
    ),
    "the rest of an export": (
        lambda folder: [(folder / "new.partial").mkdir(), (folder / "new.partial" / "config.json").touch()],
        "interrupted export",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_others_could_not_load_is_refused_before_anything_is_sent(fault, folder, hub):
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(ValueError, match=rf"(?s)`folder` \({re.escape(str(folder))}\).*{message}"):
        push(folder, "someone/model")
    assert hub.requests == []


def test_adapters_and_partial_folders_are_refused_before_anything_is_sent(folder, hub, tmp_path):
    with_adapter(fresh("qwen2")[0]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"LoRA adapter.*`multiverse export .*adapter MERGED`"):
        push(tmp_path / "adapter", "someone/model")
    with pytest.raises(ValueError, match="interrupted export"):
        push(folder.rename(tmp_path / "out.partial"), "someone/model")
    with pytest.raises(ValueError, match=r"`folder`.*is no folder.*multiverse export"):
        push(tmp_path / "nothing", "someone/model")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "a/b/c"}, r"`repo_id` is 'a/b/c'.*user/name"),
        ({"repo_id": "some--one"}, "`repo_id` is 'some--one'"),
        ({"repo_id": "https://huggingface.co/a"}, "`repo_id`"),
        ({"repo_type": "dataset"}, "`repo_type` is 'dataset'.*'model' only"),
        ({"create_pr": True, "revision": "v2"}, "`revision` is 'v2'.*refs/pr/N"),
        ({"revision": "0" * 40}, "`revision` is '0000.*branch"),
        ({"revision": ""}, "`revision` is ''"),
        ({"token": False}, r"`token` is False.*hf auth login.*HF_TOKEN"),
        ({"token": "hf_se cret"}, r"`token` \(not shown\)"),
        ({"token": "hf_secret\n"}, r"`token` \(not shown\)"),
        ({"token": "hf_sécret"}, r"`token` \(not shown\)"),
    ],
)
def test_arguments_are_refused_before_anything_is_sent_or_shown(arguments, message, exported, hub):
    with pytest.raises(ValueError, match=message) as error:
        push(exported, **{"repo_id": "someone/model", **arguments})
    assert "cret" not in whole_text(error.value)
    assert hub.requests == []


@pytest.mark.parametrize("token", [None, True])
def test_without_a_login_nothing_is_read_or_sent(token, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"`token`.*hf auth login.*HF_TOKEN"):
        # It would take long to find out what is wrong with a real one.
        push(tmp_path / "not looked at", "someone/model", token=token)
    assert hub.requests == []
    (tmp_path / "token").write_text(TOKEN)
    with pytest.raises(ValueError, match="`folder`"):
        push(tmp_path / "looked at", "someone/model", token=token)


def test_what_git_and_huggingface_hub_keep_for_themselves_is_not_pushed(folder, hub):
    for name in (".git/index.pt", ".cache/huggingface/upload.bin"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    push(folder, "someone/model")
    files = hub.repos["someone/model"].head().files.keys() - {".gitattributes"}
    assert files == {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {path.name for path in pushed_files(folder)}


@pytest.mark.parametrize(
    ("token", "repo", "status"),
    [
        (READ_TOKEN, "someone/model", 403),
        (STRANGERS_TOKEN, "someone/model", 403),
        ("hf_unknown", "someone/model", 401),
    ],
    ids=["for reading", "of somebody else", "unknown"],
)
def test_a_token_without_the_right_is_refused_with_a_remedy(token, repo, status, exported, hub):
    told = rf"{repo} was not pushed.*{status}.*hf auth login"
    with pytest.raises(OSError, match=told) as error:
        push(exported, repo, token=token)
    assert token not in whole_text(error.value)
    assert hub.repos == {}


def test_a_public_repository_never_gets_what_was_meant_to_be_private(exported, hub):
    api = HfApi(hub.url, TOKEN)
    for private, other in ((True, "public"), (False, "private")):
        api.create_repo(f"someone/{other}", private=not private)
        with pytest.raises(ValueError, match=f"`private` is {private}.*someone/{other} exists and is {other}"):
            push(exported, f"someone/{other}", private=private)
        assert hub.repos[f"someone/{other}"].history() == []
        assert hub.repos[f"someone/{other}"].objects == {}
        push(exported, f"someone/{other}", private=not private)


def test_a_card_that_the_hub_refuses_stops_the_push_before_any_file_is_sent(folder, hub):
    (folder / "README.md").write_text("---\nlanguage: English\n---\n")
    with pytest.raises(ValueError, match=r"(?s)Invalid metadata in README\.md.*ISO 639"):
        push(folder, "someone/model")
    assert hub.repos["someone/model"].history() == []
    assert hub.sent("PUT|batch|commit") == []


def test_the_command_refuses_as_the_function_does_and_ends_with_an_error(folder, hub, tmp_path):
    (folder / "optimizer.pt").touch()
    done = CliRunner().invoke(app, ["push", str(folder), "someone/model"])
    assert done.exit_code == 2
    assert "optimizer.pt" in done.output
    assert hub.requests == []
    (folder / "optimizer.pt").unlink()
    hub.fail("POST /api/repos", times=9)
    done = CliRunner().invoke(app, ["push", str(folder), "someone/model"])
    assert done.exit_code == 1
    assert "someone/model was not pushed" in done.output
    hub.faults.clear()
    done = CliRunner().invoke(app, ["push", str(folder), "someone/model", "--create-pr", "--private"])
    assert done.exit_code == 0, done.output
    count, size = len(pushed_files(folder)), sum(file.stat().st_size for file in pushed_files(folder)) / 1e6
    assert f"{hub.url}/someone/model/discussions/1: {count} files, {size:.1f} MB" in done.output
    assert hub.repos["someone/model"].private
    assert hub.repos["someone/model"].history() == []


# The stand-in itself: one that takes anything would prove nothing.


def test_the_stand_in_wants_a_token_and_knows_its_accounts(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(hub.url, token=False).create_repo("someone/model")
    assert HfApi(hub.url, STRANGERS_TOKEN).whoami()["name"] == "stranger"
    api = HfApi(hub.url, TOKEN)
    api.create_repo("someone/model", private=True)
    for token in (False, STRANGERS_TOKEN):
        assert not HfApi(hub.url, token).repo_exists("someone/model")
    assert HfApi(hub.url, READ_TOKEN).repo_exists("someone/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("someone/model")
    assert not api.revision_exists("someone/model", "v2")
    assert not api.file_exists("someone/model", "config.json")


def test_the_stand_in_takes_only_objects_that_are_what_they_say(hub):
    api = HfApi(hub.url, TOKEN)
    repo = api.create_repo("someone/model").repo_id
    batch = {"operation": "upload", "transfers": ["basic"], "hash_algo": "sha256", "ref": {"name": "main"}}
    batch["objects"] = [{"oid": "0" * 64, "size": 3}]
    headers = {"authorization": f"Bearer {TOKEN}"}
    answer = get_session().post(f"{hub.url}/{repo}.git/info/lfs/objects/batch", json=batch, headers=headers).json()
    place, verify = (answer["objects"][0]["actions"][name]["href"] for name in ("upload", "verify"))
    assert get_session().put(place, content=b"abc").status_code == 400
    assert get_session().put(place, content=b"abc", headers=headers).status_code == 400
    assert get_session().put(place.split("?")[0], content=b"abc").status_code == 403
    assert get_session().post(verify, json=batch["objects"][0], headers=headers).status_code == 404
    assert hub.repos[repo].objects == {}


@pytest.mark.parametrize("change", ["was not uploaded", "has 8 bytes, not 9", "is binary"])
def test_the_stand_in_takes_only_commits_of_what_was_uploaded(change, hub):
    api = HfApi(hub.url, TOKEN)
    repo = api.create_repo("someone/model").repo_id
    operation = CommitOperationAdd("model.safetensors", b"weights\0")
    if change != "was not uploaded":
        api.preupload_lfs_files(repo, [operation], free_memory=False)
        assert list(hub.repos[repo].objects) == [operation.upload_info.sha256.hex()]
    # What huggingface_hub would find out by itself.
    operation._upload_mode, operation._is_uploaded = "regular" if change == "is binary" else "lfs", True
    operation.upload_info.size += change.endswith("not 9")
    with pytest.raises(BadRequestError, match=change):
        api.create_commit(repo, [operation], commit_message="x")
    assert hub.repos[repo].history() == []


def test_the_stand_in_reads_shards_of_several_files_and_segments():
    def record(name: bytes, *numbers: int) -> bytes:
        return name * 32 + b"".join(number.to_bytes(4, "little") for number in numbers)

    header, end = bytes(48), b"\xff" * 48
    first = [record(b"a", 3 << 30, 2, 0, 0), record(b"x", 0, 70, 0, 1), record(b"y", 0, 30, 0, 1), bytes(96)]
    second = [record(b"b", 1 << 30, 1, 0, 0), record(b"x", 0, 5, 0, 1), record(b"2", 0, 0, 0, 0)]
    shard = b"".join([header, *first, record(b"1", 0, 0, 0, 0), *second, end])
    assert shard_files(shard) == {"31" * 32: ("61" * 32, 100), "32" * 32: ("62" * 32, 5)}
