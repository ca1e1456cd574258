"""The curriculum's order: exact shares, every problem once an epoch, the same after a restart and over ranks."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pyarrow
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.curriculum import (
    PUBLISHED_SHARES,
    CurriculumCallback,
    CurriculumSampler,
    epoch_shares,
    install_curriculum,
    pair_forms,
)
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from tiny import DOT, FIRST_WORD, tiny_config, tiny_model, tiny_tokenizer
from torch.utils.data import BatchSampler, DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

FORMS = ("sequential", "parallel")


def sampler_of(problems: int, shares=(0.0, 0.5, 1.0), seed: int = 0) -> CurriculumSampler:
    """Sequential rows are 0 to P - 1, parallel ones P to 2 P - 1."""
    return CurriculumSampler(range(problems), range(problems, 2 * problems), shares, seed)


def test_the_linear_schedule_goes_from_sequential_only_to_multiverse_only():
    assert epoch_shares("linear", 8) == tuple(float(Fraction(epoch, 7)) for epoch in range(8))
    assert epoch_shares("linear", 2) == (0.0, 1.0)
    assert epoch_shares("linear", 1) == (1.0,)


def test_a_schedule_may_be_a_list_or_a_callable():
    assert epoch_shares([0, 0.25, 1]) == (0.0, 0.25, 1.0)
    assert epoch_shares(PUBLISHED_SHARES, 8) == (0.0, 0.0, 0.1, 0.5, 0.5, 0.9, 1.0, 1.0)
    assert epoch_shares(lambda epoch, epochs: (epoch / epochs) ** 2, 4) == (0.0, 1 / 16, 1 / 4, 9 / 16)


@given(
    problems=st.integers(1, 40),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_epoch_visits_every_problem_once_and_the_share_of_them_in_parallel_form(problems, shares, seed):
    sampler = sampler_of(problems, shares, seed)
    parallel_visits: Counter[int] = Counter(dict.fromkeys(range(problems), 0))
    for epoch in range(len(shares) + 3):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) == problems
        assert sorted(row % problems for row in rows) == list(range(problems))
        parallel = [row - problems for row in rows if row >= problems]
        share = shares[min(epoch, len(shares) - 1)]
        assert abs(len(parallel) - share * problems) <= 0.5 + 1e-9
        assert sampler.share == len(parallel) / problems
        parallel_visits.update(parallel)
        # No problem is ahead of another by more than one parallel visit, after any number of epochs.
        assert max(parallel_visits.values()) - min(parallel_visits.values()) <= 1


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    one, other = sampler_of(32, seed=5), sampler_of(32, seed=5)
    orders = []
    for epoch in range(3):
        one.set_epoch(epoch)
        orders.append(list(one))
        assert list(one) == orders[-1]
    for epoch in (2, 0, 1):
        assert other.epoch_rows(epoch) == orders[epoch]
    problems = [[row % 32 for row in order] for order in orders]
    assert all(left != right for left, right in itertools.combinations(problems, 2))
    # Another seed changes the order, not as if it were another epoch of this one, and which problems are parallel.
    for seed in (4, 6):
        others = [[row % 32 for row in sampler_of(32, seed=seed).epoch_rows(epoch)] for epoch in range(4)]
        assert all(order not in problems for order in others)
    chosen = [{row for row in sampler_of(32, seed=seed).epoch_rows(1) if row >= 32} for seed in range(3)]
    assert all(left != right for left, right in itertools.combinations(chosen, 2))


def test_forms_are_spread_over_the_epoch():
    rows = np.array(sampler_of(1000, [0.5]).epoch_rows(0))
    # Of 250 visits in a row 125 are parallel, give or take four and a half standard deviations without replacement.
    for quarter in (rows >= 1000).reshape(4, 250).sum(axis=1):
        assert abs(int(quarter) - 125) < 4.5 * (250 * 0.5 * 0.5 * 750 / 999) ** 0.5


def token_rows(form: str, problems: int, first: int = 0) -> list[dict]:
    """Tokenised rows that can be told apart by their first three tokens: form, tens, ones."""
    ids = [[FIRST_WORD + FORMS.index(form), pair // 10, pair % 10, DOT] for pair in range(first, first + problems)]
    return [{"input_ids": row, "labels": row} for row in ids]


def token_pairs(problems: int) -> Dataset:
    return pair_forms(*(Dataset.from_list(token_rows(form, problems)) for form in FORMS))


def test_pairing_adds_the_columns_that_say_form_and_problem():
    dataset = token_pairs(2)
    assert dataset["form"] == ["sequential", "sequential", "parallel", "parallel"]
    assert dataset["pair"] == [0, 1, 0, 1]
    assert dataset["input_ids"] == [row["input_ids"] for form in FORMS for row in token_rows(form, 2)]


def test_rows_are_found_by_their_columns_in_whatever_order_they_are():
    plain = token_pairs(8)
    sampler = CurriculumSampler.from_dataset(plain, [0.25, 0.75], seed=3)
    assert [sampler.epoch_rows(epoch) for epoch in (0, 1)] == [
        sampler_of(8, [0.25, 0.75], seed=3).epoch_rows(epoch) for epoch in (0, 1)
    ]
    mixed = plain.shuffle(seed=1)
    other = CurriculumSampler.from_dataset(mixed, [0.25, 0.75], seed=3)
    for epoch in (0, 1):
        visited = [plain[row]["input_ids"] for row in sampler.epoch_rows(epoch)]
        assert [mixed[row]["input_ids"] for row in other.epoch_rows(epoch)] == visited


def test_problems_with_one_form_are_refused_or_left_out():
    parts = {form: Dataset.from_list(token_rows(form, 5)).add_column("pair", list("abcde")) for form in FORMS}
    dataset = pair_forms(parts["sequential"].select([0, 1, 2, 4]), parts["parallel"].select([4, 3, 2, 1]))
    with pytest.raises(ValueError, match="2 problems in one form only, the first is pair a"):
        CurriculumSampler.from_dataset(dataset, [0.0, 1.0])
    sampler = CurriculumSampler.from_dataset(dataset, [0.0, 1.0], unpaired="drop")
    for epoch, form in enumerate(FORMS):
        rows = dataset.select(sampler.epoch_rows(epoch))
        assert set(rows["form"]) == {form}
        assert sorted(rows["pair"]) == ["b", "c", "e"]


def test_nothing_is_copied(tmp_path):
    """The pair's files are its parts' files, and neither pairing nor sampling takes memory of the data's size."""
    size = 400 * 20_000
    for form in FORMS:
        text = Dataset.from_dict({"text": [form[0] * 20_000] * 400, "pair": list(range(400)), "form": [form] * 400})
        text.save_to_disk(tmp_path / form)
    del text
    parts = [load_from_disk(tmp_path / form) for form in FORMS]
    before = pyarrow.total_allocated_bytes()
    dataset = pair_forms(*parts)
    sampler = CurriculumSampler.from_dataset(dataset, [0.5])
    assert len(sampler.epoch_rows(0)) == 400
    assert pyarrow.total_allocated_bytes() - before < size / 50
    files = [{file["filename"] for file in part.cache_files} for part in parts]
    assert all(files)
    assert {file["filename"] for file in dataset.cache_files} == files[0] | files[1]


