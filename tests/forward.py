"""Forward passes of the models, and of the plain base class under the mask and positions of the reference.

Texts come from `strategies` and are translated to the fixed vocabulary of `tiny`. float64 unless a test says so.
"""

import itertools
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from cases import TOLERANCE
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from multiverse import MultiverseForCausalLM
from reference_layout import ReferenceLayout, reference_layout
from strategies import VOCABULARY as READABLE
from strategies import encode, shuffled, trees, truncated
from tiny import COLON, DIGITS, DOT, FIRST_WORD, NEWLINE, PAD, TOKEN_IDS, tiny_config, tiny_model
from tiny import VOCABULARY as TINY_VOCABULARY
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.cache_utils import Cache

BASES = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM}

every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa", "multiverse"])
# Those that take a mask from outside.
every_mask_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
# Not eager in float64: transformers takes that softmax in float32, where the smallest float64 is -inf, and a padding
# query, which sees nothing, gives NaN (in the base classes too).
_STOCK_KINDS = [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.float64)]
every_stock_padded_kind = pytest.mark.parametrize(
    ("attention", "dtype"), _STOCK_KINDS, ids=["eager-float32", "sdpa-float32", "sdpa-float64"]
)
every_padded_kind = pytest.mark.parametrize(
    ("attention", "dtype"),
    [*_STOCK_KINDS, ("multiverse", torch.float64)],
    ids=["eager-float32", "sdpa-float32", "sdpa-float64", "multiverse-float64"],
)
with_and_without_positions = pytest.mark.parametrize("positions", [False, True], ids=["no positions", "positions"])
both_sides = pytest.mark.parametrize("side", ["left", "right"])

# Letters keep their ids; the two-digit labels, which tiny's vocabulary does not have, become words.
_TINY_IDS = {
    **{token_id: token_id for token_id in READABLE.values()},
    **{READABLE[tag]: token_id for tag, token_id in TOKEN_IDS.items()},
    **{READABLE[piece]: token_id for piece, token_id in {**DIGITS, ".": DOT, ":": COLON, "_": NEWLINE}.items()},
    **{READABLE[label]: max(READABLE.values()) + number for number, label in enumerate(("10", "12"), start=1)},
}
assert len(set(_TINY_IDS.values())) == len(_TINY_IDS)
assert max(_TINY_IDS.values()) < TINY_VOCABULARY


def to_tiny(ids: Sequence[int]) -> list[int]:
    """Ids of `strategies` as ids of `tiny`."""
    return [_TINY_IDS[token_id] for token_id in ids]


def text(words: str) -> list[int]:
    return to_tiny(encode(words))


def opens_block(ids: Sequence[int]) -> bool:
    return TOKEN_IDS["<Parallel>"] in ids


tagged_texts = trees(60).map(lambda sample: to_tiny(sample.ids)).filter(opens_block)
texts = st.one_of(trees(60), truncated(trees(60)), shuffled(40)).map(lambda sample: to_tiny(sample.ids)).filter(bool)
untagged_texts = st.lists(st.integers(FIRST_WORD, TINY_VOCABULARY - 1), min_size=1, max_size=20)

# A nested block, separators, text after each block, and a second block.
NESTED = text(
    "a b <Parallel> _ <Goal> _ <Outline> c </Outline> _ <Outline> d </Outline> _ </Goal> _ "
    "<Path> _ 1 : e f <Parallel> <Goal> <Outline> g </Outline> <Outline> h </Outline> </Goal> "
    "<Path> i j </Path> _ <Path> k </Path> <Conclusion> l </Conclusion> </Parallel> m </Path> _ "
    "<Path> _ 2 : n </Path> _ <Conclusion> _ o </Conclusion> _ </Parallel> p "
    "<Parallel> <Goal> <Outline> q </Outline> </Goal> <Path> r s t </Path> <Path> u </Path> "
    "<Conclusion> v </Conclusion> </Parallel> w"
)
TWO_PATHS = text(
    "a b c d e <Parallel> <Goal> <Outline> f </Outline> <Outline> g </Outline> </Goal> "
    "<Path> h i j k l </Path> _ <Path> m n </Path> _ <Conclusion> o p </Conclusion> </Parallel> q r s"
)
OPEN_BLOCK = text("z <Parallel> <Goal> <Outline> y </Outline> </Goal> <Path> x w </Path> <Path> v u t")
WORDS = text("a b c d e f g h i j k l m n")
STRAY_TAGS = text("a <Think> b </Path> <Path> c <Goal> d </Goal> </Parallel> e <Conclusion> f </Think> g")


