"""What a run logs about structure: by definition, from single documents, in every batching mode of stock trainers."""

import pickle
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from layout_samples import SAMPLES, every_kind_of_text, examples
from multiverse import BranchLayout, MultiverseForCausalLM
from multiverse.trainer import metrics
from multiverse.trainer.labels import IGNORE_INDEX
from multiverse.trainer.metrics import StructureMeter, summarise, watch
from multiverse.trainer.structure_counts import BATCH_KEY, COUNTS, CountingCollator, count_structure
from reference_layout import reference_layout
from strategies import Sample, encode, token_ids
from torch import nn
from training import (
    RUN,
    Document,
    document,
    documents_of,
    fresh,
    plain_twin,
    scores_by_definition,
    sft_config,
    short_samples,
)
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DPOConfig, DPOTrainer, SFTTrainer

LOSSES = ("loss_tags", "loss_content")


def counts_by_definition(sample: Sample, names: dict[str, int]) -> list[int]:
    """The columns of `COUNTS`: visible structure from the brute-force reference, problems document by document."""
    if not sample.ids:
        return [0] * len(COUNTS)
    starts = sorted({0, *(sample.starts or ())})
    ends = [*starts[1:], len(sample.ids)]
    branches = reference_layout(sample.ids, names, starts).branches
    spans = list(zip(starts, ends, strict=True))
    parallel = sum(branches[i] != branches[start] for start, end in spans for i in range(start, end))
    problems = [len(BranchLayout.from_token_ids(sample.ids[start:end], names).problems) for start, end in spans]
    return [
        len(sample.ids),
        parallel,
        len(spans),
        len(set(branches)),
        sum(problems),
        sum(map(bool, problems)),
    ]


def positions_of(sample: Sample) -> torch.Tensor:
    """Position ids as a packing collator makes them, shape `(1, N)`."""
    starts = sorted({0, *(sample.starts or ())})
    return torch.tensor([[i - max(start for start in starts if start <= i) for i in range(len(sample.ids))]])


def without_last_single(sample: Sample) -> Sample:
    """A document of one token at the end of a packed row cannot be told from what fills a row up."""
    starts = sorted({0, *(sample.starts or ())})
    ids = list(sample.ids)
    while len(starts) > 1 and len(ids) - starts[-1] == 1:
        ids = ids[: starts.pop()]
    return Sample(ids, starts)


@every_kind_of_text
@examples(40)
@given(data=st.data())
def test_counts_follow_the_reference_whatever_the_text_and_its_packing(kind: str, data: st.DataObject) -> None:
    sample = without_last_single(data.draw(SAMPLES[kind]))
    filling = data.draw(st.integers(0, 3)) if sample.ids else 0
    ids = torch.tensor([[*sample.ids, *[0] * filling]], dtype=torch.long)
    positions = torch.cat([positions_of(sample).long(), torch.zeros(1, filling, dtype=torch.long)], dim=1)
    expected = counts_by_definition(sample, token_ids)
    assert count_structure({"input_ids": ids, "position_ids": positions}, token_ids).tolist() == [expected]
    ends = [*sorted({0, *(sample.starts or ())})[1:], *range(len(sample.ids), ids.shape[1] + 1)]
    cumulative = torch.tensor([0, *ends], dtype=torch.int32)
    assert count_structure({"input_ids": ids, "cu_seq_lens_q": cumulative}, token_ids).tolist() == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
@examples(40)
@given(data=st.data())
def test_padding_counts_for_nothing(side: str, data: st.DataObject) -> None:
    texts = [data.draw(SAMPLES[kind]).ids for kind in ("trees", "truncated", "shuffled")]
    width = max(map(len, texts)) + 1
    padding = [[token_ids["<Path>"]] * (width - len(text)) for text in texts]
    pairs = list(zip(texts, padding, strict=True))
    ids = torch.tensor([fill + text if side == "left" else text + fill for text, fill in pairs])
    real = [([1] * len(text), [0] * len(fill)) for text, fill in pairs]
    mask = torch.tensor([fill + text if side == "left" else text + fill for text, fill in real])
    # Positions are no documents where there is a mask: the model does not look at them either.
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.zeros_like(ids)}
    expected = [counts_by_definition(Sample(text), token_ids) for text in texts]
    assert count_structure(batch, token_ids).tolist() == expected


