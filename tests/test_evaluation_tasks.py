"""Tasks hold the questions that were asked for, in a fixed order, whatever they are read from."""

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetBuilder, DatasetDict
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from multiverse.evaluation import task_sources
from multiverse.evaluation.task_rows import LETTERS, Question, TaskData
from multiverse.evaluation.tasks import TASKS, Task, load_task
from multiverse.trainer.expression_trees import FAMILIES
from multiverse.trainer.synthetic import train_and_test

#: Rows in the columns that the benchmarks have on the Hub, with questions of our own.
AIME = [
    {
        "id": 60 + n,
        "problem": f"Find {n}+70.\n",
        "solution": "...",
        "answer": f"{n + 70:03d}",
        "url": "",
        "year": "2024",
    }
    for n in range(5)
]
MATH = [
    {
        "problem": f"What is ${n}/2$?",
        "solution": rf"It is $\boxed{{\frac{{{n}}}{{2}}}}$.",
        "answer": rf"\frac{{{n}}}{{2}}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": f"test/algebra/{n}.json",
    }
    for n in range(5)
]
GPQA = [
    {
        "Record ID": f"rec{n}",
        "Question": f"Which word is number {n}?\n",
        "Correct Answer": f"right {n}\n",
        "Incorrect Answer 1": f"wrong {n}a",
        "Incorrect Answer 2": f" wrong {n}b",
        "Incorrect Answer 3": f"wrong {n}c",
        "Subdomain": "Words",
    }
    for n in range(40)
]
BENCHMARKS = {"aime24": AIME, "aime25": AIME, "math500": MATH, "gpqa_diamond": GPQA}
WRONG = [f"Incorrect Answer {n}" for n in (1, 2, 3)]


def rows(count: int = 4, **columns) -> list[dict]:
    return [{"question": f"What is {n}+1?", "answer": n + 1, **columns} for n in range(count)]


def write(path: Path, content: list[dict]) -> Path:
    """The rows as a file of the kind that its name ends in."""
    if path.suffix == ".parquet":
        Dataset.from_list(content).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, content[0])
            writer.writeheader()
            writer.writerows(content)
    else:
        text = "".join(json.dumps(row) + "\n" for row in content) if path.suffix == ".jsonl" else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> list[tuple]:
    """What is asked of a Hub that has the benchmarks, each in the one split and subset that it has there."""
    asked: list[tuple] = []
    for name, content in BENCHMARKS.items():
        data = TASKS[name].data
        folder = tmp_path / "hub" / data.path
        folder.mkdir(parents=True)
        write(folder / "rows.parquet", content)
        files = {
            "config_name": data.config or "default",
            "data_files": [{"split": data.split or "test", "path": "rows.parquet"}],
        }
        (folder / "README.md").write_text(f"---\n{json.dumps({'configs': [files]})}\n---\n")

    def load_dataset_builder(path: str, name: str | None = None, revision: str | None = None) -> DatasetBuilder:
        folder = tmp_path / "hub" / path
        if not folder.is_dir():
            raise DatasetNotFoundError(f"Dataset '{path}' is a gated dataset on the Hub.")
        asked.append((path, name, revision))
        builder = datasets.load_dataset_builder(str(folder), name, cache_dir=str(tmp_path / "cache"))
        builder.hash = revision or "c0ffee"  # of the commit, if it is from the Hub
        return builder

    monkeypatch.setattr(task_sources, "load_dataset_builder", load_dataset_builder)
    return asked


def test_benchmarks_are_asked_for_by_their_usual_ids(hub):
    for name, (path, config, split) in {
        "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
        "aime25": ("yentinglin/aime_2025", "default", "train"),
        "math500": ("HuggingFaceH4/MATH-500", None, "test"),
        "gpqa_diamond": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    }.items():
        task = load_task(name)
        assert hub.pop() == (path, config, None)
        assert len(task.questions) == len(BENCHMARKS[name])
        parts = [path, *([config] if config else []), f"split {split}", "revision c0ffee"]
        parts += ["options ordered by seed 1"] if name == "gpqa_diamond" else []
        assert task.source == ", ".join(parts)
        assert task.samples == (8 if name.startswith("aime") else 1)


