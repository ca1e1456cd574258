"""lm-evaluation-harness, run for real on local tasks: answers are those of `generate()`, figures the model's."""

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bare_environment
import lm_eval.tasks
import pytest
import torch
from cases import both_modes
from decoding import NESTED, TWO_PATHS, Follow, decode, text_of
from forward import fresh_models, reference_logits
from grpo_runs import FORK, fresh, with_adapter, word_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval_tasks.rows import CHOICES, QUESTIONS
from multiverse import TAGS, MultiverseForCausalLM, add_multiverse_tokens
from multiverse.evaluation.lm_eval_model import MultiverseLM, main
from multiverse.evaluation.lm_eval_stop import StopOutsidePaths
from published import write_published
from tiny import CHAT_TEMPLATE, PAD, TOKEN_IDS, WORDS, Script, tiny_config, tiny_ids, tiny_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

TASKS = Path(__file__).parent / "lm_eval_tasks"
STOP = ("v", "8 8")
LONGEST = 60
#: `lm-eval` without the index of its own tasks, which takes longer than all that is done here.
HARNESS = """
import functools, importlib.util
import lm_eval.tasks
assert importlib.util.find_spec("multiverse") is None
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, MultiverseForCausalLM, Any]:
    """A checkpoint in float64 that forks by itself, the model that it was saved from, and its plain twin."""
    folder = tmp_path_factory.mktemp("harness") / "checkpoint"
    model, base = fresh_models("llama")
    # Padding, which is no word of the text, is never said.
    model.generation_config.sequence_bias = [*FORK, [[PAD], -100.0]]
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_start|>", " i ").replace("<|im_end|>", " _ ")
    tokenizer.save_pretrained(folder)
    return folder, model, base


def answer(model: MultiverseForCausalLM, prompt: str, stop: Sequence[str] = (), **options: Any) -> tuple[str, Any]:
    """What one call of `generate()` says to one prompt, cut before the first stop string, and its report."""
    tokenizer = word_tokenizer()
    given = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        **given, **{"max_new_tokens": LONGEST, "do_sample": False, "return_dict_in_generate": True, **options}
    )
    text = tokenizer.decode(output.sequences[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return re.split("|".join(map(re.escape, stop)), text)[0] if stop else text, output.reports[0]


def likelihood(base: LlamaForCausalLM, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """From the plain class under the mask and the positions that the layout's definition gives."""
    logprobs = reference_logits(base, [*context, *continuation])[0].log_softmax(-1)[len(context) - 1 : -1]
    chosen = logprobs.gather(1, torch.tensor(continuation)[:, None])
    return float(chosen.sum()), logprobs.argmax(-1).tolist() == list(continuation)


