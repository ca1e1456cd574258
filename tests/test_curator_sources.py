"""Chains of thought come out of any source of rows as they went in."""

import csv
import datetime
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from multiverse.curator.records import Chain
from multiverse.curator.sources import ColumnMap, EmptyRow, open_rows, read_chains

#: The columns of s1K-1.1, by its card on the Hub.
S1K = (
    "solution", "question", "cot_type", "source_type", "metadata", "gemini_thinking_trajectory", "gemini_attempt",
    "deepseek_thinking_trajectory", "deepseek_attempt", "gemini_grade", "gemini_grade_reason", "deepseek_grade",
    "deepseek_grade_reason",
)  # fmt: skip
ROWS = [{name: f"{name} {number}, été\nand 'more', \"too\"" for name in S1K} for number in range(3)]


def plain(count: int = 3, **columns) -> list[dict]:
    """Rows with columns of other names."""
    return [{"q": f"question {n}", "t": f"thought {n}", "a": f"reply {n}", **columns} for n in range(count)]


PLAIN = ColumnMap("q", "t", "a", answer=None)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same rows in every kind of source."""
    found = {kind: tmp_path / f"rows.{kind}" for kind in ("parquet", "jsonl", "json", "csv")}
    Dataset.from_list(ROWS).to_parquet(found["parquet"])
    found["jsonl"].write_text("\n\n".join(map(json.dumps, ROWS)) + "\n", encoding="utf-8")
    found["json"].write_text(json.dumps(ROWS), encoding="utf-8")
    with found["csv"].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, S1K)
        writer.writeheader()
        writer.writerows(ROWS)
    found["saved"] = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(found["saved"])
    found["folder"] = tmp_path / "repository"
    (found["folder"] / "data").mkdir(parents=True)
    Dataset.from_list(ROWS).to_parquet(found["folder"] / "data" / "train-00000-of-00001.parquet")
    return found


def test_every_kind_of_source_gives_the_same_chains_in_the_columns_of_s1k(files):
    sources = {
        **files,
        "text": str(files["jsonl"]),
        "dataset": Dataset.from_list(ROWS),
        "dictionary": DatasetDict({"train": Dataset.from_list(ROWS)}),
        "stream": IterableDataset.from_generator(lambda: iter(ROWS)),
    }
    expected = None
    for kind, source in sources.items():
        chains = list(read_chains(source))
        expected = expected or chains
        assert chains == expected, kind
    own = [name for name in S1K if name not in ("question", "deepseek_thinking_trajectory", "deepseek_attempt")]
    for chain, row in zip(expected, ROWS, strict=True):
        assert (chain.question, chain.trajectory) == (row["question"], row["deepseek_thinking_trajectory"])
        assert (chain.attempt, chain.answer) == (row["deepseek_attempt"], row["solution"])
        assert chain.columns == {name: row[name] for name in own if name != "solution"}


def test_files_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in plain()) + "this is no JSON\n")
    chains = read_chains(path, PLAIN)
    assert [next(chains).question for _ in range(3)] == ["question 0", "question 1", "question 2"]
    with pytest.raises(ValueError, match=r"rows\.jsonl does not hold rows in JSON \(entry 4\)"):
        next(chains)
    assert len(list(read_chains(path, PLAIN, limit=3))) == 3


def test_ids_depend_on_row_and_text_and_on_nothing_else(files):
    ids = [chain.id for chain in read_chains(files["jsonl"])]
    assert len(set(ids)) == 3
    assert [own[:7] for own in ids] == ["000000-", "000001-", "000002-"]
    assert [chain.id for chain in read_chains(files["parquet"], limit=2)] == ids[:2]
    for column in ("question", "deepseek_thinking_trajectory", "deepseek_attempt"):
        changed = [{**ROWS[0], column: "other"}, *ROWS[1:]]
        others = [chain.id for chain in read_chains(Dataset.from_list(changed))]
        assert others[0] != ids[0]
        assert others[1:] == ids[1:]
    # Text that moves from one column to the next is other text.
    moved = [{**ROWS[0], "question": ROWS[0]["question"] + "x"}]
    moved[0]["deepseek_thinking_trajectory"] = moved[0]["deepseek_thinking_trajectory"][1:]
    assert next(read_chains(Dataset.from_list(moved))).id != ids[0]
    relabelled = [{**row, "gemini_grade": "new", "solution": "new"} for row in ROWS]
    assert [chain.id for chain in read_chains(Dataset.from_list(relabelled))] == ids


def test_ids_are_the_same_in_another_process(files):
    program = (
        "import sys\nfrom multiverse.curator.sources import read_chains\n"
        "print([chain.id for chain in read_chains(sys.argv[1])])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(files["jsonl"])], capture_output=True, text=True)
    assert done.stdout.strip() == str([chain.id for chain in read_chains(files["jsonl"])]), done.stderr


def test_a_column_of_ids_is_taken_and_must_tell_rows_apart():
    columns = ColumnMap("q", "t", "a", answer=None, id="n")
    rows = [{**row, "n": number} for number, row in enumerate(plain())]
    chains = list(read_chains(Dataset.from_list(rows), columns))
    assert [chain.id for chain in chains] == ["0", "1", "2"]
    assert all(chain.columns == {} for chain in chains)
    with pytest.raises(ValueError, match=r"rows 0 and 1 of `source` have the same id '7' in column 'n'"):
        list(read_chains(Dataset.from_list(plain(n=7)), columns))
    with pytest.raises(ValueError, match="row 0 of `source` has no id in column 'n'"):
        list(read_chains(Dataset.from_list(plain(n=" ")), columns))


def test_missing_columns_are_refused_at_once_and_those_that_exist_are_named(files):
    with pytest.raises(ValueError, match=r"trajectory='thought'.*'deepseek_thinking_trajectory'"):
        read_chains(files["csv"], ColumnMap(trajectory="thought"))
    with pytest.raises(ValueError, match=r"question='question', trajectory=.*It has \['q', 't', 'a'\]"):
        read_chains(Dataset.from_list(plain()))
    with pytest.raises(ValueError, match=r"for answer='solution'.*`answer` and `id` may be None"):
        read_chains(Dataset.from_list(plain()), ColumnMap("q", "t", "a"))


@pytest.mark.parametrize("nothing", [None, "", " \n\t"])
@pytest.mark.parametrize("column", ["q", "t", "a"])
def test_empty_rows_are_skipped_and_reported_or_refused(column, nothing, caplog):
    rows = plain()
    rows[1][column] = nothing
    chains = read_chains(Dataset.from_list(rows), PLAIN)
    with caplog.at_level(logging.WARNING):
        assert [chain.question for chain in chains] == ["question 0", "question 2"]
    assert chains.skipped == [EmptyRow(1, (column,))]
    assert f"1 empty rows skipped: row 1 ({column})" in caplog.text
    whole = [chain.id for chain in read_chains(Dataset.from_list(plain()), PLAIN)]
    assert [chain.id for chain in read_chains(Dataset.from_list(rows), PLAIN)] == [whole[0], whole[2]]
    refused = read_chains(Dataset.from_list(rows), PLAIN, empty="raise")
    assert next(refused).question == "question 0"
    with pytest.raises(ValueError, match=rf"row 1 of `source` has no text in {column}"):
        next(refused)


def test_the_limit_counts_chains_not_rows():
    rows = plain(5)
    rows[0]["t"] = ""
    assert [chain.question[-1] for chain in read_chains(Dataset.from_list(rows), PLAIN, limit=2)] == ["1", "2"]
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"`limit` is {limit}"):
            read_chains(Dataset.from_list(rows), PLAIN, limit=limit)


def test_answers_stay_what_they_are_in_every_file(tmp_path):
    columns = ColumnMap("q", "t", "a", answer="s")
    answers = ["007", "NA", "1.50", "x", " 3 ", ""]
    (tmp_path / "rows.csv").write_text("q,t,a,s\n" + "".join(f"q,t,a,{each}\n" for each in answers))
    read = [chain.answer for chain in read_chains(tmp_path / "rows.csv", columns)]
    assert read == ["007", "NA", "1.50", "x", "3", None]
    mixed = [3, "x", 2.5, None, "007"]
    lines = (json.dumps({**row, "s": each}) for row, each in zip(plain(5), mixed, strict=True))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    read = [chain.answer for chain in read_chains(tmp_path / "rows.jsonl", columns)]
    assert read == ["3", "x", "2.5", None, "007"]


def test_other_columns_go_to_json_and_back_or_are_left_out_with_a_word(caplog):
    rows = plain(2, day=datetime.date(2025, 1, 31), tags=["a", {"b": 1}], score=0.5, none=None, raw=b"\xff")

    def stream():
        yield from rows

    with caplog.at_level(logging.WARNING):
        chains = list(read_chains(IterableDataset.from_generator(stream), PLAIN))
    expected = {"day": "2025-01-31", "tags": ["a", {"b": 1}], "score": 0.5, "none": None}
    assert [chain.columns for chain in chains] == [expected, expected]
    assert json.loads(json.dumps(chains[0].columns)) == expected
    assert caplog.text.count("'raw' holds bytes and is left out") == 1


def test_splits_are_chosen_by_name():
    splits = DatasetDict({"train": Dataset.from_list(plain(1)), "test": Dataset.from_list(plain(2))})
    assert len(list(read_chains(splits, PLAIN, split="test"))) == 2
    with pytest.raises(ValueError, match=r"`split` is 'dev', but `source` has \['test', 'train'\]"):
        read_chains(splits, PLAIN, split="dev")


def test_sources_that_cannot_be_read_are_refused_by_name(tmp_path):
    for name, content in (("a.json", '{"q": '), ("a.jsonl", '["q"]\n'), ("a.parquet", "no parquet"), ("a.csv", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"`source`: .*{name}"):
            read_chains(tmp_path / name, PLAIN)
    with pytest.raises(ValueError, match=r"the file .*missing\.jsonl does not exist"):
        read_chains(tmp_path / "missing.jsonl", PLAIN)
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(ValueError, match="none of the endings"):
        open_rows(tmp_path / "a.md")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"`source`: .*nothing"):
        read_chains(tmp_path / "nothing", PLAIN)
    with pytest.raises(ValueError, match="`source`: `source` has no rows"):
        read_chains(Dataset.from_list([]), PLAIN)
    with pytest.raises(ValueError, match="`empty` must be"):
        read_chains(Dataset.from_list(plain()), PLAIN, empty="keep")
    with pytest.raises(ValueError, match="trajectory='t' holds list in row 0"):
        list(read_chains(Dataset.from_list(plain(t=["thought"])), PLAIN))


def test_a_repository_of_the_hub_is_streamed_in_the_split_that_was_asked_for(monkeypatch):
    from multiverse.curator import sources

    asked = []

    def load(name, **options):
        asked.append((name, options))
        return IterableDataset.from_generator(lambda: iter(plain()))

    monkeypatch.setattr(sources, "load_dataset", load)
    monkeypatch.setattr(sources, "get_dataset_split_names", lambda name: ["train", "validation"])
    (chain,) = read_chains("me/chains", PLAIN, 1, "validation")
    assert asked == [("me/chains", {"split": "validation", "streaming": True})]
    assert chain == Chain(chain.id, "question 0", "thought 0", "reply 0")
    with pytest.raises(ValueError, match=r"`split` is 'test', but me/chains has \['train', 'validation'\]"):
        read_chains("me/chains", PLAIN, split="test")

    def unreachable(name):
        raise ConnectionError("no way to the Hub")

    monkeypatch.setattr(sources, "get_dataset_split_names", unreachable)
    with pytest.raises(ValueError, match=r"me/chains is no file, no folder and no dataset.*no way to the Hub"):
        read_chains("me/chains", PLAIN)
