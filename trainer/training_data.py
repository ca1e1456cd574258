"""What a training run is fed: a dataset of the user's or generated problems, in one form or in both."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from multiverse.trainer.curriculum import FORMS, pair_forms
from multiverse.trainer.expression_trees import FAMILIES
from multiverse.trainer.formatting import TrajectoryColumns, format_dataset
from multiverse.trainer.synthetic import Problem, train_and_test
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments


@dataclass
class DataArguments(ScriptArguments):
    """TRL's script arguments and what says how the samples come about."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or local path of the dataset."})
    format_data: bool = field(
        default=False,
        metadata={
            "help": "Prompt for the form of every sample and look for malformed ones: for messages, and for a "
            "problem's two forms in columns."
        },
    )
    dataset_form: str | None = field(
        default=None,
        metadata={
            "help": "With format_data: form of all samples; by default read off each.",
            "choices": ["parallel", "sequential"],
        },
    )
    trajectory_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "With format_data: columns of question, parallel trajectory, sequential trajectory and final "
            "attempt, by default those of Multiverse-1K."
        },
    )
    malformed: str = field(
        default="drop",
        metadata={
            "help": "With format_data: what happens to malformed samples.",
            "choices": ["drop", "keep", "raise"],
        },
    )
    curriculum: bool = field(
        default=False,
        metadata={"help": "Move from the sequential form of every problem to its parallel form over the epochs."},
    )
    curriculum_shares: list[float] | None = field(
        default=None, metadata={"help": "Share of parallel samples in every epoch; by default from 0 to 1, linear."}
    )
    curriculum_epochs: int | None = field(
        default=None, metadata={"help": "Epochs of the curriculum, where max_steps leaves them open."}
    )
    synthetic_samples: int = field(
        default=0, metadata={"help": "Train on this many generated problems instead of a dataset."}
    )
    synthetic_family: str = field(
        default="sums", metadata={"help": "Kind of the generated problems.", "choices": list(FAMILIES)}
    )
    synthetic_form: str = field(
        default="parallel", metadata={"help": "Form of the generated answers.", "choices": ["parallel", "sequential"]}
    )
    synthetic_terms: list[int] = field(
        default_factory=lambda: [3, 11], metadata={"help": "Fewest and most terms of a chain in training problems."}
    )
    synthetic_repeats: bool = field(
        default=False, metadata={"help": "Whether a step may come twice in a chain of a training problem."}
    )
    synthetic_largest: int = field(default=20, metadata={"help": "Largest running total of a training chain."})
    synthetic_depth: list[int] = field(
        default_factory=lambda: [1, 3], metadata={"help": "Trees: fewest and most levels of a training problem."}
    )
    synthetic_branching: list[int] = field(
        default_factory=lambda: [2, 2],
        metadata={"help": "Trees: fewest and most parts of a node in training problems."},
    )
    synthetic_test_samples: int = field(
        default=256, metadata={"help": "Held-out problems; no training problem is one of them."}
    )


def check_data_arguments(arguments: DataArguments) -> None:
    """Refuses what does not go together, before a model is loaded.

    Raises:
        ValueError: unless exactly one of `dataset_name` and `synthetic_samples` is given; for a curriculum over a
            dataset that is not formatted; for columns that are not four.
    """
    if (arguments.dataset_name is None) == (arguments.synthetic_samples <= 0):
        raise ValueError(
            f"Give either `dataset_name` (got {arguments.dataset_name!r}) or a positive `synthetic_samples` (got "
            f"{arguments.synthetic_samples})."
        )
    if arguments.dataset_name is not None and arguments.curriculum and not arguments.format_data:
        raise ValueError(
            "`curriculum` is on, but `format_data` is off: the two forms of a problem are known after formatting "
            "only. Set `format_data`."
        )
    named = arguments.trajectory_columns
    if named is not None and len(named) != 4:
        raise ValueError(
            f"`trajectory_columns` must name four columns (question, parallel, sequential, attempt), got {named}."
        )


def load_data(
    arguments: DataArguments,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """The dataset of the run, with its train and test splits.

    Args:
        arguments (`DataArguments`): what is asked for.
        seed (`int`): draws generated problems.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): with the tags; needed for `format_data`.
        num_proc (`int`, *optional*): worker processes.

    Raises:
        ValueError: as `check_data_arguments`.
    """
    check_data_arguments(arguments)
    if arguments.dataset_name is None:
        return _generated(arguments, seed)
    loaded = load_dataset(arguments.dataset_name, name=arguments.dataset_config)
    if not isinstance(loaded, DatasetDict):
        loaded = DatasetDict({arguments.dataset_train_split: loaded})
    return _formatted(arguments, loaded, tokenizer, num_proc) if arguments.format_data else loaded


def _generated(arguments: DataArguments, seed: int) -> DatasetDict:
    drawn: dict[str, Any] = {
        "terms": tuple(arguments.synthetic_terms),
        "repeats": arguments.synthetic_repeats,
        "largest": arguments.synthetic_largest,
    }
    if arguments.synthetic_family == "trees":
        drawn["depth"] = tuple(arguments.synthetic_depth)
        drawn["branching"] = tuple(arguments.synthetic_branching)
    family = FAMILIES[arguments.synthetic_family]
    train, held_out = train_and_test(
        arguments.synthetic_samples, arguments.synthetic_test_samples, seed, family(**drawn), family()
    )
    form = arguments.synthetic_form
    return DatasetDict(
        {
            arguments.dataset_train_split: (
                pair_forms(*(_rows(train, each) for each in FORMS)) if arguments.curriculum else _rows(train, form)
            ),
            arguments.dataset_test_split: _rows(held_out, form),
        }
    )


def _rows(problems: list[Problem], form: str) -> Dataset:
    return Dataset.from_list([problem.messages(form) for problem in problems])


def _formatted(
    arguments: DataArguments, loaded: DatasetDict, tokenizer: PreTrainedTokenizerBase | None, num_proc: int | None
) -> DatasetDict:
    if tokenizer is None:
        raise ValueError("`tokenizer` is None, but `format_data` judges samples as the model will see them. Pass it.")
    named = arguments.trajectory_columns
    options: dict[str, Any] = {
        "columns": TrajectoryColumns(*named) if named else None,
        "malformed": arguments.malformed,
        "num_proc": num_proc,
    }
    train = arguments.dataset_train_split
    result = DatasetDict()
    for split, rows in loaded.items():
        if split == train and arguments.curriculum:
            forms = [format_dataset(rows, tokenizer, form, **options)[0] for form in FORMS]  # type: ignore[arg-type]
            result[split] = pair_forms(*forms)
        else:
            form = arguments.dataset_form or ("parallel" if arguments.curriculum else None)
            result[split] = format_dataset(rows, tokenizer, form, **options)[0]  # type: ignore[arg-type]
    return result
