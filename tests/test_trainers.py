"""Multiverse models under every trainer: real optimiser steps, each with the loss that it must have by definition.

The definition (`training.py`) takes every document by itself through the plain base class. What counts as a document
where a trainer cuts text is said at each case.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from cases import quick_collection  # noqa: F401
from datasets import Dataset
from multiverse import MultiverseForCausalLM
from torch.nn.functional import logsigmoid
from training import (
    RUN,
    Document,
    Expectation,
    document,
    documents_of,
    fresh,
    joined,
    loss_by_definition,
    plain_twin,
    scores_by_definition,
    sft_config,
    short_samples,
    trained_by_definition,
)
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTTrainer

pytestmark = pytest.mark.usefixtures("quick_collection")  # trainers collect at the start of every run

#: Weights at which branches show in the loss, and float32 still keeps it to 1e-4.
SCALE = 0.2
#: Shorter than every sample, and within a block of most.
CUT = 170


@pytest.fixture
def samples() -> Dataset:
    return short_samples()


def expected(documents: list[Document], smoothing: float = 0.0) -> Expectation:
    return Expectation(lambda twin, token_ids: loss_by_definition(twin, documents, token_ids, smoothing))


def whole(documents: list[Document]) -> list[Document]:
    return documents


def cut(documents: list[Document]) -> list[Document]:
    """What `max_length` leaves: a prefix, whose layout is that of the prefix (blocks stay open)."""
    return [each.part(0, CUT) for each in documents]


def fragments(documents: list[Document]) -> list[Document]:
    """What `bfd_split` makes: pieces that see nothing of each other, each read as if nothing had come before."""
    return [piece for each in documents for piece in each.pieces(CUT)]


def rows(documents: list[Document]) -> list[Document]:
    """What `wrapped` makes: rows of one length, cut from all samples after one another. A row says nothing of the
    samples it is made of, so it is one document, as for every model; what it starts in the middle of is not known, and
    tags that no `<Parallel>` of the same row opened are ordinary tokens."""
    return joined(documents).pieces(CUT)


# All samples are in every batch, so that a step's loss does not depend on their order.
SFT_MODES: dict[str, tuple[dict, Callable[[list[Document]], list[Document]]]] = {
    "padded": ({}, whole),
    "accumulated": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, whole),
    "truncated": ({"max_length": CUT}, cut),
    "padding free": ({"padding_free": True, "max_length": None}, whole),
    "padding free to a multiple": ({"padding_free": True, "max_length": None, "pad_to_multiple_of": 64}, whole),
    "bfd": ({"packing": True, "packing_strategy": "bfd", "max_length": 700}, whole),
    "bfd, truncated": ({"packing": True, "packing_strategy": "bfd", "max_length": CUT}, cut),
    "bfd_split": ({"packing": True, "packing_strategy": "bfd_split", "max_length": CUT}, fragments),
    "wrapped": ({"packing": True, "packing_strategy": "wrapped", "max_length": CUT}, rows),
    "gradient checkpointing": ({"gradient_checkpointing": True}, whole),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        whole,
    ),
    "selective checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
        whole,
    ),
}


@pytest.mark.parametrize("mode", SFT_MODES)
def test_sft_trains_with_the_loss_of_single_documents(mode: str, samples: Dataset, tmp_path: Path) -> None:
    options, parts = SFT_MODES[mode]
    model, tokenizer = fresh(scale=SCALE)
    documents = parts(documents_of(tokenizer, samples))
    config = sft_config(tmp_path, **{"per_device_train_batch_size": 64, **options})
    trainer = SFTTrainer(model, config, train_dataset=samples, processing_class=tokenizer)
    trained_by_definition(trainer, expected(documents))


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding free"])
def test_sft_on_the_assistants_tokens_alone(padding_free: bool, samples: Dataset, tmp_path: Path) -> None:
    model, tokenizer = fresh(scale=SCALE)
    turns = [sample["prompt"] + sample["completion"] for sample in samples]
    conversations = [one + other[1:] for one, other in zip(turns, turns[1:] + turns[:1], strict=True)]
    documents = [document(tokenizer, messages) for messages in conversations]
    dataset = Dataset.from_dict({"messages": conversations})
    config = sft_config(tmp_path, assistant_only_loss=True, padding_free=padding_free, max_length=None)
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    trained_by_definition(trainer, expected(documents))


def test_sft_on_plain_text(samples: Dataset, tmp_path: Path) -> None:
    model, tokenizer = fresh(scale=SCALE)
    texts = [sample["completion"][0]["content"] for sample in samples]
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in texts]
    dataset = Dataset.from_dict({"text": texts})
    trainer = SFTTrainer(model, sft_config(tmp_path), train_dataset=dataset, processing_class=tokenizer)
    trained_by_definition(trainer, expected([Document(each, each) for each in ids]))


@pytest.mark.parametrize("option", ["label_smoothing_factor", "loss_type"])
def test_sft_with_other_losses(option: str, samples: Dataset, tmp_path: Path) -> None:
    model, tokenizer = fresh(scale=SCALE)
    documents = documents_of(tokenizer, samples)
    smoothing = 0.1 if option == "label_smoothing_factor" else 0.0
    value = smoothing or "dft"

    def dft(twin: PreTrainedModel, token_ids: Mapping[str, int]) -> torch.Tensor:
        found = []
        for each in documents:
            probabilities = target_scores(twin, each, token_ids)
            found.append(-probabilities * probabilities.exp())
        return torch.cat(found).mean()

    trainer = SFTTrainer(
        model, sft_config(tmp_path, **{option: value}), train_dataset=samples, processing_class=tokenizer
    )
    if smoothing:
        trained_by_definition(trainer, expected(documents, smoothing))
    else:
        # Weighted with the probabilities, which are far below 1: the whole loss is.
        trained_by_definition(trainer, Expectation(dft), tolerance=1e-6)


def target_scores(twin: PreTrainedModel, each: Document, token_ids: Mapping[str, int]) -> torch.Tensor:
    """Log-probabilities of the counted tokens of a document."""
    scores, targets = scores_by_definition(twin, each.ids, token_ids), torch.tensor(each.labels[1:])
    kept = targets >= 0
    return scores[kept, targets[kept]]


# transformers' own Trainer


def plain_trainer(
    model: MultiverseForCausalLM, documents: list[Document], collator: Callable, folder: Path, **options
) -> Trainer:
    dataset = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in documents])
    arguments = TrainingArguments(**{**RUN, "output_dir": str(folder), **options})
    return Trainer(model, arguments, collator, train_dataset=dataset, eval_dataset=dataset)


def padding_on_the(side: str) -> Callable[[PreTrainedTokenizerBase], Callable]:
    def collator(tokenizer: PreTrainedTokenizerBase) -> Callable:
        tokenizer.padding_side = side
        return DataCollatorForSeq2Seq(tokenizer)

    return collator


PLAIN_MODES: dict[str, tuple[dict, Callable[[PreTrainedTokenizerBase], Callable]]] = {
    "right": ({}, padding_on_the("right")),
    "left": ({}, padding_on_the("left")),
    "accumulated": (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        padding_on_the("right"),
    ),
    "flattened": ({}, lambda tokenizer: DataCollatorWithFlattening()),
    "flattened with lengths": ({}, lambda tokenizer: DataCollatorWithFlattening(return_flash_attn_kwargs=True)),
    "checkpointing": ({"activation_checkpointing": True}, padding_on_the("right")),
    "label smoothing": ({"label_smoothing_factor": 0.1}, padding_on_the("right")),
}


@pytest.mark.parametrize("mode", PLAIN_MODES)
def test_the_plain_trainer_trains_with_the_loss_of_single_documents(
    mode: str, samples: Dataset, tmp_path: Path
) -> None:
    options, collator_of = PLAIN_MODES[mode]
    model, tokenizer = fresh(scale=SCALE)
    documents = documents_of(tokenizer, samples)
    trainer = plain_trainer(model, documents, collator_of(tokenizer), tmp_path, **options)
    smoothing = options.get("label_smoothing_factor", 0.0)
    trained_by_definition(trainer, expected(documents, smoothing))
    with torch.no_grad():
        wanted = loss_by_definition(plain_twin(model), documents, model.config.multiverse_token_ids, smoothing)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(wanted), abs=1e-4)


# Preferences


def preferences(samples: Dataset) -> Dataset:
    """Every answer is preferred to that of another problem."""
    answers = samples["completion"]
    return Dataset.from_dict({"prompt": samples["prompt"], "chosen": answers, "rejected": [*answers[1:], answers[0]]})


def dpo_config(folder: Path, **options) -> DPOConfig:
    return DPOConfig(**{**RUN, "output_dir": str(folder), "max_length": 4096, "beta": 0.2, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"precompute_ref_log_probs": True, "gradient_checkpointing": True}],
    ids=["reference beside the policy", "precomputed reference, checkpointing"],
)
def test_dpo_trains_with_the_loss_of_single_answers(options: dict, samples: Dataset, tmp_path: Path) -> None:
    model, tokenizer = fresh(scale=SCALE)
    reference, _ = fresh(scale=SCALE, seed=1)
    pairs = preferences(samples)
    config = dpo_config(tmp_path, **options)

    def answers(name: str) -> list[Document]:
        return [document(tokenizer, each["prompt"] + each[name]) for each in pairs]

    chosen, rejected = answers("chosen"), answers("rejected")
    reference_twin, reference_ids = plain_twin(reference), reference.config.multiverse_token_ids

    def loss(twin: PreTrainedModel, token_ids: Mapping[str, int]) -> torch.Tensor:
        margins = []
        for better, worse in zip(chosen, rejected, strict=True):
            own, others = (
                target_scores(each, better, ids).sum() - target_scores(each, worse, ids).sum()
                for each, ids in ((twin, token_ids), (reference_twin, reference_ids))
            )
            margins.append(own - others)
        return -logsigmoid(config.beta * torch.stack(margins)).mean()

    trainer = DPOTrainer(model, reference, config, train_dataset=pairs, processing_class=tokenizer)
    trained_by_definition(trainer, Expectation(loss))


# A loop of one's own


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("offloaded", [False, True], ids=["", "saved tensors offloaded"])
def test_a_bare_loop_has_loss_and_gradients_of_single_documents(side: str, offloaded: bool, samples: Dataset) -> None:
    model, tokenizer = fresh(scale=SCALE)
    documents = documents_of(tokenizer, samples)
    features = [{"input_ids": ids, "labels": labels} for ids, labels in documents]
    batch = padding_on_the(side)(tokenizer)(features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = []
    for _ in range(3):
        twin = plain_twin(model)
        wanted = loss_by_definition(twin, documents, model.config.multiverse_token_ids)
        wanted.backward()
        optimizer.zero_grad()
        if offloaded:
            with torch.autograd.graph.save_on_cpu():
                loss = model(**batch).loss
        else:
            loss = model(**batch).loss
        loss.backward()
        assert float(loss) == pytest.approx(float(wanted), abs=1e-4)
        gradients = dict(twin.named_parameters())
        for name, parameter in model.named_parameters():
            expected_gradient = gradients[name].grad
            tolerance = 1e-4 * max(1.0, float(expected_gradient.abs().max()))
            assert (parameter.grad - expected_gradient).abs().max() <= tolerance, name
        optimizer.step()
        steps.append(float(loss))
    assert steps[2] < steps[1] < steps[0]
