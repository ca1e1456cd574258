"""Bytes that autograd keeps of one training step of a Multiverse model, worked out from its configuration.

Read off the operations of transformers' Qwen2, Qwen3 and Llama layers, PEFT's LoRA and TRL's fused LM head, one by
one; the tests hold it against every tensor that autograd really saves. Operations, not weights, decide what is kept:

- RMSNorm works in float32: its input and the reciprocal root are kept, and what it multiplies its weight with where
  that is trained.
- A linear layer keeps its input where its weight is trained, one copy for all that read it; under autocast every layer
  makes a copy of its own, of the input and of the weight.
- LoRA keeps the input of its first matrix and of its second; dropout keeps a mask and makes its input a new tensor.
- Rotary embeddings keep their tables, which all layers share. The MLP keeps four tensors of the intermediate size.
- Attention keeps queries, keys, values, output and log-sum-exp; eager attention its weights instead of the latter.
- PyTorch's fused attention reads an additive mask of N * N elements a row. On a CPU all layers share one, and what
  the blocks of a longer text give is joined in a copy, which the next layer keeps. On a GPU every layer makes its own
  from a bool mask and keeps it, and keys and values are repeated for the query heads.

Letters: T tokens of a micro-batch (rows * length), N length of a row, H hidden size, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

from multiverse.kernels import dense

#: How attention is computed: PyTorch's fused attention with a dense mask, matrix products with a dense mask, or a
#: kernel that takes a `PathMask`.
ATTENTION = ("sdpa", "eager", "path")

_FLOAT, _LONG = 4, 8
#: Tiles of TRL's fused LM head: so many tokens by so many columns of the vocabulary.
_HEAD_TOKENS, _HEAD_COLUMNS = 4096, 32_768
#: Tiles in float32 that the fused head holds at once on a CPU beside the one of the logits, forward and backward.
_HEAD_FORWARD_TILES, _HEAD_BACKWARD_TILES = 3.25, 7.25
_PAGE = 4096


@dataclass(frozen=True)
class TrainingStep:
    """What decides how much of a step's activations is kept, beside the model's configuration.

    Attributes:
        rows, length (`int`): shape of a micro-batch.
        attention (`str`): one of `ATTENTION`.
        stream (`int`): bytes of an element of the embeddings, and so of the residual stream.
        compute (`int`): bytes of an element in matrix products; less than `stream` under autocast.
        autocast (`bool`): whether matrix products convert what they are given to `compute`.
        trained (`bool`): whether the base model's own weights are trained.
        adapted (`frozenset[str]`): names of the linear layers with LoRA, such as `"q_proj"`.
        lora_rank (`int`), lora_item (`int`), lora_dropout (`float`): LoRA's rank, bytes of its weights, and dropout.
        trained_head (`bool`): whether the LM head, or any row of it, is trained.
        merged_head (`bool`): whether the head's weight is put together for every step (LoRA's trainable rows).
        on_gpu (`bool`): some operations keep other things on a GPU.
    """

    rows: int
    length: int
    attention: str = "sdpa"
    stream: int = 4
    compute: int = 4
    autocast: bool = False
    trained: bool = True
    adapted: frozenset[str] = frozenset()
    lora_rank: int = 0
    lora_item: int = 4
    lora_dropout: float = 0.0
    trained_head: bool = True
    merged_head: bool = False
    on_gpu: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length

    @property
    def blocked(self) -> bool:
        """Whether attention is `dense_sdpa` of a CPU."""
        return self.attention == "sdpa" and not self.on_gpu


@dataclass(frozen=True)
class LayerBytes:
    """What one decoder layer keeps.

    Attributes:
        activations (`int`): everything but the mask.
        mask (`int`): the layer's own additive copy of a dense mask.
    """

    activations: int
    mask: int

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.mask


def layer_bytes(config: Any, step: TrainingStep) -> LayerBytes:
    """What autograd keeps of one decoder layer between forward and backward.

    Args:
        config (`MultiverseConfig`): of the model.
        step (`TrainingStep`): of the run.
    """
    tokens, hidden, inner = step.tokens, config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * head_dim, kv_heads * head_dim
    kept = 2 * _norm_bytes(tokens * hidden, tokens, step.stream, step)
    kept += _linear_bytes(("q_proj", "k_proj", "v_proj"), hidden, (query, key, key), step.stream, step)
    if config.model_type.endswith("qwen3"):
        kept += _norm_bytes(tokens * query, tokens * heads, step.compute, step)
        kept += _norm_bytes(tokens * key, tokens * kv_heads, step.compute, step)
    grouped = step.attention == "path" or step.blocked
    kept += tokens * (2 * query + 2 * (key if grouped else query)) * step.compute
    mask = 0
    if step.attention == "eager":
        weights = tokens * heads * step.length
        # The softmax is in float32, and what multiplies the values a copy of it where they are not.
        kept += weights * (_FLOAT + (step.compute if step.compute != _FLOAT else 0))
    else:
        kept += tokens * heads * _FLOAT
        # The kernel of a GPU wants rows of 16 bytes and more.
        mask = 0 if grouped else tokens * math.ceil(step.length / 8) * 8 * step.compute
    joined = step.blocked and step.length > dense.QUERY_BLOCK
    kept += _linear_bytes(("o_proj",), query, (hidden,), step.compute, step, input_is_kept=not joined)
    kept += _linear_bytes(("gate_proj", "up_proj"), hidden, (inner, inner), step.stream, step)
    kept += 3 * tokens * inner * step.compute
    kept += _linear_bytes(("down_proj",), inner, (hidden,), step.compute, step)
    return LayerBytes(kept, mask)


def outer_bytes(config: Any, step: TrainingStep) -> int:
    """What autograd keeps before the layers: token ids of the embedding, and the rotary tables that all layers share.

    Args:
        config (`MultiverseConfig`): of the model.
        step (`TrainingStep`): of the run.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return step.tokens * _LONG + 2 * step.tokens * head_dim * step.stream


