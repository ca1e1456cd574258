"""Stop strings as an evaluation means them: the answer is its text up to the first one, whatever was decoded when."""

from collections.abc import Mapping, Sequence

import torch
from multiverse.layout import read_sequence
from multiverse.tags import check_token_ids
from transformers import PreTrainedTokenizerBase, StoppingCriteria

#: A stop string may come in other tokens than its own encoding; so many more are looked at.
_MORE_TOKENS = 2


class StopOutsidePaths(StoppingCriteria):
    """Ends a request where its root branch has written a stop string.

    The caller cuts the text, which is in linear order, before the first stop string. When the root branch writes
    something, everything before it in that order is complete, so nothing that would be kept is lost. When a path does,
    earlier paths may still be at work: the request goes on, and the text is the same as one path at a time.

    Args:
        stop (`Sequence[str]`): stop strings.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        token_ids (`Mapping[str, int]`): id of every tag.
        context (`torch.LongTensor` of shape `(batch_size, length)`): the prompts; stop strings in them do not count.
        attention_mask (`torch.LongTensor` of shape `(batch_size, length)`, *optional*): 0 for padding.
    """

    def __init__(
        self,
        stop: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        token_ids: Mapping[str, int],
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        self.stop = [each for each in stop if each]
        self.tokenizer = tokenizer
        self.token_ids = check_token_ids(token_ids)
        encoded = [tokenizer.encode(each, add_special_tokens=False) for each in self.stop]
        self._lookback = max(map(len, encoded), default=0) + _MORE_TOKENS
        mask = torch.ones_like(context) if attention_mask is None else attention_mask
        # transformers' own loops show the padding too.
        rows = [row[kept.bool()].tolist() for row, kept in zip(context, mask, strict=True)] + context.tolist()
        self._prompts = sorted(rows, key=len, reverse=True)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: object) -> torch.Tensor:
        """Whether each row of `input_ids` ends here, shape `(rows,)`."""
        found = [self._stops(row) for row in input_ids]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)

    def _stops(self, row: torch.Tensor) -> bool:
        if not self._holds_stop(row[-self._lookback :].tolist()):
            return False
        ids = row.tolist()
        # A prompt that begins as another one does is taken for the longer: later is harmless, too early is not.
        start = next((len(prompt) for prompt in self._prompts if ids[: len(prompt)] == prompt), len(ids))
        return self._holds_stop(ids[max(start, len(ids) - self._lookback) :]) and self._in_root(ids)

    def _holds_stop(self, ids: list[int]) -> bool:
        text = self.tokenizer.decode(ids)
        return any(each in text for each in self.stop)

    def _in_root(self, ids: list[int]) -> bool:
        return read_sequence(ids, self.token_ids).branch == 0
