"""What stands beside the weights of every saved Multiverse model: its code, and a model card."""

import os

from multiverse.hub_card.remote_code import write_remote_code
from transformers import PreTrainedConfig


def write_beside(folder: str | os.PathLike, config: PreTrainedConfig, name: str | None = None) -> None:
    """Writes the code anew, and a card where nobody has written one.

    Args:
        folder (`str` or `os.PathLike`): of the checkpoint.
        config (`PreTrainedConfig`): of the model.
        name (`str`, *optional*): of the model in its card; by default the folder's.
    """
    write_remote_code(folder)
    # Here, because the card's packages take a while to load and only those who save need them.
    from multiverse.hub_card.model_card import write_card_where_none_is

    write_card_where_none_is(folder, config, name)