def head_bytes(config: Any, step: TrainingStep) -> int:
    """What autograd keeps after the layers: last norm and fused LM head.

    Args:
        config (`MultiverseConfig`): of the model.
        step (`TrainingStep`): of the run.
    """
    tokens, hidden = step.tokens, config.hidden_size
    targets = step.rows * (step.length - 1)
    kept = _norm_bytes(tokens * hidden, tokens, step.stream, step)
    # The last token predicts nothing; leaving it out is a view of a single row and a copy of several.
    kept += (tokens if step.rows == 1 and not step.on_gpu else targets) * hidden * step.stream
    # targets, log-sum-exp and entropy, and where the labels of both outputs are masked
    kept += targets * (_LONG + 2 * _FLOAT + 2)
    return kept + (config.vocab_size * hidden * step.stream if step.merged_head else 0)


def checkpoint_bytes(config: Any, step: TrainingStep) -> int:
    """What is kept of a layer under gradient checkpointing: its input."""
    return step.tokens * config.hidden_size * step.stream


def shared_mask_bytes(step: TrainingStep, levels: int) -> int:
    """The mask that all layers share, for a micro-batch with blocks.

    Args:
        step (`TrainingStep`): of the run.
        levels (`int`): intervals a key is hidden from at most; a nesting level of paths takes one, packing another.
    """
    if step.attention == "path":
        return step.tokens * _FLOAT * (2 * levels + 1)
    return step.tokens * step.length * (step.stream if step.attention == "eager" else 1) + additive_mask_bytes(step)


def additive_mask_bytes(step: TrainingStep) -> int:
    """The share of `shared_mask_bytes` that autograd keeps for all layers of a fused attention together."""
    return step.tokens * step.length * step.compute if step.blocked else 0


