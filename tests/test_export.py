"""`multiverse export`: what is written is the model that was given, whole and loadable by name."""

import json

import pytest
import torch
from grpo_runs import fresh, with_adapter
from multiverse import TAGS
from multiverse.cli import app
from multiverse.hub_card import checkpoint
from multiverse.hub_card.export import export
from tiny import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

TEXT = "a<Parallel>\n<Goal>\n<Outline>\n1: b\n</Outline>\n<Outline>\n2: c\n</Outline>\n</Goal>\n<Path>\n1: d"


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokenizer(TEXT, return_tensors="pt").input_ids).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def plain(tmp_path):
    """A checkpoint of transformers' own class, with a tokenizer that knows no tags."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = tiny_config("qwen3", vocabulary=len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_an_adapter_is_merged_into_its_base(tmp_path):
    model, tokenizer = fresh("qwen2")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = with_adapter(model)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            torch.nn.init.normal_(weight, std=0.03)
    adapted.save_pretrained(tmp_path / "adapter")
    # Arithmetic in float64: what is left is the rounding of the merged weights, on whatever processor.
    expected = logits(adapted.double(), tokenizer)

    written = export(tmp_path / "adapter", tmp_path / "whole", base=tmp_path / "base")
    loaded, loaded_tokenizer = load(written)
    torch.testing.assert_close(logits(loaded.double(), loaded_tokenizer), expected, rtol=0, atol=1e-5)
    assert (logits(fresh("qwen2")[0].double(), tokenizer) - expected).abs().max() > 0.05
    names = {path.name for path in written.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"modeling_multiverse.py", "configuration_multiverse.py", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth")) or "adapter" in name]


def test_a_plain_checkpoint_gets_tags_and_keeps_its_dtype(plain, tmp_path):
    loaded, tokenizer = load(export(plain, tmp_path / "out"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.multiverse_token_ids == {tag: tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    full, _ = load(export(plain, tmp_path / "full", dtype="float32"))
    assert full.dtype == torch.float32
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name].float()) for name, weight in full.state_dict().items())


def test_weights_are_split_into_files_of_the_wanted_size(plain, tmp_path):
    folder = export(plain, tmp_path / "out", max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(load(folder)[0].lm_head.weight, load(export(plain, tmp_path / "whole"))[0].lm_head.weight)


def test_nothing_half_written_has_the_folders_name(plain, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_tokenizer()), "save_pretrained", broken)
        with pytest.raises(OSError, match="disk"):
            export(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(plain, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_what_cannot_be_exported_is_named_before_anything_is_loaded(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MultiverseForCausalLM", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match=r"`folder`.*not empty"):
        export(plain, tmp_path / "full")
    with pytest.raises(ValueError, match="`base`"):
        export(plain, tmp_path / "out", base="other")
    with pytest.raises(ValueError, match=r"`dtype`.*'float7'"):
        export(plain, tmp_path / "out", dtype="float7")


def test_the_command_says_what_it_wrote(plain, tmp_path):
    done = CliRunner().invoke(app, ["export", str(plain), str(tmp_path / "out"), "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    files = list((tmp_path / "out").iterdir())
    assert f"{len(files)} files" in " ".join(done.output.split())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    again = CliRunner().invoke(app, ["export", str(plain), str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "not empty" in " ".join(again.output.split())