@pytest.mark.parametrize("problems", [16, 13])
def test_ranks_share_the_epoch_out_among_them(problems):
    sampler = sampler_of(problems, seed=1)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        shards = [BatchSamplerShard(BatchSampler(sampler, 2, False), 2, rank) for rank in (0, 1)]
        steps = list(zip(*shards, strict=True))
        read = [row for step in steps for batch in step for row in batch]
        # Step by step the ranks read on in the epoch's order; accelerate fills the last step from the epoch's start.
        assert read == order + order[: -problems % 4]
        alone = [BatchSamplerShard(BatchSampler(sampler, 2, False), 2, rank, even_batches=False) for rank in (0, 1)]
        assert sorted(row for shard in alone for batch in shard for row in batch) == sorted(order)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_go_on_in_the_middle_of_an_epoch(ranks):
    """The dataloaders that accelerate makes of the sampler, told the epoch as the trainer does it."""

    def loader(rank: int) -> tuple[DataLoader, CurriculumCallback]:
        sampler = sampler_of(16, seed=1)
        plain = DataLoader(range(32), batch_size=2, sampler=sampler)
        return prepare_data_loader(plain, num_processes=ranks, process_index=rank), CurriculumCallback(sampler)

    def batches(loader: DataLoader, callback: CurriculumCallback, epoch: float) -> list[list[int]]:
        callback.on_epoch_begin(None, TrainerState(epoch=epoch), None)
        loader.set_epoch(int(epoch))
        return [batch.tolist() for batch in loader]

    for rank in range(ranks):
        whole, callback = loader(rank)
        epochs = [batches(whole, callback, float(epoch)) for epoch in range(3)]
        expected = [sampler_of(16, seed=1).epoch_rows(epoch) for epoch in range(3)]
        for rows, order in zip(epochs, expected, strict=True):
            assert rows == [order[start : start + 2] for start in range(2 * rank, 16, 2 * ranks)]
        resumed, callback = loader(rank)
        assert batches(skip_first_batches(resumed, 3), callback, 1 + 3 * ranks / 8) == epochs[1][3:]
        assert batches(resumed, callback, 2.0) == epochs[2]