def expected_logs(model: MultiverseForCausalLM, documents: Iterable[Document]) -> dict[str, float]:
    """What has to be logged for `documents`, each run by itself through the plain base class."""
    names, twin = model.config.multiverse_token_ids, plain_twin(model)
    losses: dict[bool, list[float]] = {True: [], False: []}
    counts = torch.zeros(len(COUNTS), dtype=torch.long)
    for ids, labels in documents:
        with torch.no_grad():
            scores = scores_by_definition(twin, ids, names)
        for place, target in enumerate(labels[1:]):
            if target != IGNORE_INDEX:
                losses[target in names.values()].append(-float(scores[place, target]))
        counts += torch.tensor(counts_by_definition(Sample(list(ids)), names))
    tokens, parallel, samples, branches, problems, malformed = counts.tolist()
    assert losses[True]
    assert 0 < malformed < samples < branches
    return {
        "loss_tags": sum(losses[True]) / len(losses[True]),
        "loss_content": sum(losses[False]) / len(losses[False]),
        "parallel_share": parallel / tokens,
        "branches_per_sample": branches / samples,
        "problems_per_sample": problems / samples,
        "malformed_samples": malformed,
    }


@pytest.fixture
def samples() -> list[dict]:
    """Four short problems, one of them cut off before its conclusion."""
    rows = short_samples().to_list()
    answer = rows[1]["completion"][0]
    answer["content"] = answer["content"].rpartition("<Conclusion>")[0]
    return rows


