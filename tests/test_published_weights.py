"""Published weights: a plain Qwen2 checkpoint whose tokenizer knows the tags is a Multiverse model as it stands."""

import json
import shutil
from pathlib import Path
from typing import Any

import bare_environment
import pytest
import torch
from front_door import GOAL
from multiverse import TAGS, BranchLayout, MultiverseConfig, MultiverseForCausalLM, add_multiverse_tokens
from multiverse import checkpoint_tags as checkpoint_tags_module
from multiverse.hub_card.export import export
from published import write_published
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

MESSAGES = [{"role": "user", "content": "Find A+B and C+D."}]
FIELDS = ("multiverse_token_ids", "multiverse_separator_ids", "multiverse_label_ids")
NAME = "Multiverse4FM/Multiverse-32B"
COMMITS = {"main": "1" * 40, "tagged": "2" * 40}
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)

LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
expected = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
assert tokenizer(tokenizer.decode(expected["ids"][0]), return_tensors="pt").input_ids.equal(expected["ids"])
output = model.generate(expected["ids"], **expected["options"])
assert torch.equal(output.sequences, expected["sequences"])
assert len(output.reports[0].branches) == 3
print("\\nloaded", type(model).__name__, model.dtype)
"""


@pytest.fixture(scope="module", params=[True, False], ids=["special tags", "ordinary tags"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature as it stands on the Hub; not to be written to."""
    return write_published(tmp_path_factory.mktemp("published") / "checkpoint", special=request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5 itself, without tags; not to be written to."""
    return write_published(tmp_path_factory.mktemp("plain") / "checkpoint", tags=())


def chat(tokenizer: Any, answer: str = "") -> torch.Tensor:
    """A chat whose answer has begun."""
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False) + answer
    return tokenizer(text, return_tensors="pt").input_ids


def fields_of(config: Any) -> list[Any]:
    return [getattr(config, name) for name in FIELDS]


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


def assert_same_weights(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, weight in first.items():
        assert weight.dtype == second[name].dtype
        assert torch.equal(weight, second[name]), name


def assert_parity(model: Any, output: Any, prompt: int) -> int:
    """One forward pass gives what every sampled token was drawn from; returns how many were compared."""
    branches = BranchLayout.from_token_ids(output.sequences[0].tolist(), model.config.multiverse_token_ids).branch_ids
    places = output.sampled[0].nonzero().flatten().tolist()
    before = [max(index for index in range(place) if branches[index] == branches[place]) for place in places]
    assert places[0] >= prompt
    difference = (output.logits[0] - logits_of(model, output.sequences)[0, before]).abs().max()
    assert difference <= 1e-4
    return len(places)


# --- As it stands ----------------------------------------------------------------------------------------------------


def test_weights_load_whole_and_the_tags_are_known(published: Path, warnings_of_transformers: list[str]) -> None:
    assert "multiverse" not in (published / "config.json").read_text().lower().replace("multiverse4fm", "")
    model, report = MultiverseForCausalLM.from_pretrained(published, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(published)
    assert not any(report.values()), report
    assert warnings_of_transformers == []
    assert model.config.multiverse_token_ids == {tag: tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    assert model.config.multiverse_separator_ids == tokenizer.encode("\n")
    assert model.config.multiverse_label_ids == {
        piece: tokenizer.convert_tokens_to_ids(piece) for piece in (*"0123456789", ".", ":")
    }
    assert fields_of(model.model.config) == fields_of(model.config)
    # Rows for the tags are there already, among rows that nothing stands for.
    assert model.config.vocab_size > len(tokenizer)
    assert_same_weights(model, Qwen2ForCausalLM.from_pretrained(published))


@pytest.mark.parametrize("dtype", [None, "auto", torch.float32, torch.float64], ids=str)
def test_dtype_is_that_of_the_checkpoint_or_the_wanted_one(published: Path, dtype: Any) -> None:
    arguments = {} if dtype is None else {"dtype": dtype}
    model = MultiverseForCausalLM.from_pretrained(published, **arguments)
    assert {weight.dtype for weight in model.state_dict().values()} == {
        dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    }


def test_untagged_text_has_the_logits_of_the_base_class(published: Path) -> None:
    ids = chat(AutoTokenizer.from_pretrained(published), "Their sum is")
    model, base = (each.from_pretrained(published) for each in (MultiverseForCausalLM, Qwen2ForCausalLM))
    assert torch.equal(logits_of(model, ids), logits_of(base, ids))


@pytest.mark.parametrize("options", [{}, {"do_sample": False}], ids=["its own settings", "greedy"])
def test_generation_forks_where_a_goal_ends(published: Path, options: dict[str, Any]) -> None:
    model = MultiverseForCausalLM.from_pretrained(published, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(published)
    prompt = chat(tokenizer, "<Think>\n" + GOAL)
    assert (model.generation_config.top_k, model.generation_config.repetition_penalty) == (20, 1.05)
    output = model.generate(
        prompt,
        max_new_tokens=60,
        max_path_tokens=12,
        seed=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    report = output.reports[0]
    assert [branch.label for branch in report.branches] == ["", "1", "2"]
    assert report.sequential_steps < report.generated_tokens
    answer = tokenizer.decode(output.sequences[0, prompt.shape[1] :])
    assert answer.startswith("<Path>\n1:")
    assert answer.index("</Path>\n<Path>\n2:") < answer.index("<Conclusion>")
    assert assert_parity(model, output, prompt.shape[1]) > 20


def test_a_conversation_goes_through_the_chat_template(published: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    text = tokenizer.decode(prompt["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are Qwen")
    assert text.endswith("<|im_start|>user\nFind A+B and C+D.<|im_end|>\n<|im_start|>assistant\n")
    model = MultiverseForCausalLM.from_pretrained(published)
    output = model.generate(**prompt, max_new_tokens=5, seed=0)
    assert prompt["input_ids"].shape[1] < output.shape[1] <= prompt["input_ids"].shape[1] + 5


def test_adding_the_tags_once_more_changes_nothing(published: Path) -> None:
    model, tokenizer = MultiverseForCausalLM.from_pretrained(published), AutoTokenizer.from_pretrained(published)
    config, vocabulary, special = model.config.to_dict(), tokenizer.get_vocab(), tokenizer.all_special_ids
    assert add_multiverse_tokens(model, tokenizer) == model.config.multiverse_token_ids
    assert model.config.to_dict() == config
    assert (tokenizer.get_vocab(), tokenizer.all_special_ids) == (vocabulary, special)
    assert_same_weights(model, Qwen2ForCausalLM.from_pretrained(published))


# --- Saved and exported ----------------------------------------------------------------------------------------------


def test_what_is_saved_names_the_tags_itself(published: Path, tmp_path: Path) -> None:
    model = MultiverseForCausalLM.from_pretrained(published)
    model.save_pretrained(tmp_path)  # without a tokenizer
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert fields_of(again.config) == fields_of(model.config)
    assert again.config.vocab_size == model.config.vocab_size
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert_same_weights(again, model)


def test_export_is_the_model_that_was_published(published: Path, tmp_path: Path) -> None:
    model, written = MultiverseForCausalLM.from_pretrained(published), export(published, tmp_path / "exported")
    loaded = AutoModelForCausalLM.from_pretrained(written)
    assert_same_weights(loaded, Qwen2ForCausalLM.from_pretrained(published))
    assert fields_of(loaded.config) == fields_of(model.config)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (published, written))
    assert torch.equal(chat(before, GOAL), chat(after, GOAL))
    assert (before.get_vocab(), before.all_special_ids) == (after.get_vocab(), after.all_special_ids)


def test_export_runs_without_the_package(tmp_path: Path) -> None:
    published = write_published(tmp_path / "published")
    written = export(published, tmp_path / "exported")
    model = MultiverseForCausalLM.from_pretrained(published).eval()
    ids = chat(AutoTokenizer.from_pretrained(published), GOAL)
    options = {"max_new_tokens": 40, "max_path_tokens": 8, "seed": 0, "return_dict_in_generate": True}
    sequences = model.generate(ids, **options).sequences
    expected = {"ids": ids, "logits": logits_of(model, ids), "sequences": sequences, "options": options}
    torch.save(expected, tmp_path / "expected.pt")
    environment = bare_environment.build(tmp_path / "packages")
    printed = bare_environment.run(environment, LOAD, tmp_path, str(written), str(tmp_path / "expected.pt"))
    assert printed.split() == ["loaded", "MultiverseQwen2ForCausalLM", "torch.bfloat16"]


# --- Where the files are ---------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(published: Path, plain: Path, tmp_path: Path) -> Path:
    """A cache of the Hub in which one revision has tags and one has none, at the top and in a folder."""
    for revision, checkpoint in (("main", plain), ("tagged", published)):
        repository = tmp_path / f"models--{NAME.replace('/', '--')}"
        for place in (".", "inner"):
            shutil.copytree(checkpoint, repository / "snapshots" / COMMITS[revision] / place, dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(COMMITS[revision])
    return tmp_path


@pytest.mark.parametrize("front_door", [MultiverseForCausalLM, MultiverseConfig])
@pytest.mark.parametrize("subfolder", ["", "inner"])
@pytest.mark.parametrize("revision", list(COMMITS))
def test_tags_are_those_of_the_revision_and_folder(
    hub_cache: Path, revision: str, subfolder: str, front_door: Any
) -> None:
    place = hub_cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMITS["tagged"]
    if subfolder:
        for name in TOKENIZER_FILES:
            (place / name).unlink()
    arguments = {"cache_dir": hub_cache, "revision": revision, "subfolder": subfolder, "local_files_only": True}
    loaded = front_door.from_pretrained(NAME, **arguments)
    config = loaded if front_door is MultiverseConfig else loaded.config
    assert (config.multiverse_token_ids is not None) == (revision == "tagged")
    if subfolder and revision == "tagged":
        arguments["subfolder"] = ""  # whose tokenizer is gone
        loaded = front_door.from_pretrained(NAME, **arguments)
        config = loaded if front_door is MultiverseConfig else loaded.config
        assert config.multiverse_token_ids is None


@pytest.mark.parametrize("front_door", [MultiverseForCausalLM, MultiverseConfig])
def test_what_the_hub_is_asked_with_is_passed_on(
    published: Path, front_door: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(function: Any) -> Any:
        def recorded(checkpoint: Any, *arguments: Any, **options: Any) -> Any:
            asked.append({name: value for name, value in options.items() if not name.startswith("_")})
            return function(checkpoint, *arguments, **options)

        return recorded

    tokenizers = type("Tokenizers", (), {"from_pretrained": staticmethod(record(AutoTokenizer.from_pretrained))})
    monkeypatch.setattr(checkpoint_tags_module, "cached_file", record(checkpoint_tags_module.cached_file))
    monkeypatch.setattr(checkpoint_tags_module, "AutoTokenizer", tokenizers)
    hub = {"cache_dir": "/nowhere", "force_download": True, "local_files_only": True, "proxies": {"https": "proxy"}}
    hub |= {"revision": "tagged", "token": "mine"}
    loaded = front_door.from_pretrained(published, trust_remote_code=True, code_revision="later", **hub)
    assert (loaded if front_door is MultiverseConfig else loaded.config).multiverse_token_ids
    assert asked == [hub, {**hub, "trust_remote_code": True}]


def test_configuration_of_the_caller_is_not_touched(published: Path) -> None:
    for config in (
        AutoConfig.from_pretrained(published),
        MultiverseConfig.from_base(AutoConfig.from_pretrained(published)),
    ):
        before = config.to_dict()
        model = MultiverseForCausalLM.from_pretrained(published, config=config)
        assert model.config.multiverse_token_ids
        assert config.to_dict() == before


def test_configuration_alone_names_the_tags_as_the_model_does(published: Path) -> None:
    config, unused = MultiverseConfig.from_pretrained(published, return_unused_kwargs=True, unknown=3)
    assert unused == {"unknown": 3}
    assert fields_of(config) == fields_of(MultiverseForCausalLM.from_pretrained(published).config)


# --- Tokenizers of other kinds ---------------------------------------------------------------------------------------


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def test_tokenizer_saved_anew_is_read_too(published: Path, copied: Path) -> None:
    for name in TOKENIZER_FILES:
        (copied / name).unlink()
    AutoTokenizer.from_pretrained(published).save_pretrained(copied)
    assert "added_tokens_decoder" not in (copied / "tokenizer_config.json").read_text()
    expected = MultiverseConfig.from_pretrained(published)
    assert fields_of(MultiverseForCausalLM.from_pretrained(copied).config) == fields_of(expected)


def test_vocabulary_and_merges_are_enough(published: Path, copied: Path) -> None:
    (copied / "tokenizer.json").unlink()
    expected = MultiverseConfig.from_pretrained(published)
    assert fields_of(MultiverseForCausalLM.from_pretrained(copied).config) == fields_of(expected)


def test_plain_checkpoint_stays_plain_and_its_tokenizer_is_not_built(
    plain: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_transformers: list[str]
) -> None:
    monkeypatch.setattr(checkpoint_tags_module, "AutoTokenizer", None)
    model, base = MultiverseForCausalLM.from_pretrained(plain).eval(), Qwen2ForCausalLM.from_pretrained(plain).eval()
    assert fields_of(model.config) == [None, None, None]
    assert_same_weights(model, base)
    ids = chat(AutoTokenizer.from_pretrained(plain), GOAL)
    assert torch.equal(logits_of(model, ids), logits_of(base, ids))
    assert torch.equal(*(each.generate(ids, max_new_tokens=8, do_sample=False) for each in (model, base)))
    assert warnings_of_transformers == []


def test_tags_that_are_not_all_there_count_for_none(tmp_path: Path, warnings_of_transformers: list[str]) -> None:
    for missing in ("<Think>", "</Conclusion>"):
        tags = tuple(tag for tag in TAGS if tag != missing)
        model = MultiverseForCausalLM.from_pretrained(write_published(tmp_path / missing.strip("</>"), tags))
        assert fields_of(model.config) == [None, None, None]
    assert warnings_of_transformers == []


def test_tags_without_rows_in_the_model_are_left_to_be_added(
    published: Path, plain: Path, tmp_path: Path, warnings_of_transformers: list[str]
) -> None:
    small = Qwen2ForCausalLM.from_pretrained(plain)
    tokenizer = AutoTokenizer.from_pretrained(published)
    rows = max(tokenizer.convert_tokens_to_ids(list(TAGS)))  # one too few
    small.resize_token_embeddings(rows, mean_resizing=False)
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = MultiverseForCausalLM.from_pretrained(tmp_path)
    assert (fields_of(model.config), model.config.vocab_size) == ([None, None, None], rows)
    assert warnings_of_transformers == []
    add_multiverse_tokens(model, tokenizer)
    assert model.config.vocab_size == rows + 1


def test_checkpoint_without_a_tokenizer_loads(copied: Path, warnings_of_transformers: list[str]) -> None:
    for name in TOKENIZER_FILES:
        (copied / name).unlink()
    model = MultiverseForCausalLM.from_pretrained(copied)
    assert fields_of(model.config) == [None, None, None]
    assert warnings_of_transformers == []


def test_tokenizer_file_that_cannot_be_read_is_told_of(
    copied: Path, warnings_of_transformers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*arguments: Any, **options: Any) -> str:
        raise PermissionError("no leave to read it")

    monkeypatch.setattr("multiverse.checkpoint_tags.cached_file", unreadable)
    loaded = MultiverseForCausalLM.from_pretrained(copied)
    assert loaded.config.multiverse_token_ids is None
    assert any("tokenizer_config.json" in told and "no leave to read it" in told for told in warnings_of_transformers)


def test_code_of_a_tokenizer_is_not_run(copied: Path) -> None:
    settings = json.loads((copied / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (copied / "tokenizer_config.json").write_text(json.dumps(settings))
    (copied / "own.py").write_text(f"open({str(copied / 'ran')!r}, 'w')\n")
    MultiverseForCausalLM.from_pretrained(copied)
    assert not (copied / "ran").exists()


@pytest.mark.parametrize("breakage", ["cut off", "settings", "a tag is split"])
def test_tokenizer_that_cannot_be_used_leaves_the_model_as_it_is_and_is_told_of_once(
    copied: Path, breakage: str, warnings_of_transformers: list[str]
) -> None:
    file, settings = copied / "tokenizer.json", copied / "tokenizer_config.json"
    if breakage == "cut off":
        file.write_text(file.read_text()[:1000])
    elif breakage == "settings":
        settings.write_text(settings.read_text()[:-3])
    else:
        # In the vocabulary, but no merge leads to it.
        content = json.loads(file.read_text())
        content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != "<Path>"]
        content["model"]["vocab"]["<Path>"] = 340
        file.write_text(json.dumps(content))
        settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
        for name in ("special_tokens_map.json", "added_tokens.json"):
            (copied / name).unlink()
    for _ in range(2):
        model = MultiverseForCausalLM.from_pretrained(copied)
        assert fields_of(model.config) == [None, None, None]
    ours = [message for message in warnings_of_transformers if "Multiverse" in message]
    assert len(ours) == 1
    assert str(copied) in ours[0]
    assert "add_multiverse_tokens" in ours[0]
    assert_same_weights(model, Qwen2ForCausalLM.from_pretrained(copied))


def test_broken_tokenizer_without_tags_is_not_this_packages_business(
    plain: Path, tmp_path: Path, warnings_of_transformers: list[str]
) -> None:
    copied = shutil.copytree(plain, tmp_path / "copy")
    (copied / "tokenizer.json").write_bytes(b'{"added_tokens": [\xff')
    (copied / "tokenizer_config.json").write_text("{")
    assert fields_of(MultiverseForCausalLM.from_pretrained(copied).config) == [None, None, None]
    assert warnings_of_transformers == []
