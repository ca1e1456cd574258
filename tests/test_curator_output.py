"""What the curator writes: a dataset that others load and train on, its card, and the rejects with their story."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from multiverse.curator.dataset_card import DatasetFacts
from multiverse.curator.output import DATA_FILE, FinishedRecord, make_dataset, write_output
from multiverse.curator.records import Draft
from multiverse.trainer.formatting import format_dataset
from one_record import DRAFT, PARALLEL, PROVENANCE, TRAJECTORY, TWIN, chain, finished, rejected
from tiny import tiny_tokenizer

FACTS = DatasetFacts(
    name="me/chains",
    license="apache-2.0",
    sources=("simplescaling/s1K-1.1",),
    language=("en",),
    limits="Short ones only.",
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_loads_as_a_dataset_with_the_columns_of_multiverse_1k(tmp_path):
    write_output(tmp_path, [finished(cot_type="math", grade=1)], [rejected()], FACTS)
    splits = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert list(splits) == ["train"]
    (row,) = splits["train"]
    provenance = json.loads(row.pop("provenance"))
    assert provenance == PROVENANCE
    assert row == {
        "id": "000000-a",
        "question": "What is 1 + 2 and 4 + 5 together?",
        "deepseek_thinking_trajectory_parallel": PARALLEL,
        "deepseek_thinking_trajectory": TRAJECTORY,
        "deepseek_thinking_trajectory_sequential": TWIN,
        "deepseek_attempt": "It is 12.",
        "solution": "12",
        "cot_type": "math",
        "grade": 1,
    }


def test_the_trainer_formats_both_forms_and_finds_nothing_malformed():
    from multiverse import TAGS

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(TAGS))
    dataset = make_dataset([finished()])
    for form, thought in (("parallel", PARALLEL), ("sequential", TRAJECTORY)):
        rows, report = format_dataset(dataset, tokenizer, form)
        assert not report.malformed
        assert rows[0]["completion"][0]["content"] == f"<Think>\n{thought}\n</Think>\n\nIt is 12."


def test_the_same_records_make_the_same_bytes_in_any_order_and_in_another_process(tmp_path):
    records = [finished(f"00000{number}-a", note=number) for number in range(4)]
    rejects = [rejected("000007-b"), rejected("000008-b")]
    write_output(tmp_path / "one" / "same", records, rejects, FACTS)
    write_output(tmp_path / "two" / "same", reversed(records), rejects[::-1], FACTS)
    program = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nfrom one_record import finished, rejected\n"
        "from multiverse.curator.output import write_output\n"
        "from multiverse.curator.dataset_card import DatasetFacts\n"
        "records = [finished(f'00000{number}-a', note=number) for number in range(4)]\n"
        f"facts = {FACTS!r}\n"
        "write_output(sys.argv[2], records, [rejected('000007-b'), rejected('000008-b')], facts)\n"
    )
    arguments = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "three" / "same")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two, three = (contents(tmp_path / name / "same") for name in ("one", "two", "three"))
    assert set(one) == {
        DATA_FILE, "README.md", "statistics.json", "statistics.svg", "rejects.jsonl", "drafts.jsonl"
    }  # fmt: skip
    assert one == two == three
    changed = [finished("000000-a", note=9), *records[1:]]
    write_output(tmp_path / "four" / "same", changed, rejects, FACTS)
    assert contents(tmp_path / "four" / "same")[DATA_FILE] != one[DATA_FILE]


def test_rejects_tell_the_whole_story_and_give_the_draft_back(tmp_path):
    record = rejected()
    write_output(tmp_path, [], [record], FACTS)
    (line,) = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()
    entry = json.loads(line)
    assert Draft.from_dict(entry.pop("draft")) == record.draft
    assert entry == {
        "id": "000001-b",
        "stage": "refill",
        "reason": "sentence 2 comes twice",
        "question": record.chain.question,
        "trajectory": TRAJECTORY,
        "attempt": "It is 12.",
        "answer": "12",
        "columns": {},
        "story": [dict(each) for each in record.story],
        "parallel": None,
    }


def test_drafts_of_finished_records_lie_beside_the_data(tmp_path):
    write_output(tmp_path, [finished("b"), finished("a", draft=None)], facts=FACTS)
    (line,) = (tmp_path / "drafts.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["id"] == "b"
    assert Draft.from_dict(entry["draft"]) == DRAFT


def test_an_export_replaces_an_earlier_one_and_leaves_nothing_of_it(tmp_path):
    write_output(tmp_path, [finished("a"), finished("b")], [rejected()], FACTS)
    write_output(tmp_path, [finished("c", draft=None)], facts=FACTS)
    assert set(contents(tmp_path)) == {DATA_FILE, "README.md", "statistics.json", "statistics.svg"}
    assert [row["id"] for row in load_dataset(str(tmp_path), split="train", streaming=True)] == ["c"]


def test_columns_of_the_source_keep_their_types_and_clashing_names_are_told_apart():
    records = [
        finished("a", score=1, flag=True, tags=["x"], mixed=1, empty={}, void=None, question="other", id="own"),
        finished("b", score=0.5, flag=False, tags=[], mixed="one", empty={}, void=None, question="more", id="own"),
        finished("c"),
    ]
    dataset = make_dataset(records)
    assert dataset["score"][:] == [1.0, 0.5, None]
    assert dataset["flag"][:] == [True, False, None]
    assert dataset["tags"][:] == [["x"], [], None]
    assert dataset["mixed"][:] == ["1", '"one"', None]
    assert dataset["empty"][:] == ["{}", "{}", None]
    assert dataset["void"][:] == [None] * 3
    assert dataset["source_question"][:] == ["other", "more", None]
    assert dataset["source_id"][:] == ["own", "own", None]
    assert dataset["id"][:] == ["a", "b", "c"]
    assert dataset.column_names[-1] == "provenance"


def test_text_that_no_file_can_hold_is_mended(tmp_path):
    broken = FinishedRecord(chain("a"), PARALLEL.replace("12", "\ud83d"), TWIN, {"note": "\udc00"})
    write_output(tmp_path, [broken], [rejected("\ud800")], FACTS)
    (row,) = load_dataset(str(tmp_path), split="train", streaming=True)
    assert row["deepseek_thinking_trajectory_parallel"] == PARALLEL.replace("12", "\ufffd")


def test_ids_that_come_twice_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="`finished` holds two records with the id 'a'"):
        write_output(tmp_path / "out", [finished("a"), finished("b"), finished("a")], facts=FACTS)
    with pytest.raises(ValueError, match="`rejected` holds 'a', which is among `finished`"):
        write_output(tmp_path / "out", [finished("a")], [rejected("a")], FACTS)
    with pytest.raises(ValueError, match="a holds no text"):
        write_output(tmp_path / "out", [FinishedRecord(chain("a"), " \n", TWIN)], facts=FACTS)
    assert not (tmp_path / "out").exists()


def test_the_card_has_valid_metadata_and_says_what_is_known(tmp_path):
    statistics = write_output(tmp_path, [finished("a"), finished("b")], [rejected()], FACTS)
    card = DatasetCard.load(tmp_path / "README.md")
    metadata = card.data.to_dict()
    assert metadata["license"] == "apache-2.0"
    assert metadata["size_categories"] == ["n<1K"]
    assert metadata["task_categories"] == ["text-generation"]
    assert metadata["source_datasets"] == ["simplescaling/s1K-1.1"]
    assert metadata["configs"][0]["data_files"] == [{"split": "train", "path": DATA_FILE}]
    assert "| rows | 2 |" in card.text
    assert "| of them collective | 2 |" in card.text
    assert f"| possible speed-up | {statistics.speed_up:.2f} |" in card.text
    assert "| steps | org/model-a | 1 | 1.00 | 1 |" in card.text
    assert "| refill | org/model-b | 2 | 3.00 | 3 |" in card.text
    assert card.text.index("| steps |") < card.text.index("| refill |")
    assert "- `distance`: 0.0625 on average, 0.0625 at most" in card.text
    assert "1 chains of 3 were" in card.text
    assert "1 at the stage refill." in card.text
    assert "Short ones only." in card.text
    assert (tmp_path / "statistics.svg").read_text().startswith("<?xml")
    assert json.loads((tmp_path / "statistics.json").read_text())["blocks"] == 2


def test_the_card_of_unknown_data_says_so_and_one_without_rows_has_no_picture(tmp_path):
    write_output(tmp_path / "own-data", [finished(provenance={})])
    card = DatasetCard.load(tmp_path / "own-data" / "README.md")
    assert "# own-data" in card.text
    assert "Not described by whoever made this dataset." in card.text
    assert "not stated by whoever made this dataset" in card.text
    assert card.data.license is None
    write_output(tmp_path / "none", [])
    card = DatasetCard.load(tmp_path / "none" / "README.md")
    assert "There are no rows." in card.text
    assert not (tmp_path / "none" / "statistics.svg").exists()


def test_the_hub_would_take_the_metadata(tmp_path, monkeypatch):
    """`DatasetCard.validate` sends the card to the Hub; what it would be sent is what YAML gives back."""
    sent = {}

    class Session:
        def post(self, url, json=None, **options):
            sent.update(json, url=url)
            return self

        def raise_for_status(self):
            pass

    write_output(tmp_path, [finished("a")], facts=FACTS)
    from huggingface_hub import repocard

    monkeypatch.setattr(repocard, "get_session", Session)
    monkeypatch.setattr(repocard, "hf_raise_for_status", lambda response: None, raising=False)
    card = DatasetCard.load(tmp_path / "README.md")
    card.validate()
    assert sent["repoType"] == "dataset"
    assert sent["content"] == str(card) == (tmp_path / "README.md").read_text()