def test_another_revision_or_copy_may_be_asked_for(hub, monkeypatch):
    assert "revision abc" in load_task("gpqa_diamond", TaskData(revision="abc")).source
    assert hub.pop() == ("Idavidrein/gpqa", "gpqa_diamond", "abc")
    monkeypatch.setitem(TASKS, "aime25", replace(TASKS["aime25"], data=replace(TASKS["aime25"].data, revision="old")))
    load_task("aime25", TaskData("HuggingFaceH4/aime_2024"))
    assert hub.pop() == ("HuggingFaceH4/aime_2024", None, None), "subset and revision are another dataset's"
    load_task("own", TaskData("HuggingFaceH4/MATH-500", question="problem", config="default"))
    assert hub.pop() == ("HuggingFaceH4/MATH-500", "default", None)
    for wrong in ({"split": "train"}, {"config": "main"}):
        with pytest.raises(
            ValueError, match=rf"`path`: HuggingFaceH4/MATH-500.*cannot be loaded.*{next(iter(wrong.values()))}"
        ):
            load_task("math500", TaskData(**wrong))


def test_a_dataset_that_cannot_be_loaded_comes_with_a_way_out(hub, monkeypatch):
    with pytest.raises(ValueError) as refusal:
        load_task("own", TaskData("some/private", config="main"))
    for part in ("`path`: some/private (main), split 'test'", "is a gated dataset on the Hub. If", "hf auth login"):
        assert part in str(refusal.value)
    assert "https://huggingface.co/datasets/some/private" in str(refusal.value)
    assert ".jsonl" in str(refusal.value)
    for error in (ConnectionError, DatasetGenerationError):

        def fail(*place, error=error, **options):
            raise error("Couldn't reach it")

        monkeypatch.setattr(task_sources, "load_dataset_builder", fail)
        with pytest.raises(
            ValueError, match=r"`path`: Idavidrein/gpqa \(gpqa_diamond\).*Couldn't reach it.*pass a file"
        ):
            load_task("gpqa_diamond")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_files_with_the_columns_of_the_hub_give_the_same_questions(name, tmp_path, hub):
    on_the_hub = load_task(name)
    for kind in ("jsonl", "json", "parquet", "csv"):
        path = write(tmp_path / f"{name}.{kind}", BENCHMARKS[name])
        task = load_task(name, TaskData(str(path)))
        assert task.questions == on_the_hub.questions, kind
        assert task.sha256 == on_the_hub.sha256
        assert task.samples == on_the_hub.samples
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert task.source.startswith(f"{name}.{kind}, sha256 {digest}")
        assert str(tmp_path) not in task.source
    assert len(hub) == 1


def test_benchmark_questions_are_what_their_rows_say(hub):
    aime, math = load_task("aime24").questions, load_task("math500").questions
    assert aime[3] == Question("aime24-0003", "Find 3+70.", "73", "math")
    assert math[3] == Question("test/algebra/3.json", "What is $3/2$?", r"\frac{3}{2}", "math")
    for row, question in zip(GPQA, load_task("gpqa_diamond").questions, strict=True):
        assert (question.id, question.text, question.kind) == (row["Record ID"], row["Question"].strip(), "choice")
        assert sorted(question.choices) == sorted(row[name].strip() for name in ("Correct Answer", *WRONG))
        assert question.choices[LETTERS.index(question.expected)] == row["Correct Answer"].strip()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("073", "73"),
        ("000", "0"),
        ("7", "7"),
        (7, "7"),
        (73.0, "73"),
        (r"$336^\circ$", "336"),
        (r"336^{\circ}", "336"),
    ],
)
def test_answers_of_aime_are_whole_numbers(written, expected, tmp_path):
    path = write(tmp_path / "aime.jsonl", [{"problem": "?", "answer": written}])
    assert load_task("aime25", TaskData(path)).questions[0].expected == expected


@pytest.mark.parametrize("written", ["x", "7.5", "1/2", "12 or 13", "-", "7 8"])
def test_an_answer_that_is_no_whole_number_is_refused(written, tmp_path):
    path = write(tmp_path / "aime.jsonl", [{"problem": "?", "answer": written}])
    with pytest.raises(ValueError, match=r"`answer_format` is 'integer' .*, but row 0 of .*aime\.jsonl has"):
        load_task("aime25", TaskData(path))


