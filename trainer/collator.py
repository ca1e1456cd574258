"""Layouts made where batches are made: in the dataloader's workers, while the model trains on the batch before.

A Multiverse model reads mask and positions off `input_ids` by itself, and nothing here changes what it computes. But
it reads tags in Python, while the accelerator waits. With a `LayoutCollator` around the trainer's own collator,
batches bring what was read as plain tensors (`PreparedLayout`), and the model goes straight to its mask.

```python
trainer = SFTTrainer(model, SFTConfig(output_dir="runs/own", dataloader_num_workers=2), train_dataset=dataset)
add_layouts(trainer)  # also DPOTrainer, and transformers' own Trainer
trainer.train()
```

The layout serves forward passes without a cache: pass `use_cache=False` in a loop of your own, as all trainers do.
With a cache, the model reads the tags once more, for whoever goes on from it.
"""

from collections.abc import Callable
from typing import Any

import torch
from multiverse.configuration_multiverse import MultiverseConfig
from multiverse.prepared_layout import PreparedLayout
from multiverse.tags import check_token_ids
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


class LayoutCollator:
    """Adds to the batches of another collator what the model would read off them.

    Args:
        config (`MultiverseConfig`): the model's own (`model.config`): it names the tags and, at each batch, the
            attention implementation that the mask is for.
        collator (`Callable`, *optional*): makes the batches: tensors by name, with `input_ids` and whatever of
            `attention_mask`, `position_ids` and `cu_seq_lens_q` the model is to get. By default TRL's
            `DataCollatorForLanguageModeling`, which pads on the right.

    Raises:
        ValueError: if `config` names no tags, or no padding token for the default collator.

    Example:

    ```python
    >>> collator = LayoutCollator(model.config, DataCollatorForSeq2Seq(tokenizer))
    >>> loader = DataLoader(dataset, batch_size=8, num_workers=2, collate_fn=collator)
    >>> loss = model(**next(iter(loader)), use_cache=False).loss
    ```
    """

    def __init__(
        self, config: MultiverseConfig, collator: Callable[[list[dict[str, Any]]], Any] | None = None
    ) -> None:
        check_token_ids(getattr(config, "multiverse_token_ids", None))
        if collator is None:
            if config.pad_token_id is None:
                raise ValueError(
                    "`config.pad_token_id` is None, so the default collator cannot pad. Set it to "
                    "`tokenizer.pad_token_id`, or pass a `collator`."
                )
            collator = DataCollatorForLanguageModeling(pad_token_id=config.pad_token_id)
        self.config = config
        self.collator = collator

    @property
    def tokenizer(self) -> Any:
        """The wrapped collator's tokenizer, which the Trainer saves where it has no other; `None` without one."""
        return getattr(self.collator, "tokenizer", None)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Makes a batch, with its layout.

        Raises:
            ValueError: if the batch has no 2D `input_ids`, or an `attention_mask` of another shape.
        """
        batch = self.collator(features)
        input_ids, attention_mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            raise ValueError(
                f"`collator` made a batch whose `input_ids` is {_described(input_ids)}, not a tensor of shape (rows, "
                "length). Wrap the collator whose batches the model gets, with `return_tensors='pt'`."
            )
        if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
            raise ValueError(
                f"`collator` made an `attention_mask` that is {_described(attention_mask)} for `input_ids` that are "
                f"{_described(input_ids)}. Make a mask of the padding in the shape of `input_ids`, or none."
            )
        layout = PreparedLayout.prepare(
            self.config, input_ids, attention_mask, batch.get("position_ids"), batch.get("cu_seq_lens_q")
        )
        batch.update(layout.arguments())
        return batch


def add_layouts(trainer: Trainer) -> None:
    """Puts a `LayoutCollator` around the collator of a trainer. To be called before training or evaluation starts.

    This is the way in wherever `SFTTrainer` accepts no collator but its own (packing, padding-free).

    Args:
        trainer (`Trainer`): any trainer whose collator makes batches for the model (`Trainer`, `SFTTrainer`,
            `DPOTrainer`), changed in place.

    Raises:
        ValueError: if its model has no tags.
    """
    if not isinstance(trainer.data_collator, LayoutCollator):
        trainer.data_collator = LayoutCollator(trainer.model.config, trainer.data_collator)  # type: ignore[union-attr]


def _described(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
