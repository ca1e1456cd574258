"""A run of an evaluation: what its records say is what `generate()` does, whatever interrupts it."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from evaluated import (
    LONGEST,
    PATIENCE,
    PROCESSES,
    evaluate_alone,
    evaluate_elsewhere,
    settings_of,
    without_times,
    write_checkpoint,
    write_questions,
)
from multiverse import BranchLayout, MultiverseForCausalLM
from multiverse.evaluation import runner
from multiverse.evaluation.answering import Answerer
from multiverse.evaluation.measures import structure_measures
from multiverse.evaluation.run_folder import RECORD_SCHEMA, RunFolder
from multiverse.evaluation.runner import Rank, run
from multiverse.evaluation.settings import Condition
from tiny import TOKEN_IDS, tiny_ids
from transformers import AutoTokenizer

BOTH = ("parallel", "sequential")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture(scope="module")
def questions(checkpoint) -> Path:
    return write_questions(checkpoint.parent / "questions.jsonl", checkpoint)


@pytest.fixture(scope="module")
def whole(checkpoint, questions) -> RunFolder:
    """A run that nothing has interrupted, in both modes and with a budget."""
    settings = settings_of(checkpoint, questions, modes=BOTH, budgets=(None, 12))
    return run(settings, checkpoint.parent / "whole", show=False)


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return MultiverseForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float64
    ).eval(), AutoTokenizer.from_pretrained(checkpoint)


def test_every_record_is_what_a_call_by_itself_gives(whole, loaded, questions):
    model, tokenizer = loaded
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    records = whole.records()
    assert len(records) == 4 * len(rows)
    assert whole.missing() == 0
    schema = json.loads((whole.path / RECORD_SCHEMA.name).read_text())
    for record in records:
        jsonschema.validate(record, schema)
        row = rows[record["question_number"]]
        messages = [
            {"role": "system", "content": "Think step by step and in parallel."},
            {"role": "user", "content": row["question"]},
        ]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        output = model.generate(
            prompt,
            max_new_tokens=LONGEST,
            do_sample=False,
            parallel=record["mode"] == "parallel",
            max_sequential_steps=record["budget"],
            return_dict_in_generate=True,
        )
        made = output.sequences[0, prompt.shape[1] :].tolist()
        [report] = output.reports
        assert record["text"] == tokenizer.decode(made[:-1] if report.finish_reason == "eos" else made)
        assert (record["generated_tokens"], record["sequential_steps"]) == (len(made), report.sequential_steps)
        assert record["prompt_tokens"] == prompt.shape[1]
        assert record["finish_reason"] == report.finish_reason
        layout = BranchLayout.from_token_ids(made, model.config.multiverse_token_ids)
        assert record["paths"] == len(set(layout.branch_ids.tolist()) - {0})
        assert sum(record["tokens_by_stage"].values()) == len(made)
        assert record["tokens_by_stage"]["process"] >= (layout.branch_ids > 0).sum()
        assert sum(record["path_finish_reasons"].values()) == len([b for b in report.branches[1:] if b.finish_reason])
        right = record["finish_reason"] == "eos" and record["answer"] == str(row["answer"])
        assert record["right"] == right


def test_tokens_are_counted_by_stage():
    def stages(text: str) -> list[int]:
        return list(structure_measures(tiny_ids(text), TOKEN_IDS)["tokens_by_stage"].values())

    paths = "<Path> 1 a </Path> _"
    block = f"<Parallel> <Goal> <Outline> a </Outline> </Goal> {paths} <Conclusion> b </Conclusion> </Parallel>"
    assert stages(f"a b {block} c") == [3, 6, 5, 4]
    assert stages(f"{block} {block}") == [0, 12, 10, 8]
    # In a path all is process; in a goal or a conclusion the inner block has stages of its own.
    assert stages(block.replace("1 a", f"1 {block} a")) == [0, 6, 5 + 15, 4]
    assert stages(block.replace("<Conclusion> b", f"<Conclusion> {block} b")) == [0, 12, 10, 8]
    assert stages("a <Parallel> <Goal> <Outline> a") == [1, 4, 0, 0]
    assert structure_measures([], TOKEN_IDS)["depth"] == 0
    nested = structure_measures(tiny_ids(block.replace("<Conclusion> b", f"<Conclusion> {block} b")), TOKEN_IDS)
    assert (nested["depth"], nested["blocks"], nested["paths"]) == (2, 2, 2)


def test_the_runs_of_these_tests_have_something_to_tell_apart(whole):
    records = whole.records()
    assert 0 < sum(record["right"] for record in records) < len(records)
    assert {record["finish_reason"] for record in records} >= {"eos", "max_sequential_steps"}
    assert max(record["depth"] for record in records) > 1
    assert max(record["degree_of_parallelism"] for record in records) > 1.2


def test_both_modes_write_the_same_text_and_one_needs_fewer_steps(whole):
    records = {(record["question"], record["mode"]): record for record in whole.records() if record["budget"] is None}
    fewer = 0
    for question in {question for question, _ in records}:
        parallel, sequential = (records[question, mode] for mode in BOTH)
        # Where a limit cuts in, what is cut depends on the order in which tokens are made.
        if parallel["finish_reason"] == "eos":
            assert parallel["text"] == sequential["text"]
        fewer += parallel["sequential_steps"] < sequential["sequential_steps"]
        # What is forced rides along, unless it takes the place of an end of sequence; any other token is a step.
        own = sequential["generated_tokens"] - sequential["forced_tokens"]
        assert own <= sequential["sequential_steps"] <= own + sequential["paths"]
    assert fewer


def test_a_budget_is_kept(whole):
    within = [record for record in whole.records() if record["budget"] == 12]
    assert max(record["sequential_steps"] for record in within) == 12
    assert all(record["right"] is False for record in within if record["finish_reason"] != "eos")


def test_a_finished_run_loads_nothing_and_changes_nothing(whole, monkeypatch):
    before = {path: path.read_bytes() for path in whole.path.rglob("*.jsonl")}
    monkeypatch.setattr(runner, "load", lambda settings: pytest.fail("loaded a model"))
    run(whole.settings(), whole.path, show=False)
    assert {path: path.read_bytes() for path in whole.path.rglob("*.jsonl")} == before


def test_a_run_that_is_killed_at_random_moments_comes_to_the_same_records(checkpoint, questions, tmp_path):
    settings = settings_of(checkpoint, questions, modes=BOTH, batch_size=1)
    alone, killed = RunFolder(tmp_path / "alone"), RunFolder(tmp_path / "killed")

    evaluate_elsewhere(settings, alone.path)
    records = killed.path / "records" / "rank-0000.jsonl"

    def written() -> int:
        return records.read_bytes().count(b"\n") if records.is_file() else 0

    random.seed(3)
    whole, seen = len(alone.records()), []
    for _ in range(10):
        if written() >= whole - 1:
            # It had come to its end, or nearly: some of it once more.
            records.write_bytes(records.read_bytes()[: random.randrange(records.stat().st_size)])
        target, end = random.randrange(written(), whole), time.monotonic() + PATIENCE
        process = PROCESSES.Process(target=evaluate_alone, args=(settings.to_dict(), str(killed.path)))
        process.start()
        # Sometimes it has written as much already, and is killed as it loads.
        while written() < target and process.is_alive():
            assert time.monotonic() < end
            time.sleep(0.001)
        process.join(timeout=random.random() / 100)
        process.kill()
        process.join()
        seen.append(written())
    assert len(set(seen)) > 3, f"kills hit the same moments: {seen}"
    evaluate_elsewhere(settings, killed.path)
    assert without_times(killed.records()) == without_times(alone.records())
    for name in ("settings.json", "tasks.json", "checkpoint.json", "prompts.json"):
        assert (killed.path / name).read_bytes() == (alone.path / name).read_bytes()


@pytest.mark.parametrize("seed", range(8))
def test_a_file_cut_off_anywhere_is_taken_up_again(whole, tmp_path, seed):
    folder = RunFolder(tmp_path / "cut")
    folder.path.mkdir()
    for path in whole.path.glob("*.json"):
        (folder.path / path.name).write_bytes(path.read_bytes())
    content = (whole.path / "records" / "rank-0000.jsonl").read_bytes()
    (folder.path / "records").mkdir()
    cut = random.Random(seed).randrange(len(content))
    (folder.path / "records" / "rank-0000.jsonl").write_bytes(content[:cut])
    assert all(record in whole.records() for record in folder.records())
    run(whole.settings(), folder.path, show=False)
    assert without_times(folder.records()) == without_times(whole.records())


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_share_a_run(checkpoint, questions, tmp_path, world):
    settings = settings_of(checkpoint, questions, modes=BOTH)
    evaluate_elsewhere(settings, tmp_path / "one")
    evaluate_elsewhere(settings, tmp_path / "many", world)
    one, many = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "many")
    assert without_times(many.records()) == without_times(one.records())
    lines = [len(path.read_text().splitlines()) for path in (many.path / "records").glob("*.jsonl")]
    assert len(lines) == world
    assert max(lines) - min(lines) <= 2


def test_a_run_goes_on_with_another_number_of_processes(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    run(whole.settings(), folder.path, show=False, rank=Rank(1, 3))
    assert 0 < len(folder.records()) < len(whole.records())
    run(whole.settings(), folder.path, show=False)
    assert without_times(folder.records()) == without_times(whole.records())


def test_an_interrupted_batch_is_kept_for_readers_and_generated_again(whole, tmp_path, monkeypatch):
    settings = replace(whole.settings(), modes=("parallel",), budgets=(None,))
    plain = Answerer.generate

    def interrupted(self, *arguments, **options):
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Stop(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                if input_ids.shape[1] > 20:
                    raise KeyboardInterrupt
                return torch.zeros(len(input_ids), dtype=torch.bool)

        model = self.model.generate
        self.model.generate = lambda *given, **more: model(
            *given, **more, stopping_criteria=StoppingCriteriaList([Stop()])
        )
        try:
            return plain(self, *arguments, **options)
        finally:
            del self.model.generate

    with monkeypatch.context() as patch:
        patch.setattr(Answerer, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "run", show=False)
    folder = RunFolder(tmp_path / "run")
    partial = [json.loads(line) for line in (folder.path / "partial" / "rank-0000.jsonl").read_text().splitlines()]
    assert {record["finish_reason"] for record in partial} >= {"interrupted"}
    assert all(record["text"] and not record["right"] for record in partial if record["finish_reason"] != "eos")
    assert folder.records() == []
    run(settings, folder.path, show=False)
    wanted = [record for record in whole.records() if (record["mode"], record["budget"]) == ("parallel", None)]
    assert without_times(folder.records()) == without_times(wanted)


def test_sampled_answers_depend_on_the_seed_alone(checkpoint, questions, tmp_path):
    sampled = {"do_sample": True, "samples": 2, "temperature": 1.0, "top_p": 1.0, "limit": 4}
    runs = [
        run(settings_of(checkpoint, questions, **sampled, **more), tmp_path / str(number), show=False).records()
        for number, more in enumerate(({}, {"batch_size": 3}, {"seed": 1}))
    ]
    texts = [[record["text"] for record in records] for records in runs]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len({record["seed"] for record in runs[0]}) == 8
    assert any(one != other for one, other in zip(texts[0][::2], texts[0][1::2], strict=True))
    assert [record["question_number"] for record in runs[1]] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_both_modes_draw_from_the_same_seeds(checkpoint, questions, tmp_path):
    settings = settings_of(checkpoint, questions, modes=BOTH, do_sample=True, samples=4, temperature=1.0, limit=4)
    records = run(settings, tmp_path / "run", show=False).records()
    ended = {
        (each["question"], each["sample"], each["mode"]): each for each in records if each["finish_reason"] == "eos"
    }
    pairs = [(ended[place, number, mode], ended.get((place, number, "sequential"))) for place, number, mode in ended]
    assert len(pairs) > 2
    assert all(one["text"] == other["text"] for one, other in pairs)


def test_a_plain_model_is_evaluated_by_transformers_own_decoding(tmp_path, questions):
    plain = write_checkpoint(tmp_path / "plain", plain=True)
    settings = settings_of(plain, questions, modes=("sequential",), budgets=(None, 8), limit=5)
    records = run(settings, tmp_path / "run", show=False).records()
    schema = json.loads(RECORD_SCHEMA.read_text())
    for record in records:
        jsonschema.validate(record, schema)
        assert record["generated_tokens"] == record["sequential_steps"] <= (record["budget"] or LONGEST)
        assert (record["blocks"], record["degree_of_parallelism"]) == (0, 1.0)
        assert record["tokens_by_stage"]["sequential"] == record["generated_tokens"]
    reasons = {(record["budget"], record["finish_reason"]) for record in records}
    assert {(None, "eos"), (8, "max_sequential_steps")} <= reasons
    with pytest.raises(ValueError, match=r"`modes` holds 'parallel'.*knows no tags"):
        run(replace(settings, modes=("parallel",)), tmp_path / "other", show=False)


def test_a_folder_with_something_else_is_refused(whole, checkpoint, questions, tmp_path):
    with pytest.raises(ValueError, match=r"`folder`.*max_new_tokens was 100 and is 50"):
        run(replace(whole.settings(), max_new_tokens=50), whole.path, show=False)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"`folder`.*notes\.txt and no run"):
        run(whole.settings(), tmp_path, show=False)
    with pytest.raises(ValueError, match=r"`folder`.*holds no evaluation"):
        RunFolder(tmp_path).settings()


def test_a_run_notices_that_questions_or_weights_have_changed(checkpoint, questions, tmp_path):
    own = tmp_path / "questions.jsonl"
    own.write_text(questions.read_text())
    model = write_checkpoint(tmp_path / "model")
    settings = settings_of(model, own, limit=4)
    run(settings, tmp_path / "run", show=False, rank=Rank(0, 2))
    changed = MultiverseForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    changed.save_pretrained(model)
    with pytest.raises(ValueError, match=r"checkpoint\.json says something else"):
        run(settings, tmp_path / "run", show=False)
    own.write_text(questions.read_text().replace("a b", "b a"))
    with pytest.raises(ValueError, match=r"tasks\.json says something else"):
        run(settings, tmp_path / "run", show=False)


def test_nobody_else_writes_to_the_same_file(whole):
    with (
        whole.writer("records"),
        pytest.raises(ValueError, match="another process writes"),
        RunFolder(whole.path).writer("records"),
    ):
        pass


def test_timed_calls_are_made_in_turns_and_taken_up_again(checkpoint, questions, tmp_path):
    settings = settings_of(checkpoint, questions, modes=BOTH, limit=2, batch_sizes=(1, 3), lengths=(20, 40), repeats=2)
    folder = run(settings, tmp_path / "run", show=False)
    cases = [(each["batch_size"], each["length"], each["repeat"], each["mode"]) for each in folder.speed()]
    assert cases == [
        (size, length, repeat, mode)
        for size in (1, 3)
        for length in (20, 40)
        for repeat, order in ((0, BOTH), (1, BOTH[::-1]))
        for mode in order
    ]
    assert all(each["seconds"] > each["prefill_seconds"] > 0 for each in folder.speed())
    assert all(each["generated_tokens"] <= each["batch_size"] * each["length"] for each in folder.speed())
    path = folder.path / "speed" / "rank-0000.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    run(settings, folder.path, show=False)
    again = [(each["batch_size"], each["length"], each["repeat"], each["mode"]) for each in folder.speed()]
    assert again == cases
    assert sum(folder.missing() for _ in range(1)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": (0,)}, r"`budgets` must be positive, got 0"),
        ({"prompts": ("both",)}, r"`prompts` may hold"),
        ({"modes": ()}, r"`modes` is empty"),
        ({"samples": 4}, r"`samples` is 4, but greedy"),
        ({"dtype": "float7"}, r"`dtype`.*'float7'"),
        ({"temperature": 0.0, "do_sample": True}, r"`temperature` must be above 0"),
        ({"top_p": 1.5}, r"`top_p`"),
        ({"batch_sizes": (2, 2)}, r"`batch_sizes` names something twice"),
        ({"instructions": {"other": "x"}}, r"`instructions` are for"),
    ],
)
def test_settings_that_cannot_be_run_are_named(checkpoint, questions, options, message):
    with pytest.raises(ValueError, match=message):
        settings_of(checkpoint, questions, **options)


def test_settings_survive_a_file(whole):
    assert type(whole.settings()).from_dict(json.loads(json.dumps(whole.settings().to_dict()))) == whole.settings()
    assert whole.settings().conditions()[1] == Condition("own", "parallel", "parallel", 12)
