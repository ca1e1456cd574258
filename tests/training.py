"""Short training runs of tiny models, and the loss that they must have by definition.

The definition: every document by itself, through the plain base class, under the mask and positions of the brute-force
reference. Nothing of `multiverse` takes part in it but the weights.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from forward import BASES, additive, reference_mask, row
from multiverse import MultiverseForCausalLM, add_multiverse_tokens
from multiverse.trainer.labels import IGNORE_INDEX
from multiverse.trainer.synthetic import ProblemOptions, generate_problems
from reference_layout import reference_layout
from tiny import tiny_config, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig

SHORT = ProblemOptions(paths=(2, 3), terms=(2, 3), nested=0.5)

#: Options of a run of two steps on the CPU, for every trainer.
RUN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
}


def short_samples(count: int = 4, seed: int = 1) -> Dataset:
    """Short problems as prompt and completion, at least one of them nested."""
    problems = generate_problems(count, seed=seed, options=SHORT)
    if not any(each.parts for problem in problems for each in problem.sums):
        raise ValueError(f"`seed` {seed} draws no nested problem. Take another.")
    return Dataset.from_list([problem.messages("parallel") for problem in problems])


def fresh(
    architecture: str = "llama", tied: bool = True, scale: float = 0.05, seed: int = 0
) -> tuple[MultiverseForCausalLM, PreTrainedTokenizerBase]:
    """A tiny model with its tags and tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    # By default weights of the size that trained models have: float32 rounding is of theirs, too.
    config = tiny_config(architecture, len(tokenizer), tie_word_embeddings=tied, initializer_range=scale)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = MultiverseForCausalLM(config)
    add_multiverse_tokens(model, tokenizer)
    return model, tokenizer


def sft_config(folder: Path, **options) -> SFTConfig:
    """Options of a short run on the CPU."""
    return SFTConfig(output_dir=str(folder), **{**RUN, "max_length": 4096, **options})


def losses(trainer: Trainer) -> list[float]:
    """The losses that `trainer` has logged while training."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Document(NamedTuple):
    """Token ids, and which of them the loss counts (`IGNORE_INDEX`: not)."""

    ids: list[int]
    labels: list[int]

    def part(self, start: int, end: int) -> "Document":
        """The tokens from `start` to `end` as a document of their own."""
        return Document(self.ids[start:end], self.labels[start:end])

    def pieces(self, length: int) -> list["Document"]:
        """Cut into documents of `length` tokens; the last may be shorter."""
        return [self.part(start, start + length) for start in range(0, len(self.ids), length)]


def joined(documents: Iterable[Document]) -> Document:
    """One document of all tokens in order."""
    ids, labels = (list(chain.from_iterable(parts)) for parts in zip(*documents, strict=True))
    return Document(ids, labels)


def document(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, str]]) -> Document:
    """A conversation in the chat template of `tiny_tokenizer`. The loss counts what the assistant says and its
    ends of turn."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        header = tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(f"{message['content']}<|im_end|>", add_special_tokens=False)
        ids += [*header, *body]
        labels += [IGNORE_INDEX] * len(header)
        labels += body if message["role"] == "assistant" else [IGNORE_INDEX] * len(body)
    return Document(ids, labels)


def documents_of(tokenizer: PreTrainedTokenizerBase, samples: Dataset) -> list[Document]:
    """Every prompt with its completion, which the loss counts."""
    return [document(tokenizer, sample["prompt"] + sample["completion"]) for sample in samples]


def plain_twin(model: MultiverseForCausalLM) -> PreTrainedModel:
    """The base class with the weights of `model`, which it does not share."""
    architecture = model.config.model_type.removeprefix("multiverse_")
    fields = {"tie_word_embeddings": model.config.tie_word_embeddings, "pad_token_id": model.config.pad_token_id}
    twin = BASES[architecture](tiny_config(architecture, model.config.vocab_size, **fields))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@cache
def _mask_and_positions(
    ids: tuple[int, ...], token_ids: tuple[tuple[str, int], ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = reference_layout(ids, dict(token_ids))
    return additive(reference_mask(layout), dtype), row(layout.positions)


def scores_by_definition(twin: PreTrainedModel, ids: Sequence[int], token_ids: Mapping[str, int]) -> torch.Tensor:
    """Log-probabilities over the vocabulary at every token but the last, `(N - 1, V)`.

    Args:
        token_ids (`Mapping[str, int]`): id of every tag; empty for plain causal attention.
    """
    mask, positions = _mask_and_positions(tuple(ids), tuple(sorted(token_ids.items())), twin.dtype)
    return twin(row(ids), attention_mask=mask, position_ids=positions).logits[0, :-1].log_softmax(-1)


def loss_by_definition(
    twin: PreTrainedModel, documents: Iterable[Document], token_ids: Mapping[str, int], smoothing: float = 0.0
) -> torch.Tensor:
    """Mean over all counted tokens of minus the log-probability, mixed with the mean over the vocabulary by the share
    of `smoothing`. The first token of a document is predicted by nothing."""
    found = []
    for ids, labels in documents:
        scores = scores_by_definition(twin, ids, token_ids)
        targets = torch.tensor(labels[1:])
        kept = targets != IGNORE_INDEX
        own = scores[kept, targets[kept]]
        found.append(-(1 - smoothing) * own - smoothing * scores[kept].mean(-1))
    return torch.cat(found).mean()


class Expectation(TrainerCallback):
    """Works out, before every optimiser step, the loss that the step must have.

    Args:
        loss (`Callable`): from the plain twin of the model and the ids of its tags to the loss.

    Attributes:
        losses (`list[float]`): by step.
        plain_causal (`list[float]`): what they would be if the tags meant nothing.
    """

    def __init__(self, loss: Callable[[PreTrainedModel, Mapping[str, int]], torch.Tensor]) -> None:
        self.loss = loss
        self.losses: list[float] = []
        self.plain_causal: list[float] = []

    @torch.no_grad()
    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        twin = plain_twin(model)
        self.losses.append(float(self.loss(twin, model.config.multiverse_token_ids)))
        self.plain_causal.append(float(self.loss(twin, {})))


def trained_by_definition(trainer: Trainer, expectation: Expectation, tolerance: float = 1e-4) -> None:
    """Trains, and raises unless every logged loss is the expected one and would show if it were not."""
    trainer.add_callback(expectation)
    trainer.train()
    found, wanted = losses(trainer), expectation.losses
    assert len(found) == len(wanted) == trainer.args.max_steps
    for step, (one, other, plain) in enumerate(zip(found, wanted, expectation.plain_causal, strict=True)):
        assert abs(one - other) <= tolerance, f"step {step}: {one}, by definition {other}"
        assert abs(other - plain) > 10 * tolerance, f"step {step}: branches change too little to be seen"
    assert abs(wanted[1] - wanted[0]) > 100 * tolerance, "the optimiser moved nothing"
