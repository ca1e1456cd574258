"""What `generate(return_dict_in_generate=True)` returns."""

from dataclasses import dataclass

import torch
from multiverse.layout import BranchLayout
from multiverse.structure import Block
from transformers.generation import GenerateDecoderOnlyOutput

from .branch import Token
from .report import RequestReport
from .request import Request
from .sampling import SamplingOptions


@dataclass
class MultiverseGenerateOutput(GenerateDecoderOnlyOutput):
    """Sequences in linear order (LAYOUT.md, section 2) with what is known of every token.

    Shapes: B rows, N tokens of the longest row (prompt, padding on its own side, and continuation).

    Attributes:
        sequences (`torch.LongTensor` of shape `(B, N)`): prompt and continuation, padded on the right.
        sampled (`torch.BoolTensor` of shape `(B, N)`): True where the model was asked for the token; False for the
            prompt, forced tokens and padding.
        branch_ids (`torch.LongTensor` of shape `(B, N)`): branch of every token, -1 for padding.
        position_ids (`torch.LongTensor` of shape `(B, N)`): rotary position of every token, 0 for padding.
        logprobs (`torch.DoubleTensor` of shape `(B, N)`): log-probability of every sampled token under the model's raw
            logits; NaN where `sampled` is False.
        logits (`tuple[torch.FloatTensor]`, *optional*, with `output_logits=True`): per row the raw logits that every
            sampled token was drawn from, shape `(sampled tokens of the row, vocabulary)`, in linear order.
        scores (`tuple[torch.FloatTensor]`, *optional*, with `output_scores=True`): likewise the logits after the
            structure guard and the logits processors.
        blocks (`list[list[Block]]`): per row the tree of blocks, spans counted from the row's first real token.
        reports (`list[RequestReport]`): per row.
        past_key_values (`Cache`): keys and values of the first columns of `sequences`, for a second turn: those that
            every row has run, which is all but the last where the call was given a cache. transformers from 5.24 on
            calls the field `cache`, and still answers to this name.
    """

    sampled: torch.Tensor | None = None
    branch_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    blocks: list[list[Block]] | None = None
    reports: list[RequestReport] | None = None


def collect_output(
    input_ids: torch.Tensor,
    real: torch.Tensor,
    requests: list[Request],
    pad_token_id: int,
    kept: SamplingOptions,
) -> MultiverseGenerateOutput:
    """Puts the requests' tokens in linear order behind their prompts, and takes over the logits that they keep.

    Args:
        input_ids (`torch.LongTensor` of shape `(B, prompt)`): as given, padding included.
        real (`torch.BoolTensor` of shape `(B, prompt)`): False where `input_ids` is padding.
        requests (`list[Request]`): one per row.
        pad_token_id (`int`): fills up shorter rows.
        kept (`SamplingOptions`): says what the tokens carry.
    """
    tokens = [request.root.tokens() for request in requests]
    prompt = input_ids.shape[1]
    length = prompt + max(len(row) for row in tokens)
    shape = (len(requests), length)
    sequences = torch.full(shape, pad_token_id, dtype=torch.long)
    sequences[:, :prompt] = input_ids
    sampled = torch.zeros(shape, dtype=torch.bool)
    branch_ids = torch.full(shape, -1, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    logprobs = torch.full(shape, torch.nan, dtype=torch.float64)
    blocks = []
    for row, (request, made) in enumerate(zip(requests, tokens, strict=True)):
        end = prompt + len(made)
        sequences[row, prompt:end] = torch.tensor([token.id for token in made], dtype=torch.long)
        sampled[row, prompt:end] = torch.tensor([not token.forced for token in made], dtype=torch.bool)
        if kept.keep_logprobs:
            values = [torch.nan if token.choice is None else token.choice.logprob for token in made]
            logprobs[row, prompt:end] = torch.tensor(values, dtype=torch.float64)
        layout = BranchLayout.from_token_ids([*request.prompt, *(token.id for token in made)], request.rules.token_ids)
        places = torch.cat([real[row].nonzero().flatten(), torch.arange(prompt, end)])
        branch_ids[row, places] = layout.branch_ids
        position_ids[row, places] = layout.position_ids
        blocks.append(layout.blocks)
    device = input_ids.device
    return MultiverseGenerateOutput(
        sequences=sequences.to(device),  # type: ignore[arg-type]  # transformers annotates more narrowly
        sampled=sampled.to(device),
        branch_ids=branch_ids.to(device),
        position_ids=position_ids.to(device),
        logprobs=logprobs.to(device) if kept.keep_logprobs else None,
        logits=tuple(_stacked(row, "logits") for row in tokens) if kept.keep_logits else None,  # type: ignore[arg-type]
        scores=tuple(_stacked(row, "scores") for row in tokens) if kept.keep_scores else None,  # type: ignore[arg-type]
        blocks=blocks,
        reports=[RequestReport.of(request) for request in requests],
    )


def _stacked(tokens: list[Token], name: str) -> torch.Tensor:
    """What the sampled tokens keep under `name`, shape `(sampled tokens, vocabulary)`; they keep it no longer.

    Branches refer to each other in circles, so what hangs on them would stay until a garbage collection.
    """
    choices = [token.choice for token in tokens if token.choice is not None]
    stacked = torch.stack([getattr(choice, name) for choice in choices]) if choices else torch.empty(0, 0)
    for choice in choices:
        setattr(choice, name, None)
    return stacked
