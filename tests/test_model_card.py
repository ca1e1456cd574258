"""The model card: its facts, its metadata, and that its snippet prints what it says."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from grpo_runs import fresh
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from multiverse import MultiverseConfig, MultiverseForCausalLM
from multiverse.evaluation.intervals import wilson_interval
from multiverse.evaluation.markdown import table
from multiverse.evaluation.report_tables import card_table
from multiverse.evaluation.summary import summarise_run
from multiverse.hub_card.checkpoint import ADAPTER, load_demo_model
from multiverse.hub_card.export import export
from multiverse.hub_card.model_card import CARD, FACTS_FILE, Answer, CardFacts, answer_example, make_card
from multiverse.hub_card.pack_adapter import BASE_MODEL
from reported import broken, condition, record, wrong

SHIPPED = ADAPTER.parent / CARD


def write_facts(folder: Path, text: str) -> Path:
    (folder / FACTS_FILE).write_text(text)
    return folder / FACTS_FILE


def snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_the_card_in_the_repository_is_the_one_the_shipped_model_gets():
    facts = CardFacts.read(ADAPTER / FACTS_FILE)
    model, tokenizer = load_demo_model()
    card = make_card(facts, model.config, answer_example(facts, model, tokenizer))
    assert str(card).strip() == SHIPPED.read_text().strip(), "`make card` writes it anew"
    # The intervals are those of the counts.
    for row in facts.results["conditions"]:
        low, high = wilson_interval(row["right"], row["questions"])
        assert row["pass_at_1_interval_95"] == [round(low, 4), round(high, 4)]


def test_the_metadata_is_what_the_hub_asks_for():
    data = ModelCard.load(SHIPPED).data
    assert (data.base_model, data.license, data.library_name) == (BASE_MODEL, "apache-2.0", "transformers")
    assert data.pipeline_tag == "text-generation"
    results = CardFacts.read(ADAPTER / FACTS_FILE).results
    figures = [row[name] for row in results["conditions"] for name in ("pass_at_1", "degree_of_parallelism")]
    assert [result.metric_value for result in data.eval_results] == figures
    index = metadata_load(SHIPPED)["model-index"]
    assert index[0]["name"] == data.model_name == "smollm2-135m-multiverse"


def test_the_snippet_prints_what_stands_below_it(tmp_path, monkeypatch):
    model, tokenizer = fresh("qwen3")
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    facts = (
        'name: tiny\nexample:\n  messages:\n    - {role: user, content: "a \'b\' \\"c\\"\\nd"}\n  max_new_tokens: 40\n'
    )
    folder = export(tmp_path / "plain", tmp_path / "tiny", card=write_facts(tmp_path, facts))
    card = (folder / CARD).read_text()
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet(card), {})
    assert printed.getvalue().strip()
    assert f"prints\n\n```\n{printed.getvalue()}```" in card


def test_every_saved_model_has_a_card_that_promises_nothing(tmp_path):
    model, _ = fresh("qwen2")
    model.save_pretrained(tmp_path / "my-model")
    card = (tmp_path / "my-model" / CARD).read_text()
    assert ModelCard(card).data.library_name == "transformers"
    assert card.count("by whoever saved this model") == 4
    assert 'from_pretrained("my-model", trust_remote_code=True)' in card
    compile(snippet(card), "snippet", "exec")
    # What somebody has written is theirs.
    (tmp_path / "my-model" / CARD).write_text("mine")
    model.save_pretrained(tmp_path / "my-model")
    assert (tmp_path / "my-model" / CARD).read_text() == "mine"


def test_a_push_replaces_the_empty_card_of_transformers(tmp_path, monkeypatch):
    model, _ = fresh("qwen2")
    pushed = {}

    def upload(self, working_dir, repo_id, *arguments, **options):
        pushed[repo_id] = (Path(working_dir) / CARD).read_text()

    monkeypatch.setattr("transformers.PreTrainedModel._upload_modified_files", upload)
    described = "This is the model card of a model that was pushed. It has been automatically generated."
    stock = str(ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=described))
    edited = stock.replace("## Uses", "## Uses\n\nFor sums.")
    assert edited != stock
    for text, repo in ((stock, "me/new"), ("---\nlicense: mit\n---\nmine", "me/old"), (edited, "me/edited")):
        (tmp_path / CARD).write_text(text)
        model._upload_modified_files(str(tmp_path), repo, {})
    assert 'from_pretrained("me/new", trust_remote_code=True)' in pushed["me/new"]
    assert pushed["me/old"].endswith("mine")
    assert pushed["me/edited"] == edited


def test_base_and_name_come_from_what_is_known(tmp_path):
    config = MultiverseConfig.from_base(fresh("llama")[0].config)
    config._name_or_path = "some/base"
    card = make_card(CardFacts(name="me/mine"), config)
    assert card.data.base_model == "some/base"
    assert "huggingface.co/some/base" in card.text
    assert make_card(CardFacts(name="me/mine", base_model="other/base"), config).data.base_model == "other/base"
    config._name_or_path = str(tmp_path)
    assert make_card(CardFacts(name="me/mine"), config).data.base_model is None


def test_model_text_cannot_close_its_frame():
    config = fresh("llama")[0].config
    facts = CardFacts(name="m", example={"messages": [{"role": "user", "content": "a"}], "max_new_tokens": 5})
    card = str(make_card(facts, config, Answer("```\n# Not a heading\n````", 3, 2)))
    fence = re.search(r"prints\n\n(`+)\n", card)[1]
    assert len(fence) == 5
    assert f"\n{fence}\n" in card.split("````\n3 tokens")[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "fields with values"),
        ("a: [", "cannot be read"),
        ("licence: mit", "'licence', which no card has"),
        ("datasets: mine", "`datasets` must be a list"),
        ("results: gone.json", r"`results` \(.*gone\.json\) does not exist"),
        ("results: {parallel: {right: 3}}", "`results` has the schema version None"),
        ("results: {schema_version: 1}", "`results` has no conditions"),
        ("example: {messages: []}", "`example`"),
        ("example: {messages: [a], max_new_tokens: 5}", "`example`"),
        ("example: {messages: [{role: user, content: a}], max_new_tokens: many}", "`example`"),
    ],
)
def test_facts_that_make_no_card_are_named_before_anything_is_loaded(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr("multiverse.hub_card.checkpoint.MultiverseForCausalLM", None)
    with pytest.raises(ValueError, match=message):
        export(tmp_path, tmp_path / "out", card=write_facts(tmp_path, text))


def test_facts_beside_a_checkpoint_are_found(tmp_path):
    model, tokenizer = fresh("qwen2")
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    questions = condition("sums")
    records = [record(questions), wrong(questions, 1), record(questions, 2), broken(questions, 3)]
    facts = {"sums": {"source": "made up", "questions": 5, "samples": 1}}
    asked = {"tasks": ["sums"], "prompts": ["parallel"], "modes": ["parallel"], "budgets": [None]}
    summary = summarise_run(asked, facts, records, missing=1)
    (tmp_path / "plain" / "summary.json").write_text(json.dumps(summary))
    write_facts(tmp_path / "plain", "limits: It knows nothing.\nevaluation: Ten problems.\nresults: summary.json\n")
    folder = export(tmp_path / "plain", tmp_path / "out", name="me/mine")
    card = ModelCard.load(folder / CARD)
    assert "It knows nothing." in card.text
    assert "Ten problems." in card.text
    assert "1 generations are missing" in card.text
    assert table(card_table(summary)) in card.text
    assert "| 2 of 4 |" in card.text
    assert [each.metric_value for each in card.data.eval_results if each.metric_type == "pass@1"] == [0.5]
    assert card.data.model_name == "me/mine"
    assert not (folder / FACTS_FILE).exists()
    loaded = MultiverseForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
