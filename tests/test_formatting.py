"""Rows for SFTTrainer from the paper's columns and from messages; what is malformed is named by row."""

import pytest
import strategies
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse import TAGS, BranchLayout, MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.format_report import FormatReport
from multiverse.trainer.formatting import TrajectoryColumns, format_dataset
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from rich.console import Console
from strategies import Sample, shuffled, trees
from tiny import tiny_config, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

TOKENIZER = tiny_tokenizer()
TOKENIZER.add_tokens(list(TAGS))

BLOCK = (
    "<Parallel>\n<Goal>\n<Outline>\n1: x\n</Outline>\n<Outline>\n2: y\n</Outline>\n</Goal>\n"
    "<Path>\n1: x=1\n</Path>\n<Path>\n2: y=2\n</Path>\n<Conclusion>\nx+y=3\n</Conclusion>\n</Parallel>"
)
PARALLEL, SEQUENTIAL = "Think step by step and in parallel.", "Think step by step."


def problem(**columns) -> dict:
    """A row in the columns of Multiverse-1K, some of them replaced."""
    return {
        "solution": "3",
        "question": "What is x+y?\n",
        "deepseek_thinking_trajectory": "x is 1.\ny is 2.",
        "deepseek_thinking_trajectory_parallel": f"<Think>\nLet me see.\n{BLOCK}\n</Think>",
        "deepseek_attempt": "It is 3.",
        **columns,
    }


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def user(content: str | None) -> dict[str, str | None]:
    return {"role": "user", "content": content}


def assistant(content: str | None) -> dict[str, str | None]:
    return {"role": "assistant", "content": content}


def found(report: FormatReport) -> list[tuple[int, str]]:
    return [(defect.row, defect.kind) for defect in report.malformed]


def test_the_papers_columns_become_a_prompt_and_a_completion_in_either_form():
    source = Dataset.from_list([problem(), problem(question="And y+x?")])
    parallel, report = format_dataset(source, TOKENIZER, "parallel")
    assert report.malformed == []
    assert report.summary() == "2 rows, none malformed"
    answer = f"<Think>\nLet me see.\n{BLOCK}\n</Think>\n\nIt is 3."
    assert list(parallel) == [
        {
            "prompt": [system(PARALLEL), user("What is x+y?")],
            "completion": [assistant(answer)],
            "form": "parallel",
            "pair": 0,
        },
        {
            "prompt": [system(PARALLEL), user("And y+x?")],
            "completion": [assistant(answer)],
            "form": "parallel",
            "pair": 1,
        },
    ]
    sequential, report = format_dataset(source, TOKENIZER, "sequential")
    assert report.malformed == []
    answer = "<Think>\nx is 1.\ny is 2.\n</Think>\n\nIt is 3."
    assert list(sequential) == [
        {
            "prompt": [system(SEQUENTIAL), user(question)],
            "completion": [assistant(answer)],
            "form": "sequential",
            "pair": pair,
        }
        for pair, question in enumerate(["What is x+y?", "And y+x?"])
    ]


def test_columns_may_have_other_names():
    columns = TrajectoryColumns(question="q", parallel="p", sequential="s", attempt="a")
    source = Dataset.from_list([{"q": "x?", "p": BLOCK, "s": "One.", "a": "1"}])
    rows = {
        form: format_dataset(source, TOKENIZER, form, columns=columns)[0][0] for form in ("parallel", "sequential")
    }
    assert rows["parallel"]["completion"] == [assistant(f"<Think>\n{BLOCK}\n</Think>\n\n1")]
    assert rows["sequential"]["completion"] == [assistant("<Think>\nOne.\n</Think>\n\n1")]


def test_messages_get_the_request_of_their_form_and_keep_everything_else():
    conversations = [
        [user("a?"), assistant(BLOCK)],
        [system("Be brief."), user("b?"), assistant("Two.")],
        [system(f"Be brief.\n{PARALLEL}"), user("c?"), assistant("Three.")],
        [user("d?"), assistant("Four."), user("e?"), assistant(f"So:\n{BLOCK}")],
        [user("f?"), assistant(BLOCK), user("g?"), assistant("In short, 3.")],
    ]
    source = Dataset.from_list([{"messages": each, "topic": f"t{i}"} for i, each in enumerate(conversations)])
    formatted, report = format_dataset(source, TOKENIZER)
    assert report.malformed == []
    assert formatted["prompt"] == [
        [system(PARALLEL), user("a?")],
        [system(f"Be brief.\n{SEQUENTIAL}"), user("b?")],
        [system(f"Be brief.\n{SEQUENTIAL}"), user("c?")],
        [system(PARALLEL), user("d?"), assistant("Four."), user("e?")],
        [system(SEQUENTIAL), user("f?"), assistant(BLOCK), user("g?")],
    ]
    assert formatted["completion"] == [each[-1:] for each in conversations]
    assert formatted["form"] == ["parallel", "sequential", "sequential", "parallel", "sequential"]
    assert formatted["pair"] == [0, 1, 2, 3, 4]
    assert formatted["topic"] == ["t0", "t1", "t2", "t3", "t4"]