class Visits:
    """The rows that a module has seen, in order, each as its tokens without padding."""

    def __init__(self, module: torch.nn.Module, padding: int = -1) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.padding = padding
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, arguments, options) -> None:
        for row in options["input_ids"].tolist():
            self.rows.append(tuple(token for token in row if token != self.padding))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


@pytest.mark.parametrize(("accumulation", "stop"), [(1, 7), (1, 5), (2, 4)], ids=["middle", "end", "accumulated"])
def test_a_resumed_trainer_visits_what_the_uninterrupted_one_does(accumulation, stop, tmp_path):
    """Ten problems in batches of two: an epoch has five batches, so five steps, or three that accumulate two."""
    dataset = token_pairs(10)

    def trainer(folder: str, *callbacks: TrainerCallback) -> tuple[Trainer, Visits]:
        model = tiny_model("llama", torch.float32).train()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            use_cpu=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="steps",
            save_steps=stop,
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            disable_tqdm=True,
            seed=11,
        )
        trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=list(callbacks))
        install_curriculum(trainer)
        return trainer, Visits(model)

    whole, visits = trainer("whole")
    whole.train()
    order = CurriculumSampler.from_dataset(dataset, [0.0, 0.5, 1.0], seed=11)
    expected = [tuple(dataset[row]["input_ids"]) for epoch in range(3) for row in order.epoch_rows(epoch)]
    assert visits.rows == expected
    forms = [[row[0] - FIRST_WORD for row in expected[start : start + 10]] for start in (0, 10, 20)]
    assert [sum(epoch) for epoch in forms] == [0, 5, 10]

    stopped, before = trainer("stopped", StopAt(stop))
    stopped.train()
    resumed, after = trainer("stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{stop}"))
    assert 0 < len(before.rows) < 30
    assert before.rows + after.rows == expected
    assert resumed.state.global_step == whole.state.global_step
    trained = dict(whole.model.named_parameters())
    assert all(torch.equal(weight, trained[name]) for name, weight in resumed.model.named_parameters())


def sft_trainer(dataset: Dataset, folder, **options) -> SFTTrainer:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = tiny_config("llama", len(tokenizer), initializer_range=0.05)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = MultiverseForCausalLM(config)
    add_multiverse_tokens(model, tokenizer)
    arguments = SFTConfig(
        output_dir=str(folder),
        **{
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
            "max_length": 4096,
            "disable_tqdm": True,
            **options,
        },
    )
    return SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)


@pytest.fixture(scope="module")
def problems() -> Dataset:
    """Four short problems in both forms."""
    drawn = generate_problems(4, seed=1, options=ProblemOptions(paths=(2, 2), terms=(2, 2), nested=0.0))
    return pair_forms(*(Dataset.from_list([each.messages(form) for each in drawn]) for form in FORMS))