def examples(count: int) -> settings:
    # No shrinking: the texts are short, and a defect, seen by dozens of tests here, would take them minutes each.
    phases = [Phase.explicit, Phase.generate]
    # The machine may be busy with something else: slow drawing is not a defect.
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(deadline=None, derandomize=True, max_examples=count, phases=phases, suppress_health_check=checks)


@cache
def models(
    architecture: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa"
) -> tuple[MultiverseForCausalLM, PreTrainedModel]:
    """A Multiverse model and its plain twin with the same weights; shared between tests, so not to be changed."""
    return fresh_models(architecture, dtype, attention)


def fresh_models(
    architecture: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **fields
) -> tuple[MultiverseForCausalLM, PreTrainedModel]:
    model = tiny_model(architecture, dtype, attention=attention, **fields)
    with torch.no_grad():
        # Norms start as ones and biases as zeros, which hides a weight that is not used or not copied.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    base = BASES[architecture](tiny_config(architecture, **fields)).to(dtype).eval()
    base.load_state_dict(model.state_dict(), strict=True)
    base.set_attn_implementation("sdpa" if attention == "multiverse" else attention)
    return model, base


def row(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([ids])


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: torch.Tensor, **arguments) -> torch.Tensor:
    return model(input_ids=input_ids, **arguments).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    assert torch.isfinite(one).all()
    return (one - other).abs().max().item()


def pad(rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and 2D mask, both of shape `(B, longest)`."""
    length = max(len(ids) for ids in rows)
    filled, mask = [], []
    for ids in rows:
        fill = length - len(ids)
        before, after = (fill, 0) if side == "left" else (0, fill)
        filled.append([PAD] * before + list(ids) + [PAD] * after)
        mask.append([0] * before + [1] * len(ids) + [0] * after)
    return torch.tensor(filled), torch.tensor(mask)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions as `generate` makes them from a 2D mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def restarting(documents: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.cat([torch.arange(len(document)) for document in documents])[None]


def reference_mask(layout: ReferenceLayout) -> torch.Tensor:
    """Bool mask of shape `(1, 1, N, N)`, True where a token may attend."""
    return torch.tensor(layout.visible)[None, None]


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def reference_logits(
    base: PreTrainedModel, ids: Sequence[int], starts: Sequence[int] | None = None, **arguments
) -> torch.Tensor:
    layout = reference_layout(ids, TOKEN_IDS, starts)
    mask = additive(reference_mask(layout), base.dtype)
    return logits_of(base, row(ids), attention_mask=mask, position_ids=row(layout.positions), **arguments)


def in_chunks(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    sizes: Sequence[int],
    past_key_values: Cache | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Logits of a text that is read a few tokens at a time, and the cache afterwards.

    `attention_mask` covers the cached slots and `input_ids`, `position_ids` the latter.
    """
    assert sum(sizes) == input_ids.shape[1]
    cached = 0 if attention_mask is None else attention_mask.shape[1] - input_ids.shape[1]
    found, start = [], 0
    for size in sizes:
        seen = None if attention_mask is None else attention_mask[:, : cached + start + size]
        with torch.no_grad():
            output = model(
                input_ids=input_ids[:, start : start + size],
                attention_mask=seen,
                position_ids=None if position_ids is None else position_ids[:, start : start + size],
                past_key_values=past_key_values,
                use_cache=True,
            )
        past_key_values = output.past_key_values
        found.append(output.logits)
        start += size
    return torch.cat(found, dim=1), past_key_values


def sizes_from(cuts: Sequence[int], length: int) -> list[int]:
    borders = [0, *sorted({cut % length for cut in cuts} - {0}), length]
    return [end - start for start, end in itertools.pairwise(borders)]