def test_formatting_twice_changes_nothing():
    problems = generate_problems(3, seed=1, options=ProblemOptions(terms=(2, 3)))
    rows = [each.messages(form) for each in problems for form in ("parallel", "sequential")]
    source = Dataset.from_list(rows)
    once, _ = format_dataset(source, TOKENIZER)
    assert once.select_columns(["prompt", "completion"]).to_list() == rows
    twice, _ = format_dataset(once.select([4, 1]), TOKENIZER)
    assert twice.to_list() == once.select([4, 1]).to_list()


def test_a_column_says_the_form_of_each_row_and_is_checked():
    rows = [
        {"prompt": [user("a?")], "completion": [assistant(text)], "form": form}
        for text, form in [(BLOCK, "parallel"), ("One.", "parallel"), (BLOCK, "sequential"), ("One.", "both")]
    ]
    formatted, report = format_dataset(Dataset.from_list(rows), TOKENIZER, malformed="keep")
    assert found(report) == [(1, "no block"), (2, "unexpected block"), (3, "unknown form")]
    assert formatted["form"] == ["parallel", "parallel", "sequential", "sequential"]


BROKEN = {
    "parallel": [
        (problem(), []),
        (problem(question=" \n"), ["missing field"]),
        (problem(deepseek_attempt=None), ["missing field"]),
        (problem(deepseek_thinking_trajectory_parallel=None, question=""), ["missing field", "missing field"]),
        (problem(deepseek_thinking_trajectory=None), []),
        (problem(deepseek_thinking_trajectory_parallel="x is 1. y is 2."), ["no block"]),
        # No closing tag reaches out of an open block, so `<Think>` stays open, too.
        (
            problem(deepseek_thinking_trajectory_parallel=BLOCK.replace("</Parallel>", "")),
            ["unclosed tag", "unclosed block", "stray close"],
        ),
        (problem(question="What does </Path> mean?"), ["stray close"]),
        (problem(deepseek_attempt="<Path>3"), ["path outside a block", "unclosed tag"]),
        (problem(deepseek_thinking_trajectory_parallel=BLOCK.replace("Outline", "Goal", 1)), None),
        (problem(), []),
    ],
    "sequential": [
        (problem(deepseek_thinking_trajectory=BLOCK), ["unexpected block"]),
        (problem(deepseek_thinking_trajectory="<Conclusion>3"), ["misplaced tag", "unclosed tag"]),
        (problem(deepseek_thinking_trajectory_parallel=None), []),
        (problem(deepseek_thinking_trajectory=""), ["missing field"]),
        (problem(deepseek_thinking_trajectory="<Think>x is 1."), ["unclosed tag"]),
        (problem(deepseek_attempt="3</Parallel>"), ["stray close"]),
    ],
}


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_every_malformed_row_of_the_papers_columns_is_reported_by_its_number(form):
    rows, kinds = zip(*BROKEN[form], strict=True)
    kept, report = format_dataset(Dataset.from_list(rows), TOKENIZER, form, malformed="keep")
    for row, expected in enumerate(kinds):
        reported = [defect.kind for defect in report.malformed if defect.row == row]
        # `None` stands for a text with several defects, of which the parser's tests know more.
        assert reported == expected if expected is not None else len(reported) > 1
    assert all(defect.form == form and defect.split is None for defect in report.malformed)
    assert kept["pair"] == list(range(len(rows)))
    sound = [row for row, expected in enumerate(kinds) if expected == []]
    assert report.malformed_rows == len(rows) - len(sound)

    dropped, same = format_dataset(Dataset.from_list(rows), TOKENIZER, form, malformed="drop")
    assert found(same) == found(report)
    assert dropped.to_list() == kept.select(sound).to_list()
    first = next(row for row, expected in enumerate(kinds) if expected != [])
    with pytest.raises(ValueError, match=rf"`dataset`: {len(rows) - len(sound)} of {len(rows)}.*\n +row {first} "):
        format_dataset(Dataset.from_list(rows), TOKENIZER, form, malformed="raise")