def test_the_stock_sft_trainer_trains_by_the_curriculum(problems, tmp_path):
    trainer = sft_trainer(problems, tmp_path, shuffle_dataset=True)
    sampler = install_curriculum(trainer)
    assert sampler.shares == (0.0, 0.5, 1.0)
    prepared = trainer.train_dataset
    assert len(prepared) == 8
    # The backbone, since the trainer's own head goes past the model's `forward`.
    visits = Visits(trainer.model.model, trainer.processing_class.pad_token_id)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 6
    row_of = {tuple(ids): row for row, ids in enumerate(prepared["input_ids"])}
    seen = [row_of[row] for row in visits.rows]
    assert seen == [row for epoch in range(3) for row in sampler.epoch_rows(epoch)]
    for epoch, parallel in enumerate((0, 2, 4)):
        rows = prepared.select(seen[4 * epoch : 4 * epoch + 4])
        assert sorted(rows["pair"]) == [0, 1, 2, 3]
        assert Counter(rows["form"])["parallel"] == parallel
    assert all(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    # Samples are counted as visits, not as rows of the dataset; other dataloaders count as before.
    assert trainer.num_examples(trainer.get_train_dataloader()) == 4
    assert trainer.num_examples(trainer.get_test_dataloader(prepared)) == 8


def test_rows_that_the_trainer_drops_leave_the_others_paired(problems, tmp_path):
    """A prompt that fills `max_length` leaves nothing to learn, and SFTTrainer drops the row."""
    rows = problems.to_list()
    rows[1]["prompt"][1]["content"] += "?" * 4096
    trainer = sft_trainer(Dataset.from_list(rows), tmp_path)
    assert len(trainer.train_dataset) == 7
    with pytest.raises(ValueError, match="first is pair 1"):
        install_curriculum(trainer)
    sampler = install_curriculum(trainer, unpaired="drop")
    for epoch in range(3):
        assert sorted(trainer.train_dataset.select(sampler.epoch_rows(epoch))["pair"]) == [0, 2, 3]


def test_installing_again_replaces_the_curriculum(problems, tmp_path):
    trainer = sft_trainer(problems, tmp_path, seed=7)
    first = install_curriculum(trainer)
    second = install_curriculum(trainer, [1.0, 0.5, 0.0], seed=3)
    assert (first.seed, second.seed) == (7, 3)
    assert trainer._get_train_sampler() is second
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, CurriculumCallback)]
    assert [each.sampler for each in callbacks] == [second]
    trainer.train_dataset = trainer.train_dataset.select(range(6))
    with pytest.raises(ValueError, match=r"had 8 rows .* has 6 now"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "`args.packing` is on"),
        ({"train_sampling_strategy": "group_by_length"}, "`args.train_sampling_strategy` is 'group_by_length'"),
        ({"max_steps": 2}, "`args.max_steps` is 2"),
        ({"num_train_epochs": 2}, "3 shares, but the run has 2 epochs"),
    ],
    ids=["packing", "lengths", "steps", "epochs"],
)
def test_trainers_that_leave_the_curriculum_no_choice_are_refused(problems, tmp_path, options, message):
    trainer = sft_trainer(problems, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        install_curriculum(trainer, [0.0, 0.5, 1.0] if "num_train_epochs" in options else "linear")


def test_a_run_counted_in_steps_takes_its_epochs_from_the_argument_or_the_list(problems, tmp_path):
    trainer = sft_trainer(problems, tmp_path, max_steps=2)
    assert install_curriculum(trainer, epochs=5).shares == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert install_curriculum(trainer, [0.25, 0.5]).shares == (0.25, 0.5)


def test_streams_are_refused(problems, tmp_path):
    trainer = sft_trainer(problems, tmp_path, max_steps=2)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="without streaming"):
        install_curriculum(trainer, epochs=2)


def test_bad_schedules_are_named():
    for schedule, epochs, message in [
        ("linear", None, "`epochs` is needed"),
        ("linear", 0, "`epochs` must be positive, got 0"),
        ([], None, "`epochs` must be positive"),
        ("cosine", 3, "`schedule` must be 'linear'"),
        ([0.0, 1.0], 3, "2 shares, but the run has 3 epochs"),
        ([0.0, 1.5], None, "got 1.5 for epoch 1"),
        (lambda epoch, epochs: float("nan"), 2, "got nan for epoch 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            epoch_shares(schedule, epochs)


def test_bad_pairs_are_named():
    sequential, parallel = (Dataset.from_list(token_rows(form, 3)) for form in FORMS)
    with pytest.raises(ValueError, match="`sequential` has 3 rows and `parallel` 2"):
        pair_forms(sequential, parallel.select([0, 1]))
    with pytest.raises(ValueError, match="`parallel` has a column 'pair'"):
        pair_forms(sequential, parallel.add_column("pair", [0, 1, 2]))
    with pytest.raises(ValueError, match=r"`sequential` has rows whose column 'form' says \['parallel'\]"):
        pair_forms(parallel.add_column("form", ["parallel"] * 3), sequential)
    for columns, message in [
        ({"pair": [0, 0]}, r"lacks the columns \['form'\]"),
        ({"pair": [0, 0], "form": ["parallel", "both"]}, r"column 'form' says \['both'\]"),
        ({"pair": [0, 0, 0], "form": ["parallel", "sequential", "parallel"]}, "pair 0 2 times in parallel form"),
        ({"pair": [0, 1], "form": ["parallel", "sequential"]}, "2 problems in one form only"),
    ]:
        with pytest.raises(ValueError, match=message):
            CurriculumSampler.from_dataset(Dataset.from_dict(columns), [1.0])
    lone = Dataset.from_dict({"pair": [0, 1], "form": ["parallel", "sequential"]})
    with pytest.raises(ValueError, match="no problem in both forms"):
        CurriculumSampler.from_dataset(lone, [1.0], unpaired="drop")
    with pytest.raises(ValueError, match="`unpaired`"):
        CurriculumSampler.from_dataset(lone, [1.0], unpaired="keep")
    with pytest.raises(ValueError, match="`seed`"):
        sampler_of(2, seed=-1)
    with pytest.raises(ValueError, match="got 2 and 1"):
        CurriculumSampler([0, 1], [2], [1.0])