def layer_working_bytes(config: Any, step: TrainingStep) -> int:
    """What the backward of a layer holds at most beyond what the forward kept, weight gradients left out.

    Two moments count: in the middle of the MLP, where the gradient of the product and those of its two factors are
    there at once; and attention, by when everything that the MLP kept has gone.
    """
    tokens, hidden, inner = step.tokens, config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    product_kept = _linear_bytes(("down_proj",), inner, (hidden,), step.compute, step)
    mlp = tokens * hidden * step.stream + max(0, 3 * tokens * inner * step.compute - product_kept)
    gone = 3 * tokens * inner * step.compute + product_kept
    gone += _linear_bytes(("gate_proj", "up_proj"), hidden, (inner, inner), step.stream, step)
    gone += _norm_bytes(tokens * hidden, tokens, step.stream, step)
    attention = tokens * hidden * step.stream + tokens * heads * head_dim * 4 * step.compute
    if step.attention == "eager":
        attention += 3 * tokens * heads * step.length * _FLOAT
    return max(mlp, attention - gone)


def head_working_bytes(config: Any, step: TrainingStep) -> tuple[int, int]:
    """What TRL's fused LM head holds while it runs, in the forward and in the backward.

    The backward's share has the gradient of the head's weight in it, which is accumulated in float32.
    """
    targets, hidden, vocabulary = step.rows * (step.length - 1), config.hidden_size, config.vocab_size
    rows, columns = min(targets, _HEAD_TOKENS), min(vocabulary, _HEAD_COLUMNS)
    convert = (rows + columns) * hidden * step.compute if step.compute != step.stream else 0
    gradients = targets * hidden * _FLOAT
    if step.trained_head:
        gradients += vocabulary * hidden * (_FLOAT + (step.stream if step.stream != _FLOAT else 0))
    if step.on_gpu:
        tile = rows * _HEAD_COLUMNS * step.compute
        return tile + convert, tile + convert + gradients
    # The tile is as wide on a CPU, but pages that are never written take no memory.
    tile = rows * math.ceil(columns * step.compute / _PAGE) * _PAGE
    floats = rows * columns * _FLOAT
    forward = tile + convert + int(_HEAD_FORWARD_TILES * floats)
    return forward, tile + convert + int(_HEAD_BACKWARD_TILES * floats) + gradients


def _norm_bytes(elements: int, groups: int, item: int, step: TrainingStep) -> int:
    return (elements + groups) * _FLOAT + (elements * item if step.trained else 0)


def _linear_bytes(
    names: tuple[str, ...],
    width: int,
    outputs: tuple[int, ...],
    item: int,
    step: TrainingStep,
    input_is_kept: bool = False,
) -> int:
    """What linear layers keep that read one tensor of `width` features in elements of `item` bytes."""
    tokens, kept, shares_input = step.tokens, 0, False
    for name, output in zip(names, outputs, strict=True):
        if step.autocast and step.stream != step.compute:
            kept += width * output * step.compute
        if step.trained:
            copies = step.autocast and item != step.compute
            kept += tokens * width * step.compute if copies else 0
            shares_input = shares_input or not copies
        if name in step.adapted:
            own, shares = _lora_bytes(width, output, item, step)
            kept += own
            shares_input = shares_input or shares
    return kept + (tokens * width * item if shares_input and not input_is_kept else 0)


def _lora_bytes(width: int, output: int, item: int, step: TrainingStep) -> tuple[int, bool]:
    """What LoRA of one linear layer keeps by itself, and whether it keeps the layer's input as it is."""
    tokens, kept = step.tokens, 0
    matmul = step.compute if step.autocast else step.lora_item
    fresh = item != step.lora_item
    if step.lora_dropout:
        kept += tokens * width * (1 if step.on_gpu else step.lora_item)
        fresh = True
    if matmul != step.lora_item:
        kept += tokens * width * matmul + step.lora_rank * (width + output) * matmul
    elif fresh:
        kept += tokens * width * step.lora_item
    return kept + tokens * step.lora_rank * matmul, matmul == step.lora_item and not fresh