def test_malformed_messages_are_reported_and_can_be_kept():
    broken = [
        ([user("a?"), assistant("One.")], None),
        ([], "missing field"),
        (None, "missing field"),
        ([user("a?")], "missing field"),
        ([assistant("One.")], "missing field"),
        ([user(None), assistant("One.")], "missing field"),
        ([user("a?"), assistant("  ")], "missing field"),
        ([user("a?"), assistant("</Think>")], "stray close"),
        ([user("a?"), assistant("One.")], None),
    ]
    source = Dataset.from_list([{"messages": messages} for messages, _ in broken])
    kept, report = format_dataset(source, TOKENIZER, malformed="keep")
    rows = {row for row, kind in enumerate(kind for _, kind in broken) if kind is not None}
    assert {defect.row for defect in report.malformed} == rows
    assert all(defect.kind == broken[defect.row][1] for defect in report.malformed)
    assert kept[1] == {
        "prompt": [system(SEQUENTIAL)],
        "completion": [assistant("")],
        "form": "sequential",
        "pair": 1,
    }
    assert kept[3]["prompt"] == [system(SEQUENTIAL), user("a?")]
    assert format_dataset(source, TOKENIZER)[0]["pair"] == [0, 8]


def test_a_conversation_that_the_chat_template_refuses_is_reported():
    strict = tiny_tokenizer()
    strict.add_tokens(list(TAGS))
    strict.chat_template = (
        "{% for message in messages %}{% if loop.index0 and message['role'] == messages[loop.index0 - 1]['role'] %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ message['content'] }}{% endfor %}"
    )
    source = Dataset.from_list(
        [{"messages": [*first, user("b?"), assistant("Two.")]} for first in ([], [user("a?")], [system("Be brief.")])]
    )
    _, report = format_dataset(source, strict)
    assert found(report) == [(1, "refused by the chat template")]
    assert "roles must alternate" in report.summary()


def text_of(sample: Sample) -> str:
    names = {token_id: word for word, token_id in strategies.VOCABULARY.items()}
    return "".join(names[token_id] for token_id in sample.ids).replace("_", "\n")


@given(samples=st.lists(st.one_of(trees(40), shuffled(40)), min_size=1, max_size=4))
@settings(deadline=None, derandomize=True, max_examples=25)
def test_what_is_malformed_is_what_the_layout_says(samples):
    source = Dataset.from_list([{"messages": [user("?"), assistant(text_of(sample))]} for sample in samples])
    kept, report = format_dataset(source, TOKENIZER, malformed="keep")
    expected = []
    for row, sample in enumerate(samples):
        layout = BranchLayout.from_token_ids(sample.ids, strategies.token_ids)
        kinds = [each.kind for each in layout.problems] if text_of(sample).strip() else ["missing field"]
        expected += [(row, kind) for kind in kinds]
        assert kept[row]["form"] == ("parallel" if layout.blocks else "sequential")
    assert found(report) == expected


def test_the_token_of_a_defect_counts_in_the_row_that_is_trained_on():
    source = Dataset.from_list([{"messages": [user("a?"), assistant("One.</Path>")]}])
    kept, report = format_dataset(source, TOKENIZER, malformed="keep")
    ids = TOKENIZER.apply_chat_template(kept[0]["prompt"] + kept[0]["completion"], return_dict=True)["input_ids"]
    (defect,) = report.malformed
    assert defect.message.startswith(f"token {ids.index(TOKENIZER.convert_tokens_to_ids('</Path>'))}: ")


def test_splits_are_formatted_and_reported_apart():
    source = DatasetDict(
        {
            "train": Dataset.from_list([problem(), problem(question="")]),
            "test": Dataset.from_list([problem(deepseek_attempt=""), problem()]),
        }
    )
    formatted, report = format_dataset(source, TOKENIZER, "parallel")
    assert isinstance(formatted, DatasetDict)
    assert {name: split["pair"][:] for name, split in formatted.items()} == {"train": [0], "test": [1]}
    assert [(defect.split, defect.row) for defect in report.malformed] == [("train", 1), ("test", 0)]
    assert report.rows == {"train": 2, "test": 2}
    assert str(report.malformed[1]) == "row 0 of test (parallel): missing field: `deepseek_attempt` is empty."


