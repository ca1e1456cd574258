"""The paper's curriculum: epoch by epoch, more problems are seen in Multiverse form (arXiv 2506.09991, section 6.1).

A problem has two forms, and every epoch visits every problem once, in one of them. The share of parallel visits goes
from 0 in the first epoch to 1 in the last. Both forms lie in one concatenated dataset, of which a sampler picks rows;
nothing is copied or tokenised twice, and the order is a function of seed and epoch alone: the same on every rank,
after a restart, and from the middle of an epoch on.

```python
dataset = pair_forms(sequential, parallel)
trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
install_curriculum(trainer)
trainer.train()
```
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FORMS = ("sequential", "parallel")

#: Shares of Multiverse samples in the eight epochs of the training set published with the paper.
PUBLISHED_SHARES: tuple[float, ...] = (0.0, 0.0, 0.1, 0.5, 0.5, 0.9, 1.0, 1.0)

Schedule = Literal["linear"] | Sequence[float] | Callable[[int, int], float]

logger = logging.getLogger(__name__)


def epoch_shares(schedule: Schedule = "linear", epochs: int | None = None) -> tuple[float, ...]:
    """Share of parallel visits in every epoch.

    Args:
        schedule (`str`, sequence or callable): "linear" goes from 0 to 1 in equal steps (a single epoch is Multiverse
            only); a sequence has one share per epoch, such as `PUBLISHED_SHARES`; a callable takes the number of the
            epoch, from 0, and of all epochs.
        epochs (`int`, *optional*): how many; a sequence says so itself.

    Raises:
        ValueError: if the number of epochs is missing, not positive or not the sequence's length, or a share is no
            number from 0 to 1.
    """
    listed = None if isinstance(schedule, str) or callable(schedule) else list(schedule)
    if epochs is None:
        if listed is None:
            raise ValueError("`epochs` is needed for a schedule that is no list of shares. Give a positive number.")
        epochs = len(listed)
    if epochs < 1:
        raise ValueError(f"`epochs` must be positive, got {epochs}.")
    if isinstance(schedule, str):
        if schedule != "linear":
            raise ValueError(f"`schedule` must be 'linear', a list of shares or a callable, got {schedule!r}.")
        shares = [epoch / (epochs - 1) for epoch in range(epochs)] if epochs > 1 else [1.0]
    elif callable(schedule):
        shares = [schedule(epoch, epochs) for epoch in range(epochs)]
    else:
        assert listed is not None
        if len(listed) != epochs:
            raise ValueError(
                f"`schedule` has {len(listed)} shares, but the run has {epochs} epochs. Give one share per epoch."
            )
        shares = listed
    for epoch, share in enumerate(shares):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"`schedule` must give shares from 0 to 1, got {share} for epoch {epoch}.")
    return tuple(float(share) for share in shares)


def pair_forms(sequential: Dataset, parallel: Dataset) -> Dataset:
    """Concatenates the two forms of the same problems and copies neither: its files are theirs, memory-mapped.

    (Rows picked from a dataset that lacks the columns below are written to disk once, by `Dataset.add_column`.)

    Args:
        sequential (`Dataset`): rows in sequential form.
        parallel (`Dataset`): rows in parallel form. With a column `pair` in both, as `format_dataset` makes it, rows
            with equal values belong to one problem; without, row i of the one and row i of the other do.

    Returns:
        `Dataset`: with the columns `form` and `pair`. They survive what `SFTTrainer` does to a dataset that it does
        not pack, so rows that it drops or shuffles stay paired.

    Raises:
        ValueError: if only one of them has `pair`, row counts differ without it, or `form` says otherwise.
    """
    parts = {"sequential": sequential, "parallel": parallel}
    paired = [form for form, part in parts.items() if "pair" in part.column_names]
    if len(paired) == 1:
        raise ValueError(f"`{paired[0]}` has a column 'pair' and the other has none. Format both in the same way.")
    if not paired and len(sequential) != len(parallel):
        raise ValueError(
            f"`sequential` has {len(sequential)} rows and `parallel` {len(parallel)}. Without a column 'pair' their "
            "rows are paired by number, so both need the same number."
        )
    for form, part in parts.items():
        if "form" not in part.column_names:
            part = part.add_column("form", [form] * len(part))
        elif others := sorted(set(part["form"]) - {form}):
            raise ValueError(f"`{form}` has rows whose column 'form' says {others}. Give the rows of one form.")
        if not paired:
            part = part.add_column("pair", list(range(len(part))))
        parts[form] = part
    return concatenate_datasets(list(parts.values()))


class CurriculumSampler(Sampler[int]):
    """Visits every problem once an epoch, a share of them in parallel form.

    Which problems these are moves on like a hand around a clock: the problems lie on a circle in an order drawn once
    from the seed, and every epoch takes the next `share * problems` of them. So after any number of epochs no problem
    is ahead of another by more than one parallel visit. The choice is *not* nested: a problem may come back in
    sequential form. With a nested one, in which a problem that has become parallel stays so, a linear schedule of
    eight epochs would show one problem seven times in parallel form and another once, which with 1,000 problems means
    learning some by heart and missing others. Coming back costs nothing, since the system message says which form is
    asked for.

    The order within an epoch is drawn from seed and epoch, over both forms together, so all batches of an epoch have
    the same expected share. Without a `Trainer` call `set_epoch` before every epoch, as with `DistributedSampler`.

    Args:
        sequential_rows (sequence of `int`, length P): row of the sequential form of every problem.
        parallel_rows (sequence of `int`, length P): row of its parallel form.
        shares (sequence of `float`): share of parallel visits in every epoch (`epoch_shares`); the last one holds for
            the epochs after it.
        seed (`int`): seed of the choice and the order.

    Raises:
        ValueError: if the two lengths differ, there are no problems or no shares, or the seed is negative.
    """

    def __init__(
        self, sequential_rows: Sequence[int], parallel_rows: Sequence[int], shares: Sequence[float], seed: int = 0
    ) -> None:
        if len(sequential_rows) != len(parallel_rows) or not len(parallel_rows):
            raise ValueError(
                f"`sequential_rows` and `parallel_rows` need one row per problem, got {len(sequential_rows)} and "
                f"{len(parallel_rows)}."
            )
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        self.shares = epoch_shares(tuple(shares))
        self.seed = seed
        self.epoch = 0
        self._rows = np.stack([np.asarray(sequential_rows), np.asarray(parallel_rows)])
        self._counts = [round(share * len(self)) for share in self.shares]
        self._circle = np.random.default_rng([seed, 0]).permutation(len(self))

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, shares: Sequence[float], seed: int = 0, unpaired: Literal["raise", "drop"] = "raise"
    ) -> "CurriculumSampler":
        """The sampler of a dataset with the columns `form` and `pair`, in whatever order its rows are.

        Args:
            dataset (`Dataset`): made by `pair_forms`, before or after the trainer has tokenised it.
            shares (sequence of `float`): share of parallel visits in every epoch.
            seed (`int`): seed of the choice and the order.
            unpaired (`str`): whether a problem that has only one form is an error or left out of every epoch.

        Raises:
            ValueError: if the columns are missing, a form is unknown or comes twice for a problem, or a problem has
                only one form.
        """
        if unpaired not in ("raise", "drop"):
            raise ValueError(f"`unpaired` must be 'raise' or 'drop', got {unpaired!r}.")
        if missing := sorted({"form", "pair"} - set(dataset.column_names)):
            raise ValueError(
                f"`dataset` lacks the columns {missing}, got {dataset.column_names}. Make it with `pair_forms`; "
                "packing removes them."
            )
        columns = dataset.select_columns(["form", "pair"]).with_format(None)[:]
        forms, pairs = np.asarray(columns["form"]), np.asarray(columns["pair"])
        if unknown := sorted(set(columns["form"]) - set(FORMS), key=str):
            raise ValueError(f"`dataset` has rows whose column 'form' says {unknown}. It must be one of {FORMS}.")
        rows: dict[str, np.ndarray] = {}
        ids: dict[str, np.ndarray] = {}
        for form in FORMS:
            of_form = np.flatnonzero(forms == form)
            ids[form], first, counts = np.unique(pairs[of_form], return_index=True, return_counts=True)
            if (counts > 1).any():
                raise ValueError(
                    f"`dataset` has pair {ids[form][counts.argmax()]} {counts.max()} times in {form} form. A problem "
                    "has one row of each form."
                )
            rows[form] = of_form[first]
        common, *places = np.intersect1d(ids["sequential"], ids["parallel"], assume_unique=True, return_indices=True)
        lone = np.setxor1d(ids["sequential"], ids["parallel"], assume_unique=True)
        if len(lone) and unpaired == "raise":
            raise ValueError(
                f"`dataset` has {len(lone)} problems in one form only, the first is pair {lone[0]}. Give both forms, "
                "or leave such problems out with `unpaired='drop'`."
            )
        if not len(common):
            raise ValueError(
                "`dataset` has no problem in both forms, so there is nothing to move from one to the other."
            )
        if len(lone):
            logger.warning("%d problems have only one form and are left out of the curriculum.", len(lone))
        sequential, parallel = (rows[form][place] for form, place in zip(FORMS, places, strict=True))
        return cls(sequential, parallel, shares, seed)  # type: ignore[arg-type]  # arrays are sequences here

    def epoch_rows(self, epoch: int) -> list[int]:
        """Rows in the order in which `epoch` visits them, one per problem."""
        problems, last = len(self), len(self._counts) - 1
        start = sum(self._counts[:epoch]) + max(0, epoch - last - 1) * self._counts[-1]
        count = self._counts[min(epoch, last)]
        form = np.zeros(problems, dtype=np.intp)
        form[self._circle[(start + np.arange(count)) % problems]] = 1
        order = np.random.default_rng([self.seed, epoch + 1]).permutation(problems)
        return self._rows[form, np.arange(problems)][order].tolist()

    @property
    def share(self) -> float:
        """Share of parallel visits in the current epoch, rounded to whole problems."""
        return self._counts[min(self.epoch, len(self._counts) - 1)] / len(self)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the next iteration visits, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.epoch_rows(self.epoch))

    def __len__(self) -> int:
        return self._rows.shape[1]


class CurriculumCallback(TrainerCallback):
    """Tells the sampler the epoch before each one begins.

    accelerate does that too, with one gap (seen with accelerate 1.15): where a run on several ranks resumes in the
    middle of an epoch, the batches are wrapped twice, for the ranks and for those to skip, and `set_epoch` gets no
    further than that. The rest of the epoch would be visited in the order of epoch 0.

    Args:
        sampler (`CurriculumSampler`): the trainer's.
    """

    def __init__(self, sampler: CurriculumSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
        logger.info("Epoch %d: %.1f%% of the problems in parallel form", self.sampler.epoch, 100 * self.sampler.share)


def install_curriculum(
    trainer: Trainer,
    schedule: Schedule = "linear",
    *,
    epochs: int | None = None,
    seed: int | None = None,
    unpaired: Literal["raise", "drop"] = "raise",
) -> CurriculumSampler:
    """Lets a trainer, stock `SFTTrainer` or `Trainer`, visit its `train_dataset` by the curriculum.

    The dataset holds both forms (`pair_forms`) but an epoch has one visit per problem, and the trainer's steps,
    schedules and progress count these. Ranks share the batches of an epoch out among them; where they do not come out
    even, accelerate repeats the first samples of the epoch (or drops the last, with `dataloader_drop_last`). Call it
    after everything that changes `trainer.train_dataset`.

    Packing is refused. A packed row holds several problems of one form, so problems could no longer be chosen one by
    one; packing each form apart would put different problems together in each, and no choice of rows would visit every
    problem once. `padding_free=True` wastes no compute on padding either and leaves samples whole.

    Args:
        trainer (`Trainer`): changed in place: its training sampler, its count of training samples, its callbacks.
        schedule (`str`, sequence or callable): see `epoch_shares`.
        epochs (`int`, *optional*): the schedule's length; by default `args.num_train_epochs`.
        seed (`int`, *optional*): seed of choice and order; by default `args.data_seed`, or `args.seed`.
        unpaired (`str`): "raise" or "drop", what to do about problems that have only one form.

    Returns:
        `CurriculumSampler`: the one in use.

    Raises:
        ValueError: if the trainer packs, groups by length or streams, the number of epochs is unknown, or the dataset
            is not paired.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if getattr(args, "packing", False):
        raise ValueError(
            "`args.packing` is on: a packed row holds several problems, so their form cannot be chosen one by one. "
            "Set `packing=False`; `padding_free=True` avoids padding as well."
        )
    if args.train_sampling_strategy != "random":
        raise ValueError(
            f"`args.train_sampling_strategy` is {args.train_sampling_strategy!r}, but the order is the curriculum's. "
            "Leave it at 'random'."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`trainer.train_dataset` must be a `datasets.Dataset` whose rows can be picked, got "
            f"{type(dataset).__name__}. Load it without streaming."
        )
    if epochs is None and (isinstance(schedule, str) or callable(schedule) or args.max_steps <= 0):
        if args.max_steps > 0:
            raise ValueError(
                f"`args.max_steps` is {args.max_steps}, so the number of epochs is not known. Give it as `epochs`."
            )
        epochs = math.ceil(args.num_train_epochs)
    if seed is None:
        seed = args.seed if args.data_seed is None else args.data_seed
    sampler = CurriculumSampler.from_dataset(dataset, epoch_shares(schedule, epochs), seed, unpaired)
    stock_num_examples = type(trainer).num_examples
    rows = len(dataset)

    def get_train_sampler(train_dataset: Dataset | None = None) -> CurriculumSampler:
        current: Any = trainer.train_dataset if train_dataset is None else train_dataset
        if len(current) != rows:
            raise ValueError(
                f"`trainer.train_dataset` had {rows} rows when the curriculum was installed and has {len(current)} "
                "now. Call `install_curriculum` again after changing it."
            )
        return sampler

    def num_examples(dataloader: DataLoader) -> int:
        return len(sampler) if _reads_from(dataloader, sampler) else stock_num_examples(trainer, dataloader)

    trainer._get_train_sampler = get_train_sampler  # type: ignore[method-assign]
    trainer.num_examples = num_examples  # type: ignore[method-assign]
    trainer.remove_callback(CurriculumCallback)
    trainer.add_callback(CurriculumCallback(sampler))
    return sampler


def _reads_from(dataloader: DataLoader, sampler: Sampler) -> bool:
    """Whether `sampler` is at the bottom of the dataloader's batch samplers (accelerate wraps them)."""
    batches: Any = dataloader.batch_sampler
    while batches is not None:
        if getattr(batches, "sampler", None) is sampler:
            return True
        batches = getattr(batches, "batch_sampler", None)
    return False