@pytest.fixture(scope="module")
def right(saved, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """What is right: the last word that the model says to every other question, and for half its own choice."""
    _, model, base = saved
    words, labels = [], []
    for number, question in enumerate(QUESTIONS):
        said = answer(model, question)[0].split() or ["[invalid]"]
        words.append(said[-1] if number % 2 else "never")
        likelihoods = [likelihood(base, tiny_ids(question), tiny_ids(choice))[0] for choice in CHOICES]
        labels.append((likelihoods.index(max(likelihoods)) + number % 2) % len(CHOICES))
    found = {"words": words, "labels": labels}
    path = tmp_path_factory.mktemp("right") / "answers.json"
    path.write_text(json.dumps(found))
    return path, found


def tasks(*names: str, answers: Path | None = None) -> dict[str, Any]:
    metadata = {} if answers is None else {"answers": str(answers)}
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load(list(names))


def run(model: MultiverseLM, *names: str, answers: Path | None = None, **options: Any) -> dict[str, Any]:
    return evaluate(model, tasks(*names, answers=answers), bootstrap_iters=0, **options)


def check_likelihoods(base: LlamaForCausalLM, samples: dict[str, list[dict[str, Any]]]) -> None:
    for sample in samples["words_choice"]:
        for (context, continuation), [found] in zip(sample["arguments"], sample["resps"], strict=True):
            expected = likelihood(base, tiny_ids(context), tiny_ids(continuation))
            assert found[0] == pytest.approx(expected[0], abs=1e-9)
            assert found[1] == expected[1]
    for sample in samples["words_rolling"]:
        [[text]], [[found]] = sample["arguments"], sample["resps"]
        # A text is scored from its first token on, after the end of sequence.
        assert found == pytest.approx(likelihood(base, tiny_ids("$"), tiny_ids(text))[0], abs=1e-9)


def in_file(pattern: str, folder: Path) -> str:
    [path] = folder.rglob(pattern)
    return path.read_text()


def test_the_harness_runs_a_saved_folder_by_the_code_in_it(saved, right, tmp_path):
    """The command `lm-eval --model hf` where this package is not installed."""
    folder, model, base = saved
    # dill, by which data sets are told apart, takes only folders of this name for installed packages.
    environment = bare_environment.build(tmp_path / "site-packages", "lm_eval", "accelerate", "peft")
    home, output = tmp_path / "home", tmp_path / "output"
    home.mkdir()
    names = ("words_whole", "words_choice", "words_rolling")
    bare_environment.run(
        environment,
        HARNESS,
        home,
        *("run", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float64"),
        *(
            "--tasks",
            ",".join(names),
            "--include_path",
            str(TASKS),
            "--metadata",
            json.dumps({"answers": str(right[0])}),
        ),
        *("--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", str(output)),
    )
    samples = {
        name: [json.loads(line) for line in in_file(f"samples_{name}_*.jsonl", output).splitlines()] for name in names
    }
    # The log writes arguments as dictionaries and numbers as text.
    for name in names:
        for sample in samples[name]:
            sample["arguments"] = [list(each.values()) for each in sample["arguments"].values()]
    forks = 0
    for sample, word in zip(samples["words_whole"], right[1]["words"], strict=True):
        text, report = answer(model, sample["doc"]["question"])
        assert sample["resps"] == [[text]]
        assert bool(sample["exact_match"]) == (word == (text.split() or ["[invalid]"])[-1])
        forks += len(report.branches) > 1
    assert forks > len(QUESTIONS) // 2
    for sample in samples["words_choice"]:
        sample["resps"] = [[(float(each[0][0]), each[0][1] in (True, "True"))] for each in sample["resps"]]
    for sample in samples["words_rolling"]:
        sample["resps"] = [[float(sample["resps"][0][0])]]
    check_likelihoods(base, samples)
    results = json.loads(in_file("results_*.json", output))["results"]
    assert (results["words_whole"]["exact_match,last-word"], results["words_choice"]["acc,none"]) == (0.5, 0.5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_likelihoods_and_reports_are_the_models_own(batch_size, saved, right, tmp_path):
    folder, model, base = saved
    reports = tmp_path / "of" / "answers.jsonl"
    harness = MultiverseLM(str(folder), device="cpu", batch_size=batch_size, reports=str(reports))
    names = ("words_until", "words_whole", "words_choice", "words_rolling")
    results = run(harness, *names, answers=right[0])
    samples = results["samples"]
    records = {(record["task"], record["doc_id"]): record for record in harness.records}
    assert len(records) == len(harness.records) == 2 * len(QUESTIONS)
    cut = 0
    for name, stop in (("words_until", STOP), ("words_whole", ())):
        for sample in samples[name]:
            text, report = answer(model, sample["doc"]["question"], stop)
            assert sample["resps"] == [[text]]
            record = records[name, sample["doc_id"]]
            assert record["repeat"] == 0
            if record["finish_reason"] == "stopped":
                cut += 1
                assert record["generated_tokens"] <= report.generated_tokens
                continue
            plain = {key: value for key, value in report.to_dict().items() if key != "seconds"}
            assert {key: record[key] for key in plain} == plain
    assert 0 < cut < len(QUESTIONS)
    assert results["results"]["words_whole"]["exact_match,last-word"] == 0.5
    assert results["results"]["words_choice"]["acc,none"] == 0.5
    check_likelihoods(base, samples)
    assert [json.loads(line) for line in reports.read_text().splitlines()] == harness.records
    summary = harness.get_model_info()["multiverse"]
    assert summary["answers"] == sum(summary["finish_reasons"].values()) == len(harness.records)
    steps = sum(record["sequential_steps"] for record in harness.records)
    assert summary["sequential_steps"] == steps < summary["generated_tokens"]
    assert summary["degree_of_parallelism"] == summary["generated_tokens"] / steps


def test_the_command_decodes_one_path_at_a_time_on_demand(saved, tmp_path, monkeypatch):
    folder, model, _ = saved
    monkeypatch.setattr(sys, "argv", ["harness"])
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    reports = tmp_path / "reports.jsonl"
    main(
        [
            *("--model", "multiverse", "--model_args", f"pretrained={folder},parallel=False,reports={reports}"),
            *("--tasks", "words_whole", "--include_path", str(TASKS), "--device", "cpu", "--batch_size", "4"),
            *("--log_samples", "--output_path", str(tmp_path)),
        ]
    )
    samples = [json.loads(line) for line in in_file("samples_words_whole_*.jsonl", tmp_path).splitlines()]
    records = [json.loads(line) for line in reports.read_text().splitlines()]
    saved_steps = 0
    for sample, record in zip(samples, records, strict=True):
        text, report = answer(model, sample["doc"]["question"], parallel=False)
        assert sample["resps"] == [[text]]
        assert (record["task"], record["doc_id"]) == ("words_whole", sample["doc_id"])
        assert record["sequential_steps"] == report.sequential_steps
        saved_steps += report.sequential_steps - answer(model, sample["doc"]["question"])[1].sequential_steps
    assert saved_steps > 0
    summary = json.loads(in_file("results_*.json", tmp_path))["config"]["multiverse"]
    assert (summary["parallel"], summary["answers"]) == (False, len(QUESTIONS))
    assert summary["sequential_steps"] == sum(record["sequential_steps"] for record in records)


def test_reports_of_repeated_and_equal_prompts_are_their_own(saved):
    """The harness sorts requests, and groups them by their arguments."""
    folder, _, _ = saved
    harness = MultiverseLM(str(folder), device="cpu", batch_size=3)
    samples = run(harness, "words_whole", "words_sampled", "words_again")["samples"]
    tokenizer = word_tokenizer()
    compared = 0
    for record in harness.records:
        [[*texts]] = samples[record["task"]][record["doc_id"]]["resps"]
        words = len(tokenizer(texts[record["repeat"]])["input_ids"])
        # The end of sequence is not in the text.
        assert words == record["generated_tokens"] - (record["finish_reason"] == "eos")
        compared += 1
    assert compared == 4 * len(QUESTIONS)


def test_chat_template_and_system_instruction(saved):
    folder, model, _ = saved
    harness = MultiverseLM(str(folder), device="cpu", batch_size=4)
    options = {"apply_chat_template": True, "system_instruction": "x y z"}
    for sample in run(harness, "words_whole", **options)["samples"]["words_whole"]:
        prompt = sample["arguments"][0][0]
        assert prompt.split()[:6] == ["i", "system", "x", "y", "z", "_"]
        assert sample["doc"]["question"] in prompt
        assert sample["resps"] == [[answer(model, prompt)[0]]]


class StopAnywhere(StoppingCriteria):
    """Stops where any branch's last token is `token_id`."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token_id


def stopped(script: Script, word: str, parallel: bool, criterion: StoppingCriteria | None = None) -> tuple[str, Any]:
    """The text of a script before `word`, and how its request went."""
    model, _ = fresh_models("llama")
    context = torch.tensor([script.ids[:1]])
    # With a blank before it, so that it is not found in a tag.
    criterion = criterion or StopOutsidePaths([f" {word}"], word_tokenizer(), TOKEN_IDS, context)
    output = decode(
        model,
        [script.ids[:1]],
        Follow(script),
        stopping_criteria=StoppingCriteriaList([criterion]),
        max_new_tokens=500,
        parallel=parallel,
    )
    return word_tokenizer().decode(text_of(output)).split(f" {word}")[0], output.reports[0]


@both_modes
@pytest.mark.parametrize(
    ("script", "word", "ends"),
    [
        *((TWO_PATHS, word, word in "i") for word in "degfi"),
        *((NESTED, word, word in "rv") for word in "fgkmnopqrv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stop_string_leaves_the_text_before_it_whole(script, word, ends, parallel):
    text, report = stopped(script, word, parallel)
    assert text == word_tokenizer().decode(script.ids).split(f" {word}")[0]
    assert report.finish_reason == ("stopped" if ends else "eos")


def test_a_criterion_that_stops_in_a_path_cuts_earlier_paths_off():
    """Why there is one of our own."""
    whole = stopped(TWO_PATHS, "f", parallel=False)[0]
    assert stopped(TWO_PATHS, "f", True, StopAnywhere(WORDS["f"]))[0] != whole
    assert stopped(TWO_PATHS, "f", True)[0] == whole


@pytest.mark.parametrize("padding", [0, 3])
def test_stop_strings_in_the_prompt_do_not_count(padding):
    rows = ["b v", "b v c", "a b c d"]
    context = torch.tensor([tiny_ids(" ".join(["$"] * (4 + padding - len(row.split())) + [row])) for row in rows])
    mask = torch.tensor([[0] * (4 + padding - len(row.split())) + [1] * len(row.split()) for row in rows])
    criterion = StopOutsidePaths(["v", "c d"], word_tokenizer(), TOKEN_IDS, context, mask)

    def stops(text: str) -> bool:
        return bool(criterion(torch.tensor([tiny_ids(text)]), None)[0])

    assert not stops("b v a")
    assert not stops("b v c d"), "nor does one that begins in the prompt"
    assert not stops("a b c d a")
    assert stops("b v a v")
    assert stops("b v a c d")
    assert not stops("b v c v") or stops("b v c a v"), "a prompt that begins as another one does may stop later"
    both = torch.tensor([[*row, *tiny_ids(more)] for row, more in zip(context.tolist(), "vxv", strict=True)])
    assert criterion(both, None).tolist() == [True, False, True]


def test_adapter_over_a_plain_base(tmp_path):
    _, tokenizer = fresh("llama")
    torch.manual_seed(0)
    plain = LlamaForCausalLM(tiny_config("llama", len(tokenizer) - len(TAGS)))
    plain.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    untagged = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = MultiverseForCausalLM.from_pretrained(tmp_path / "base")
    add_multiverse_tokens(model, untagged)
    adapted = with_adapter(model)
    adapted.save_pretrained(tmp_path / "adapter")
    harness = MultiverseLM(str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu")
    text = "a<Parallel><Goal><Outline>1: b</Outline></Goal>\n<Path>\n1:"
    ids = untagged(text, return_tensors="pt").input_ids
    assert harness.tok_encode(text) == ids[0].tolist()
    with torch.no_grad():
        assert (harness._model_call(ids) - adapted.eval()(ids).logits).abs().max() < 1e-5
    [said] = harness.generate_until([Instance("generate_until", {}, (text, {"max_gen_toks": 30}), 0)])
    assert "</Path>" in said
    assert harness.records[0]["generated_tokens"] <= 30


def test_tags_stay_in_the_text_where_the_tokenizer_holds_them_as_special_tokens(tmp_path):
    folder = write_published(tmp_path / "published")
    harness = MultiverseLM(str(folder), device="cpu", dtype="float32")
    prompt = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
    [said] = harness.generate_until([Instance("generate_until", {}, (prompt, {"max_gen_toks": 40}), 0)])
    assert said.count("<Path>") >= 2
    end = harness.tokenizer.eos_token_id
    assert harness.tok_decode([*harness.tok_encode("a<Path>b"), end]) == "a<Path>b"
    assert harness.tok_decode(end, skip_special_tokens=False) == harness.tokenizer.eos_token


def test_what_cannot_be_run_is_refused(saved, tmp_path):
    folder, _, base = saved
    base.save_pretrained(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"`pretrained` .*--model hf"):
        MultiverseLM(str(tmp_path / "plain"), device="cpu")
    with pytest.raises(ValueError, match=r"`parallel` must be True or False, got 'no'"):
        MultiverseLM(str(folder), device="cpu", parallel="no")