def test_the_summary_counts_kinds_and_is_cut_to_its_limit():
    rows = [problem(question="")] * 3 + [problem(deepseek_thinking_trajectory_parallel="1"), problem()]
    _, report = format_dataset(Dataset.from_list(rows), TOKENIZER, "parallel")
    assert report.summary(limit=2).splitlines() == [
        "4 of 5 rows malformed and dropped (missing field 3, no block 1)",
        "  row 0 (parallel): missing field: `question` is empty.",
        "  row 1 (parallel): missing field: `question` is empty.",
        "  ... and 2 more",
    ]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report.table())
    lines = capture.get().splitlines()
    assert sum("missing field" in line for line in lines) == 3
    assert any("3" in line and "no block" in line for line in lines)


@pytest.mark.parametrize("typed", [True, False])
def test_a_stream_is_formatted_row_by_row(typed):
    rows = [row for row, _ in BROKEN["parallel"]]
    whole, expected = format_dataset(Dataset.from_list(rows), TOKENIZER, "parallel")
    stream = Dataset.from_list(rows).to_iterable_dataset() if typed else IterableDataset.from_generator(lambda: rows)
    formatted, report = format_dataset(stream, TOKENIZER, "parallel")
    assert report.malformed == []
    assert list(formatted) == list(whole)
    assert list(formatted) == list(whole)
    assert report.malformed == expected.malformed
    assert report.rows == {None: len(rows)}

    refused, _ = format_dataset(stream, TOKENIZER, "parallel", malformed="raise")
    reader = iter(refused)
    next(reader)
    with pytest.raises(ValueError, match="row 1"):
        next(reader)


def test_worker_processes_report_the_same_rows():
    rows = [row for row, _ in BROKEN["parallel"]]
    whole, expected = format_dataset(Dataset.from_list(rows), TOKENIZER, "parallel")
    shared, report = format_dataset(Dataset.from_list(rows), TOKENIZER, "parallel", num_proc=2)
    assert report.malformed == expected.malformed
    assert shared.to_list() == whole.to_list()


def test_sft_trainer_trains_on_the_rows(tmp_path):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = tiny_config("llama", len(tokenizer), initializer_range=0.05)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = MultiverseForCausalLM(config)
    add_multiverse_tokens(model, tokenizer)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    formatted, _ = format_dataset(Dataset.from_list([problem(), problem(question="")]), tokenizer, "parallel")
    options = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        max_steps=1,
        learning_rate=1e-2,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(model, options, train_dataset=formatted, processing_class=tokenizer)
    (row,) = trainer.train_dataset
    prompt = tokenizer.apply_chat_template(formatted[0]["prompt"], add_generation_prompt=True, return_dict=True)
    start = len(prompt["input_ids"])
    assert row["labels"] == [-100] * start + row["input_ids"][start:]
    assert tokenizer.decode(row["input_ids"][start:]).startswith("<Think>\nLet me see.\n<Parallel>\n<Goal>")
    assert (row["form"], row["pair"]) == ("parallel", 0)
    assert trainer.train().global_step == 1
    assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_bad_arguments_are_named():
    source = Dataset.from_list([problem()])
    for arguments, message in [
        ({"form": "both"}, "`form` must be"),
        ({"form": "parallel", "malformed": "ignore"}, "`malformed` must be"),
        ({}, "Say which one as `form`"),
        ({"form": "parallel", "columns": TrajectoryColumns(attempt="output")}, r"'output'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            format_dataset(source, TOKENIZER, **arguments)
    with pytest.raises(ValueError, match="no rows"):
        format_dataset(source.select([]), TOKENIZER, "parallel")
    with pytest.raises(ValueError, match=r"`dataset\['test'\]` has no rows"):
        format_dataset(DatasetDict({"train": source, "test": source.select([])}), TOKENIZER, "parallel")
    with pytest.raises(ValueError, match="column 'prompt'"):
        format_dataset(Dataset.from_list([{"prompt": "a?", "completion": "One."}]), TOKENIZER)
    with pytest.raises(ValueError, match="column 'messages'"):
        format_dataset(Dataset.from_list([{"messages": [{"from": "user", "value": "a?"}]}]), TOKENIZER)
    with pytest.raises(ValueError, match="`token_ids`"):
        format_dataset(source, tiny_tokenizer(), "parallel")
    bare = tiny_tokenizer()
    bare.add_tokens(list(TAGS))
    bare.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        format_dataset(source, bare, "parallel")
