"""Leaves the tokens that the decoder forces out of the training loss."""

from typing import Any

from datasets import Dataset, IterableDataset
from multiverse.configuration_multiverse import MultiverseConfig
from multiverse.forced import HeaderTokens, forced_token_mask
from multiverse.layout import BranchLayout

IGNORE_INDEX = -100


def mask_forced_labels(
    dataset: Dataset | IterableDataset, config: MultiverseConfig, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """Sets the labels of engine-forced tokens to -100 in a tokenised dataset, packed or not.

    Made for `SFTTrainer.train_dataset` after the trainer has prepared it, so that every option of the stock trainer
    (chat templates, completion-only loss, truncation, packing) has had its say.

    Args:
        dataset (`Dataset` or `IterableDataset`): with columns `input_ids`, `labels` and, when packed, `seq_lengths`.
        config (`MultiverseConfig`): names the tags, separators and label pieces.
        num_proc (`int`, *optional*): worker processes.

    Raises:
        ValueError: if the columns are missing or the configuration names no tags.
    """
    columns = dataset.column_names
    if columns is not None and not {"input_ids", "labels"} <= set(columns):
        raise ValueError(
            f"`dataset` needs the columns 'input_ids' and 'labels', got {columns}. Pass the dataset that SFTTrainer "
            "has prepared (`trainer.train_dataset`)."
        )
    header = HeaderTokens(config.multiverse_separator_ids, config.multiverse_label_ids)
    token_ids = dict(config.multiverse_token_ids or {})

    def mask(row: dict[str, Any]) -> dict[str, list[int]]:
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        layout = BranchLayout.from_token_ids(row["input_ids"], token_ids, starts)
        forced = forced_token_mask(layout, row["input_ids"], header).tolist()
        labels = zip(row["labels"], forced, strict=True)
        return {"labels": [IGNORE_INDEX if hide else label for label, hide in labels]}

    workers = {} if isinstance(dataset, IterableDataset) else {"num_proc": num_proc, "desc": "Masking forced tokens"}
    return dataset.map(mask, **workers)