def test_options_are_shuffled_by_question_and_seed_and_by_neither_limit_nor_order(tmp_path):
    path = write(tmp_path / "gpqa.jsonl", GPQA)
    whole = load_task("gpqa_diamond", TaskData(path)).questions
    assert load_task("gpqa_diamond", TaskData(path), limit=7).questions == whole[:7]
    assert load_task("gpqa_diamond", TaskData(path), limit=1000).questions == whole
    backwards = load_task("gpqa_diamond", TaskData(write(tmp_path / "backwards.jsonl", GPQA[::-1]))).questions
    assert backwards[::-1] == whole
    assert load_task("gpqa_diamond", TaskData(path), seed=2).questions != whole
    assert {question.expected for question in whole} == set("ABCD")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_the_problems_that_the_experiments_hold_out(family):
    _, held_out = train_and_test(0, 200, 1, test_options=FAMILIES[family]())
    task = load_task(family)
    assert [question.text for question in task.questions] == [problem.question for problem in held_out]
    assert [question.expected for question in task.questions] == [str(problem.answer) for problem in held_out]
    assert {question.kind for question in task.questions} == {"number"}
    assert task.questions[7].id == f"{family}-0007"
    assert load_task(family, limit=50).questions == task.questions[:50]
    assert load_task(family, limit=250).questions[:200] == task.questions
    assert load_task(family, seed=2).sha256 != task.sha256
    assert task.source == f"problems of the family {family}, drawn with seed 1"
    with pytest.raises(ValueError, match="`data`: the problems of"):
        load_task(family, TaskData("problems.jsonl"))


def test_a_folder_of_several_splits_is_read_and_named_by_its_content(tmp_path):
    def saved(name: str, count: int) -> TaskData:
        parts = {"train": Dataset.from_list(rows(9)), "test": Dataset.from_list(rows(count))}
        DatasetDict(parts).save_to_disk(tmp_path / name)
        return TaskData(tmp_path / name)

    task = load_task("own", saved("data", 4))
    assert len(task.questions) == 4
    assert task.source.startswith("data, sha256 ")
    assert task.source.endswith(", split test")
    assert load_task("own", saved("data", 5)).source != task.source
    assert len(load_task("own", TaskData(tmp_path / "data", split="train")).questions) == 9
    with pytest.raises(ValueError, match=r"`split` is 'validation', but .* has \['test', 'train'\]"):
        load_task("own", TaskData(tmp_path / "data", split="validation"))


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`name`: there is no task 'aime26'\. There are aime24, .*pass `data`"):
        load_task("aime26")
    with pytest.raises(ValueError, match="`path` is missing"):
        load_task("own", TaskData())
    with pytest.raises(ValueError, match=r"`path`: the file .*nowhere\.jsonl does not exist"):
        load_task("own", TaskData(tmp_path / "nowhere.jsonl"))
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"`limit` is {limit}"):
            load_task("sums", limit=limit)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(rows(1)[0]) + "\nno JSON\n")
    with pytest.raises(ValueError, match=r"`path`: .*broken\.jsonl does not hold rows in JSON \(entry 2\)"):
        load_task("own", TaskData(broken))


def test_the_hash_covers_everything_that_a_question_consists_of():
    first = Question("a", "text", "B", "choice", ("one", "two"))
    second = Question("b", "other", "3", "math")
    task = Task("own", (first, second), "here")
    changed = [
        replace(first, id="c"),
        replace(first, text="changed"),
        replace(first, expected="A"),
        replace(first, choices=("two", "one")),
        replace(first, choices=("one two",)),
        replace(first, kind="math"),
    ]
    hashes = {replace(task, questions=(each, second)).sha256 for each in changed}
    assert len(hashes | {task.sha256, replace(task, questions=(second, first)).sha256}) == len(changed) + 2
    assert replace(task, name="other", source="elsewhere", samples=8).sha256 == task.sha256
    assert task.sha256 == "8913578e9f6ee33b30033a1fced544a0365b67d2317463ed863393efd6b06bcd", "as runs keep it"