class Recorder(TrainerCallback):
    """Stands for wandb and its like: keeps what it is shown."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


def check_logs(trainer: Trainer, expected: dict[str, float], tolerance: float = 1e-5) -> None:
    """Two logs of training, and one of an evaluation, hold the expected numbers, wherever they are read."""
    recorder = next(each for each in trainer.callback_handler.callbacks if isinstance(each, Recorder))
    for logs in (trainer.state.log_history, recorder.logs):
        trained = [entry for entry in logs if "loss" in entry]
        evaluated = [entry for entry in logs if "eval_loss" in entry]
        assert (len(trained), len(evaluated)) == (2, 1)
        for prefix, entries in (("", trained), ("eval_", evaluated)):
            for entry in entries:
                found = {name: entry[prefix + name] for name in expected}
                assert found == pytest.approx(expected, abs=tolerance)
                assert isinstance(entry[f"{prefix}malformed_samples"], int)
        assert all(entry["tokens_per_second"] > 0 for entry in trained)


MODES = {
    "padded": {"per_device_train_batch_size": 2},
    "packed": {"per_device_train_batch_size": 1, "packing": True, "packing_strategy": "bfd"},
    "padding_free": {"per_device_train_batch_size": 2, "padding_free": True, "max_length": None},
    "label_smoothing": {"per_device_train_batch_size": 2, "label_smoothing_factor": 0.1},
    "workers": {"per_device_train_batch_size": 2, "dataloader_num_workers": 1},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", list(MODES))
def test_sft_trainer_logs_the_numbers_by_definition(mode, samples, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    model, tokenizer = fresh()
    documents = documents_of(tokenizer, samples)
    # Two rows of two documents, so that packing and accumulation meet.
    room = sum(sorted(len(each.ids) for each in documents)[-2:])
    options = {
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "max_length": room,
        "report_to": "recorder",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 2,
        **MODES[mode],
    }
    dataset = Dataset.from_list(samples)
    trainer = SFTTrainer(
        model, sft_config(tmp_path, **options), train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    assert watch(trainer) is watch(trainer)
    trainer.train()
    check_logs(trainer, expected_logs(model, documents))
    if mode != "label_smoothing":
        # Nothing but the losses' own weights stands between them and the trainer's loss.
        entry = trainer.state.log_history[0]
        assert min(entry[name] for name in LOSSES) <= entry["loss"] <= max(entry[name] for name in LOSSES)
    assert "loss_tags" in capsys.readouterr().out


def plain_trainer(samples: list[dict], folder, side: str = "left", **options) -> tuple[Trainer, list[Document]]:
    """A stock `Trainer` that pads on one side, and its documents."""
    model, tokenizer = fresh()
    documents = documents_of(tokenizer, samples)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            fill = [[value] * (width - len(row["input_ids"])) for row in rows]
            own = [row.get(name) or [1] * len(row["input_ids"]) for row in rows]
            return torch.tensor([f + o if side == "left" else o + f for f, o in zip(fill, own, strict=True)])

        names = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}
        return {name: padded(name, value) for name, value in names.items()}

    rows = Dataset.from_list([{"input_ids": each.ids, "labels": each.labels} for each in documents])
    arguments = TrainingArguments(str(folder), **{**RUN, "learning_rate": 0.0, **options})
    callbacks = [Recorder()]
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, callbacks=callbacks
    )
    return trainer, documents


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_trainer_logs_the_numbers_by_definition(side, samples, tmp_path, monkeypatch):
    # A few positions at a time, the last piece a shorter one.
    monkeypatch.setattr(metrics, "_LOGITS_AT_A_TIME", 290 * 7)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}
    trainer, documents = plain_trainer(samples, tmp_path, side, eval_steps=2, per_device_eval_batch_size=2, **options)
    watch(trainer)
    trainer.train()
    check_logs(trainer, expected_logs(trainer.model, documents))


def test_without_labels_in_the_forward_pass_the_structure_is_logged_alone(samples, tmp_path):
    trainer, documents = plain_trainer(samples, tmp_path, label_smoothing_factor=0.1)
    watch(trainer)
    trainer.train()
    expected = expected_logs(trainer.model, documents)
    for entry in [entry for entry in trainer.state.log_history if "loss" in entry]:
        assert not set(LOSSES) & set(entry)
        found = {name: entry[name] for name in expected if name not in LOSSES}
        assert found == pytest.approx({name: value for name, value in expected.items() if name not in LOSSES})


def test_dpo_trainer_logs_chosen_and_rejected_answers_alike(samples, tmp_path):
    model, tokenizer = fresh()
    pairs = [
        {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"]}
        for one, other in zip(samples, samples[1:] + samples[:1], strict=True)
    ]
    config = DPOConfig(str(tmp_path), **{**RUN, "learning_rate": 0.0, "max_steps": 1, "max_length": None})
    trainer = DPOTrainer(model, fresh()[0], config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    watch(trainer)
    trainer.train()
    answers = [document(tokenizer, pair["prompt"] + pair[kind]) for pair in pairs for kind in ("chosen", "rejected")]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    expected = expected_logs(model, answers)
    assert {name: entry[name] for name in expected} == pytest.approx(expected, abs=1e-5)


class Scorer(nn.Module):
    """Gives out log-probabilities as TRL's fused head does; takes no argument that is none of a model's."""

    def __init__(self, log_probs: torch.Tensor) -> None:
        super().__init__()
        self.log_probs = nn.Parameter(log_probs)

    def forward(self, input_ids=None, labels=None, shift_labels=None) -> SimpleNamespace:
        scored = labels is not None or shift_labels is not None
        return SimpleNamespace(log_probs=self.log_probs * 1 if scored else None)


IDS = encode(
    "a <Parallel> <Goal> <Outline> b </Outline> </Goal> <Path> c </Path> <Conclusion> </Conclusion> </Parallel>"
)
NAMES = dict(token_ids)
COUNTED = [13, 3, 1, 2, 0, 0]


def metered() -> tuple[Scorer, StructureMeter, dict[str, torch.Tensor]]:
    """A scorer, its meter, and a batch whose tag targets have loss 1 and whose other targets loss 10."""
    labels = torch.tensor([IDS])
    labels[0, :4] = IGNORE_INDEX
    log_probs = torch.tensor([[0.0, 0, 0] + [-1.0 if token in NAMES.values() else -10.0 for token in IDS[4:]]])
    model = Scorer(log_probs)
    return model, StructureMeter(model, NAMES), {"input_ids": torch.tensor([IDS]), "labels": labels}


ONCE = [*COUNTED, 7.0, 7, 20.0, 2]


def test_training_calls_that_build_a_graph_count_and_no_others():
    model, meter, batch = metered()
    model(**batch)
    # A reference policy scores the same batch, an old policy another one; then something is generated.
    with torch.no_grad():
        model(**batch)
        model(**{**batch, "input_ids": batch["input_ids"].clone()})
        model(batch["input_ids"][:, :3])
    assert meter.totals(training=True).tolist() == ONCE
    assert meter.totals(training=True).tolist() == [0] * 10
    # The same tensors again, as a loop over one batch hands them on.
    model(**batch)
    model(**batch)
    assert meter.totals(training=True).tolist() == [2 * each for each in ONCE]
    assert meter.totals(training=False).tolist() == [0] * 10


def test_a_second_call_without_gradients_adds_the_losses_that_the_first_lacked():
    model, meter, batch = metered()
    counts = torch.tensor([[1, 2, 3, 4, 5, 6], [10, 10, 10, 10, 10, 10]])
    model(batch["input_ids"], **{BATCH_KEY: counts})
    with torch.no_grad():
        model(**batch, **{BATCH_KEY: counts})
        model(**batch, **{BATCH_KEY: counts})
    assert meter.totals(training=True).tolist() == [11, 12, 13, 14, 15, 16, *ONCE[6:]]


def test_an_evaluation_counts_every_batch_once_and_apart_from_training():
    model, meter, batch = metered()
    model.eval()
    with torch.no_grad():
        model(**batch)
        model(**batch)
        model(input_ids=batch["input_ids"])
    assert meter.totals(training=True).tolist() == [0] * 10
    assert meter.totals(training=False).tolist() == ONCE
    with torch.no_grad():
        model(**batch)
    assert meter.totals(training=False).tolist() == ONCE


def test_labels_that_are_shifted_already_are_taken_as_they_are():
    model, meter, batch = metered()
    model(input_ids=batch["input_ids"], shift_labels=batch["labels"][:, 1:])
    assert meter.totals(training=True).tolist() == ONCE
    # An adapter that learns a prompt puts columns in front of those that have targets.
    model.log_probs.data = torch.cat([torch.full((1, 5), -99.0), model.log_probs.data], dim=1)
    model(**batch)
    assert meter.totals(training=True).tolist() == ONCE


def test_a_meter_that_is_removed_counts_nothing_more():
    model, meter, batch = metered()
    meter.remove()
    model(**batch)
    assert meter.totals(training=True).tolist() == [0] * 10


def test_nothing_is_logged_of_what_there_is_nothing_of():
    assert summarise([0.0] * 10) == {}
    assert summarise([0.0] * 6 + [3.0, 2, 0, 0]) == {"loss_tags": 1.5}
    assert set(summarise([5.0, 0, 1, 1, 0, 0, 0, 0, 3, 2])) == {
        "loss_content",
        "parallel_share",
        "branches_per_sample",
        "problems_per_sample",
        "malformed_samples",
    }


def test_tokens_per_second_leave_out_evaluation_and_saving(samples, tmp_path, monkeypatch):
    trainer, _ = plain_trainer(samples, tmp_path)
    seen = watch(trainer)
    clock = iter([100.0, 103.0, 103.5, 113.5, 200.0, 207.0, 207.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(seen.meter, "totals", lambda training: torch.tensor([600.0] + [0.0] * 9))
    state = SimpleNamespace(log_history=[{}])
    seen.on_train_begin(None, state, None)  # at 100
    seen.on_step_end(None, state, None)  # 3 seconds
    seen.on_log(None, state, None, logs={"a script's own": 1.0})  # at 103.5
    seen.on_evaluate(None, state, None)  # at 113.5
    seen.on_save(None, state, None)  # at 200
    seen.on_step_end(None, state, None)  # 7 seconds
    logs = {"loss": 1.0, "learning_rate": 0.0}
    seen.on_log(None, state, None, logs=logs)
    assert logs["tokens_per_second"] == 60.0
    assert state.log_history == [{key: logs[key] for key in logs if key not in ("loss", "learning_rate")}]


def test_a_counting_collator_adds_counts_where_there_are_labels_and_is_else_the_other():
    class Collator:
        tokenizer = "a tokenizer"

        def __call__(self, rows):
            return rows if isinstance(rows, list) else dict(rows)

    collator = CountingCollator(Collator(), NAMES)
    ids = torch.tensor([IDS, IDS])
    batch = collator({"input_ids": ids, "labels": ids})
    assert batch.pop(BATCH_KEY).tolist() == [COUNTED, COUNTED]
    assert set(batch) == {"input_ids", "labels"}
    assert set(collator({"input_ids": ids})) == {"input_ids"}
    assert collator([{"prompt": "as under GRPO"}]) == [{"prompt": "as under GRPO"}]
    assert collator.tokenizer == "a tokenizer"
    with pytest.raises(AttributeError):
        _ = collator.missing
    copied = pickle.loads(pickle.dumps(CountingCollator(dict, NAMES)))
    assert copied({"input_ids": ids, "labels": ids})[BATCH_KEY].tolist() == [COUNTED, COUNTED]


def test_watching_can_be_undone(samples, tmp_path):
    trainer, _ = plain_trainer(samples, tmp_path)
    collator, callbacks = trainer.data_collator, list(trainer.callback_handler.callbacks)
    seen = watch(trainer)
    assert trainer.callback_handler.callbacks == [seen, *callbacks]
    seen.remove()
    assert trainer.data_collator is collator
    assert trainer.callback_handler.callbacks == callbacks
    trainer.train()
    assert not any("parallel_share" in entry for entry in trainer.state.log_history)


def test_what_cannot_be_watched_is_named(samples, tmp_path, monkeypatch):
    trainer, _ = plain_trainer(samples, tmp_path)
    trainer.model_init = fresh
    with pytest.raises(ValueError, match=r"`trainer\.model_init`"):
        watch(trainer)
    trainer.model_init = None
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(ValueError, match=r"`trainer.args.n_gpu` is 2"):
        watch(trainer)
    monkeypatch.undo()
    trainer.model.config.multiverse_token_ids = None
    with pytest.raises(ValueError, match="add_multiverse_tokens"):
        watch(trainer)
