"""The models against their definition: the plain base class under the mask and positions of the brute-force reference.

Texts come from `strategies` and are translated to the fixed vocabulary of `tiny`. float64 unless a test says so.
"""

import copy
import itertools
from collections.abc import Sequence
from functools import cache

import multiverse.masking_multiverse
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from multiverse import MultiverseForCausalLM
from reference_layout import ReferenceLayout, reference_layout
from strategies import VOCABULARY as READABLE
from strategies import encode, packed, shuffled, trees, truncated
from tiny import ARCHITECTURES, COLON, DIGITS, DOT, FIRST_WORD, NEWLINE, PAD, TOKEN_IDS, tiny_config, tiny_model
from tiny import VOCABULARY as TINY_VOCABULARY
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.cache_utils import Cache

BASES = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM}
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
# Not eager in float64: transformers takes that softmax in float32, where the smallest float64 is -inf, and a padding
# query, which sees nothing, gives NaN (in the base classes too).
every_padded_kind = pytest.mark.parametrize(
    ("attention", "dtype"),
    [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.float64)],
    ids=["eager-float32", "sdpa-float32", "sdpa-float64"],
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
    base.set_attn_implementation(attention)
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


# --- Untagged text ---------------------------------------------------------------------------------------------------


def assert_equal_to_base(
    architecture: str, attention: str, dtype: torch.dtype, input_ids: torch.Tensor, **arguments
) -> None:
    model, base = models(architecture, dtype, attention)
    expected = logits_of(base, input_ids, **arguments)
    assert difference(logits_of(model, input_ids, **arguments), expected) == 0.0


@every_architecture
@every_attention
@every_dtype
def test_untagged_text_is_the_base_models(architecture: str, attention: str, dtype: torch.dtype) -> None:
    assert_equal_to_base(architecture, attention, dtype, torch.tensor([WORDS, WORDS[::-1]]))


@every_architecture
@every_attention
@every_dtype
def test_tags_without_a_block_are_the_base_models(architecture: str, attention: str, dtype: torch.dtype) -> None:
    assert_equal_to_base(architecture, attention, dtype, row(STRAY_TAGS))


@every_architecture
@every_padded_kind
@both_sides
@with_and_without_positions
def test_untagged_padded_text_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype, side: str, positions: bool
) -> None:
    input_ids, mask = pad([WORDS, WORDS[3:8]], side)
    arguments = {"position_ids": positions_of(mask)} if positions else {}
    assert_equal_to_base(architecture, attention, dtype, input_ids, attention_mask=mask, **arguments)


@every_architecture
@every_attention
@every_dtype
def test_untagged_text_with_positions_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype
) -> None:
    positions = torch.arange(len(WORDS))[None]
    assert_equal_to_base(architecture, attention, dtype, row(WORDS), position_ids=positions)
    assert_equal_to_base(architecture, attention, dtype, row(WORDS), position_ids=positions + 7)


@every_architecture
@every_attention
@every_dtype
@pytest.mark.parametrize("use_cache", [None, False])
def test_untagged_packed_text_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype, use_cache: bool | None
) -> None:
    positions = restarting([WORDS[:6], WORDS[6:]])
    arguments = {} if use_cache is None else {"use_cache": use_cache}
    assert_equal_to_base(architecture, attention, dtype, row(WORDS), position_ids=positions, **arguments)


@every_architecture
@every_padded_kind
@with_and_without_positions
def test_untagged_cached_text_is_the_base_models(
    architecture: str, attention: str, dtype: torch.dtype, positions: bool
) -> None:
    input_ids, mask = pad([WORDS, WORDS[3:8]], "left")
    found = []
    for model in models(architecture, dtype, attention):
        past_key_values = DynamicCache(config=model.config)
        steps = []
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 14)):
            arguments = {"position_ids": positions_of(mask)[:, start:end]} if positions else {}
            arguments |= {"attention_mask": mask[:, :end], "past_key_values": past_key_values}
            steps.append(logits_of(model, input_ids[:, start:end], **arguments))
        found.append(torch.cat(steps, dim=1))
    assert difference(*found) == 0.0


@every_architecture
@every_padded_kind
def test_loss_of_untagged_text_is_the_base_models(architecture: str, attention: str, dtype: torch.dtype) -> None:
    input_ids, mask = pad([WORDS, WORDS[3:8]], "right")
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        found, expected = (
            model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.item()
            for model in models(architecture, dtype, attention)
        )
    assert found == expected


@every_architecture
def test_model_without_token_ids_reads_tags_as_its_base_does(architecture: str) -> None:
    model, base = fresh_models(architecture)
    model.config.multiverse_token_ids = None
    assert difference(logits_of(model, row(NESTED)), logits_of(base, row(NESTED))) == 0.0


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])  # Llama has no sliding window.
def test_untagged_text_in_sliding_windows_is_the_base_models(architecture: str) -> None:
    fields = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model, base = fresh_models(architecture, **fields)
    assert "sliding_attention" in model.config.layer_types
    assert difference(logits_of(model, row(WORDS)), logits_of(base, row(WORDS))) == 0.0


# --- Tagged text against the reference -------------------------------------------------------------------------------


@every_architecture
@every_attention
@every_dtype
def test_tagged_text_is_the_base_model_under_the_reference_layout(
    architecture: str, attention: str, dtype: torch.dtype
) -> None:
    model, base = models(architecture, dtype, attention)

    @examples(20)
    @given(texts)
    def check(ids: list[int]) -> None:
        assert difference(logits_of(model, row(ids)), reference_logits(base, ids)) <= TOLERANCE[dtype]

    assert difference(logits_of(model, row(NESTED)), reference_logits(base, NESTED)) <= TOLERANCE[dtype]
    check()


@every_architecture
def test_structure_makes_a_difference(architecture: str) -> None:
    # Otherwise the comparisons in this file would prove nothing.
    model, base = models(architecture)
    assert difference(logits_of(model, row(TWO_PATHS)), logits_of(base, row(TWO_PATHS))) > 0.1


@every_architecture
def test_packed_text_is_the_base_model_under_the_reference_layout(architecture: str) -> None:
    model, base = models(architecture)

    @examples(25)
    @given(packed(24), st.booleans())
    def check(sample, use_cache: bool) -> None:
        ids, starts = to_tiny(sample.ids), sorted({0, *sample.starts})
        if not opens_block(ids):
            return
        documents = [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
        found = logits_of(model, row(ids), position_ids=restarting(documents), use_cache=use_cache)
        assert difference(found, reference_logits(base, ids, starts)) <= 1e-5

    check()


@every_architecture
@every_attention
def test_loss_and_gradients_are_the_base_models_under_the_reference_layout(architecture: str, attention: str) -> None:
    model, base = fresh_models(architecture, attention=attention)
    layout = reference_layout(NESTED, TOKEN_IDS)
    arguments = {
        "attention_mask": additive(reference_mask(layout), torch.float64),
        "position_ids": row(layout.positions),
    }
    expected = base(input_ids=row(NESTED), labels=row(NESTED), **arguments)
    expected.loss.backward()
    found = model(input_ids=row(NESTED), labels=row(NESTED))
    found.loss.backward()
    assert abs(found.loss.item() - expected.loss.item()) <= 1e-5
    wanted = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        assert difference(parameter.grad, wanted[name].grad) <= 1e-5, name


@every_architecture
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_agrees_with_sdpa(architecture: str) -> None:
    model, _ = models(architecture, torch.float32)
    flex = tiny_model(architecture, torch.float32, attention="flex_attention")
    flex.load_state_dict(model.state_dict())
    input_ids, mask = pad([NESTED, TWO_PATHS], "left")
    layout = reference_layout(NESTED, TOKEN_IDS)
    explicit = {"attention_mask": reference_mask(layout), "position_ids": row(layout.positions)}
    # The mask is what is under test: the kernel runs uncompiled, which takes seconds instead of minutes.
    with torch.compiler.set_stance("force_eager"):
        padded = logits_of(flex, input_ids, attention_mask=mask)
        chunked, _ = in_chunks(flex, row(NESTED), sizes_from([3, 20, 21, 22, 40], len(NESTED)))
        packed_row = logits_of(flex, row(TWO_PATHS + NESTED), position_ids=restarting([TWO_PATHS, NESTED]))
        masked = logits_of(flex, row(NESTED), **explicit)
    whole = logits_of(model, row(NESTED))
    assert difference(padded[mask == 1], logits_of(model, input_ids, attention_mask=mask)[mask == 1]) <= 1e-4
    assert difference(chunked, whole) <= 1e-4
    assert difference(packed_row[:, len(TWO_PATHS) :], whole) <= 1e-4
    assert difference(masked, whole) <= 1e-4


# --- Isolation -------------------------------------------------------------------------------------------------------


def gradient_reach(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Largest |gradient| of every token's logits (rows) with respect to every token's embedding (columns)."""
    embedded: list[torch.Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1]))
    logits = model(input_ids=row(ids)).logits[0]
    handle.remove()
    weights = torch.randn(logits.shape[1], dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(token @ weights, embedded[0], retain_graph=True)[0][0] for token in logits]
    return torch.stack(gradients).abs().amax(dim=2)


@every_architecture
@every_attention
@every_dtype
def test_gradients_reach_exactly_what_a_token_may_see(architecture: str, attention: str, dtype: torch.dtype) -> None:
    model, _ = models(architecture, dtype, attention)
    reach = gradient_reach(model, NESTED)
    visible = torch.tensor(reference_layout(NESTED, TOKEN_IDS).visible)
    assert (reach[~visible] == 0.0).all()
    assert (reach[visible] > 0.0).all()


@every_architecture
@every_attention
def test_gradients_stop_at_sibling_paths_and_pass_conclusions(architecture: str, attention: str) -> None:
    # The same claim in plain words, for a reader who does not trust the reference.
    model, _ = models(architecture, torch.float64, attention)
    reach = gradient_reach(model, TWO_PATHS)
    first, second = (index for index, token_id in enumerate(TWO_PATHS) if token_id == TOKEN_IDS["<Path>"])
    conclusion = TWO_PATHS.index(TOKEN_IDS["<Conclusion>"])
    assert (reach[second:conclusion, first:second] == 0.0).all()
    assert (reach[first:second, second:conclusion] == 0.0).all()
    assert (reach[conclusion, first:conclusion] > 0.0).all()
    assert (reach[first:conclusion, :first] > 0.0).all()


@every_architecture
@every_attention
def test_changing_what_a_path_may_not_see_changes_nothing_in_it(architecture: str, attention: str) -> None:
    model, _ = models(architecture, torch.float64, attention)

    @examples(15)
    @given(tagged_texts, st.integers(1, 30))
    def check(ids: list[int], shift: int) -> None:
        layout = reference_layout(ids, TOKEN_IDS)
        visible, branches = torch.tensor(layout.visible), torch.tensor(layout.branches)
        before = logits_of(model, row(ids))[0]
        words = torch.tensor([token_id not in TOKEN_IDS.values() for token_id in ids])
        for branch in range(1, max(layout.branches, default=0) + 1):
            own = branches == branch
            hidden = words & ~visible[own].any(dim=0)
            changed = torch.tensor(ids)
            span = TINY_VOCABULARY - FIRST_WORD
            changed[hidden] = FIRST_WORD + (changed[hidden] - FIRST_WORD + shift) % span
            after = logits_of(model, changed[None])[0]
            assert difference(after[own], before[own]) == 0.0

    check()


@every_architecture
@every_attention
def test_path_runs_alone_as_beside_its_siblings(architecture: str, attention: str) -> None:
    model, _ = models(architecture, torch.float64, attention)

    @examples(15)
    @given(tagged_texts)
    def check(ids: list[int]) -> None:
        layout = reference_layout(ids, TOKEN_IDS)
        beside = logits_of(model, row(ids))[0]
        for branch in range(1, max(layout.branches) + 1):
            last = max(index for index, of in enumerate(layout.branches) if of == branch)
            kept = [index for index in range(last + 1) if layout.visible[last][index]]
            alone = logits_of(model, row([ids[index] for index in kept]))[0]
            assert difference(alone, beside[kept]) <= 1e-5

    check()


# --- Padding and packing ---------------------------------------------------------------------------------------------


@every_architecture
@every_padded_kind
@both_sides
def test_padded_rows_are_as_each_row_alone(architecture: str, attention: str, dtype: torch.dtype, side: str) -> None:
    model, _ = models(architecture, dtype, attention)

    @examples(12)
    @given(st.lists(texts, min_size=1, max_size=3), untagged_texts, st.booleans())
    def check(rows: list[list[int]], words: list[int], positions: bool) -> None:
        rows = [*rows, words]
        input_ids, mask = pad(rows, side)
        arguments = {"position_ids": positions_of(mask)} if positions else {}
        found = logits_of(model, input_ids, attention_mask=mask, **arguments)
        for number, ids in enumerate(rows):
            expected = logits_of(model, row(ids))[0]
            assert difference(found[number, mask[number] == 1], expected) <= TOLERANCE[dtype]

    check()


@every_architecture
@every_padded_kind
@both_sides
def test_tagged_row_and_untagged_row_share_a_batch(
    architecture: str, attention: str, dtype: torch.dtype, side: str
) -> None:
    model, base = models(architecture, dtype, attention)
    input_ids, mask = pad([WORDS, NESTED, OPEN_BLOCK], side)
    found = logits_of(model, input_ids, attention_mask=mask)
    assert difference(found[0, mask[0] == 1], logits_of(base, row(WORDS))[0]) <= TOLERANCE[dtype]
    assert difference(found[1, mask[1] == 1], reference_logits(base, NESTED)[0]) <= TOLERANCE[dtype]
    assert difference(found[2, mask[2] == 1], reference_logits(base, OPEN_BLOCK)[0]) <= TOLERANCE[dtype]


@every_architecture
@every_padded_kind
@both_sides
def test_gradients_of_a_padded_batch_are_the_sum_over_its_rows(
    architecture: str, attention: str, dtype: torch.dtype, side: str
) -> None:
    # A padding query sees nothing: one NaN from its softmax would spoil every weight.
    model, _ = fresh_models(architecture, dtype, attention)
    rows = [NESTED, OPEN_BLOCK, WORDS]
    wanted: dict[str, torch.Tensor] = {}
    for ids in rows:
        model.zero_grad()
        model(input_ids=row(ids)).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            wanted[name] = wanted.get(name, 0.0) + parameter.grad
    model.zero_grad()
    input_ids, mask = pad(rows, side)
    model(input_ids=input_ids, attention_mask=mask).logits[mask == 1].square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = wanted[name].abs().max().item()
        assert difference(parameter.grad, wanted[name]) <= TOLERANCE[dtype] * max(scale, 1.0), name


@every_architecture
@every_attention
@pytest.mark.parametrize("lengths", [False, True], ids=["positions", "positions and cu_seq_lens"])
def test_padding_free_row_is_as_each_document_alone(architecture: str, attention: str, lengths: bool) -> None:
    model, _ = models(architecture, torch.float64, attention)

    @examples(12)
    @given(st.lists(texts, min_size=1, max_size=3), untagged_texts, st.integers(0, 3))
    def check(documents: list[list[int]], words: list[int], place: int) -> None:
        documents.insert(place, words)
        ids = [token_id for document in documents for token_id in document]
        arguments = {}
        if lengths:
            # As TRL's padding-free collator passes them.
            sizes = torch.tensor([0, *map(len, documents)])
            borders, longest = sizes.cumsum(0).to(torch.int32), int(sizes.max())
            arguments = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            arguments |= {"max_length_q": longest, "max_length_k": longest}
        found = logits_of(model, row(ids), position_ids=restarting(documents), use_cache=False, **arguments)
        expected = torch.cat([logits_of(model, row(document)) for document in documents], dim=1)
        assert difference(found, expected) <= 1e-5

    check()


@every_architecture
def test_packed_rows_of_a_batch_have_their_own_documents(architecture: str) -> None:
    model, _ = models(architecture)
    rows = [[TWO_PATHS, OPEN_BLOCK, WORDS], [WORDS, OPEN_BLOCK, TWO_PATHS]]
    input_ids = torch.tensor([[token_id for document in documents for token_id in document] for documents in rows])
    positions = torch.cat([restarting(documents) for documents in rows])
    found = logits_of(model, input_ids, position_ids=positions)
    for logits, documents in zip(found, rows, strict=True):
        expected = torch.cat([logits_of(model, row(document))[0] for document in documents])
        assert difference(logits, expected) <= 1e-5


# --- Cache -----------------------------------------------------------------------------------------------------------


@every_architecture
@every_dtype
def test_cached_forward_token_by_token_is_the_full_forward(architecture: str, dtype: torch.dtype) -> None:
    model, _ = models(architecture, dtype)
    found, past_key_values = in_chunks(model, row(NESTED), [1] * len(NESTED))
    assert past_key_values.get_seq_length() == len(NESTED)
    assert difference(found, logits_of(model, row(NESTED))) <= TOLERANCE[dtype]


@every_architecture
@every_attention
def test_cached_forward_in_chunks_is_the_full_forward(architecture: str, attention: str) -> None:
    model, _ = models(architecture, torch.float64, attention)

    @examples(20)
    @given(texts, st.lists(st.integers(0, 60), max_size=6))
    def check(ids: list[int], cuts: list[int]) -> None:
        found, _ = in_chunks(model, row(ids), sizes_from(cuts, len(ids)))
        assert difference(found, logits_of(model, row(ids))) <= 1e-5

    check()


@every_architecture
@both_sides
def test_cached_forward_of_padded_rows_is_each_row_alone(architecture: str, side: str) -> None:
    model, _ = models(architecture)

    @examples(15)
    @given(st.lists(texts, min_size=2, max_size=3), st.lists(st.integers(0, 60), max_size=6))
    def check(rows: list[list[int]], cuts: list[int]) -> None:
        # Right padding in the middle of a cache is what a batch of unequal prompts leaves behind.
        input_ids, mask = pad(rows, side)
        if side == "right":
            tail = torch.tensor([NESTED] * len(rows))
            input_ids, mask = torch.cat([input_ids, tail], dim=1), torch.cat([mask, torch.ones_like(tail)], dim=1)
            rows = [ids + NESTED for ids in rows]
            if not all(opens_block(ids) for ids in rows):
                return
        found, _ = in_chunks(model, input_ids, sizes_from(cuts, input_ids.shape[1]), attention_mask=mask)
        for number, ids in enumerate(rows):
            assert difference(found[number, mask[number] == 1], logits_of(model, row(ids))[0]) <= 1e-5

    check()


@every_architecture
@every_padded_kind
@with_and_without_positions
def test_block_may_open_after_an_untagged_cached_prefill(
    architecture: str, attention: str, dtype: torch.dtype, positions: bool
) -> None:
    model, _ = models(architecture, dtype, attention)
    rows = [WORDS + NESTED, WORDS[:5] + TWO_PATHS, WORDS[:9] + OPEN_BLOCK]
    prompts, mask = pad([WORDS, WORDS[:5], WORDS[:9]], "left")
    tails, tail_mask = pad([NESTED, TWO_PATHS, OPEN_BLOCK], "right")
    whole_mask = torch.cat([mask, tail_mask], dim=1)
    # The positions of `generate`, in every call: right for the prefill, wrong after the first merge.
    stock = positions_of(whole_mask) if positions else None
    prefill, past_key_values = in_chunks(
        model, prompts, [9, 5], attention_mask=mask, position_ids=None if stock is None else stock[:, :14]
    )
    found, _ = in_chunks(
        model,
        tails,
        sizes_from([1, 2, 17, 30], tails.shape[1]),
        past_key_values,
        attention_mask=whole_mask,
        position_ids=None if stock is None else stock[:, 14:],
    )
    for number, ids in enumerate(rows):
        logits = torch.cat([prefill[number, mask[number] == 1], found[number, tail_mask[number] == 1]])
        assert difference(logits, logits_of(model, row(ids))[0]) <= TOLERANCE[dtype]


@every_architecture
def test_positions_given_beside_a_cache_that_holds_blocks_are_not_needed(architecture: str) -> None:
    # `generate` and other callers count on from the number of slots, which is wrong after a merge.
    model, _ = models(architecture)
    stock = torch.arange(len(NESTED))[None]
    found, _ = in_chunks(model, row(NESTED), sizes_from([20, 50], len(NESTED)), position_ids=stock)
    assert difference(found, logits_of(model, row(NESTED))) <= 1e-5


@every_architecture
def test_cropped_cache_goes_on_with_other_tokens(architecture: str) -> None:
    model, _ = models(architecture)
    others = text("z </Path> <Path> y </Path> <Conclusion> x </Conclusion> </Parallel>") + OPEN_BLOCK
    # Every length, a third of them by each architecture.
    for kept in range(1 + ARCHITECTURES.index(architecture), len(NESTED), len(ARCHITECTURES)):
        _, past_key_values = in_chunks(model, row(NESTED), [10, len(NESTED) - 10])
        past_key_values.crop(-(len(NESTED) - kept))
        assert past_key_values.get_seq_length() == kept
        found, _ = in_chunks(model, row(others), [5, len(others) - 5], past_key_values)
        expected = logits_of(model, row(NESTED[:kept] + others))[:, kept:]
        assert difference(found, expected) <= 1e-5, kept


@every_architecture
def test_cache_may_be_cropped_again_and_again(architecture: str) -> None:
    model, _ = models(architecture)
    _, past_key_values = in_chunks(model, row(NESTED), [len(NESTED)])
    ids = list(NESTED)
    for removed, others in ((20, TWO_PATHS), (10, OPEN_BLOCK), (30, WORDS), (25, NESTED)):
        past_key_values.crop(-removed)
        found, past_key_values = in_chunks(model, row(others), [len(others)], past_key_values)
        ids = ids[:-removed] + others
        assert difference(found, logits_of(model, row(ids))[:, -len(others) :]) <= 1e-5


@every_architecture
def test_cropped_cache_of_left_padded_rows_goes_on_with_other_tokens(architecture: str) -> None:
    model, _ = models(architecture)
    rows = [NESTED, TWO_PATHS, OPEN_BLOCK]
    for removed in range(1, len(OPEN_BLOCK)):
        input_ids, mask = pad(rows, "left")
        _, past_key_values = in_chunks(model, input_ids, [40, input_ids.shape[1] - 40], attention_mask=mask)
        past_key_values.crop(-removed)
        others = torch.tensor([TWO_PATHS] * len(rows))
        whole_mask = torch.cat([mask[:, :-removed], torch.ones_like(others)], dim=1)
        found, _ = in_chunks(model, others, [others.shape[1]], past_key_values, attention_mask=whole_mask)
        for number, ids in enumerate(rows):
            expected = logits_of(model, row(ids[:-removed] + TWO_PATHS))[0, -len(TWO_PATHS) :]
            assert difference(found[number], expected) <= 1e-5, removed


@every_architecture
@pytest.mark.parametrize("removed", [3, len(TWO_PATHS) - 6, len(TWO_PATHS) + 2])
def test_cropped_cache_remembers_the_positions_that_its_prefill_was_given(architecture: str, removed: int) -> None:
    # Left padding with the positions that `generate` passes: slot number and position differ by row.
    model, _ = models(architecture)
    prompts = [WORDS, WORDS[:6]]
    input_ids, mask = pad(prompts, "left")
    _, past_key_values = in_chunks(model, input_ids, [14], attention_mask=mask, position_ids=positions_of(mask))
    tail = torch.tensor([TWO_PATHS] * 2)
    whole_mask = torch.cat([mask, torch.ones_like(tail)], dim=1)
    in_chunks(model, tail, [tail.shape[1]], past_key_values, attention_mask=whole_mask)
    past_key_values.crop(-removed)
    others = torch.tensor([OPEN_BLOCK] * 2)
    whole_mask = torch.cat([whole_mask[:, :-removed], torch.ones_like(others)], dim=1)
    found, _ = in_chunks(model, others, [others.shape[1]], past_key_values, attention_mask=whole_mask)
    for number, prompt in enumerate(prompts):
        ids = (prompt + TWO_PATHS)[:-removed] + OPEN_BLOCK
        assert difference(found[number], logits_of(model, row(ids))[0, -len(OPEN_BLOCK) :]) <= 1e-5


@every_architecture
def test_rows_of_an_untagged_cache_may_be_reordered_before_a_block_opens(architecture: str) -> None:
    model, _ = models(architecture)
    prompts = [WORDS, WORDS[:6]]
    input_ids, mask = pad(prompts, "left")
    _, past_key_values = in_chunks(model, input_ids, [14], attention_mask=mask, position_ids=positions_of(mask))
    order = torch.tensor([1, 0])
    past_key_values.reorder_cache(order)
    tail = torch.tensor([TWO_PATHS] * 2)
    whole_mask = torch.cat([mask[order], torch.ones_like(tail)], dim=1)
    found = logits_of(
        model,
        tail,
        attention_mask=whole_mask,
        position_ids=positions_of(whole_mask)[:, -tail.shape[1] :],
        past_key_values=past_key_values,
    )
    for number, source in enumerate(order.tolist()):
        expected = logits_of(model, row(prompts[source] + TWO_PATHS))[0, -len(TWO_PATHS) :]
        assert difference(found[number], expected) <= 1e-5


@every_architecture
@with_and_without_positions
def test_rows_of_an_untagged_cache_may_be_repeated_before_a_block_opens(architecture: str, positions: bool) -> None:
    model, _ = models(architecture)
    tail, tail_mask = pad([TWO_PATHS, OPEN_BLOCK], "right")
    mask = torch.cat([torch.ones(2, len(WORDS), dtype=torch.long), tail_mask], dim=1)
    stock = positions_of(mask) if positions else None
    prompt_positions = None if stock is None else stock[:1, : len(WORDS)]
    _, past_key_values = in_chunks(model, row(WORDS), [len(WORDS)], position_ids=prompt_positions)
    past_key_values.batch_repeat_interleave(2)
    tail_positions = None if stock is None else stock[:, len(WORDS) :]
    found, _ = in_chunks(
        model, tail, [tail.shape[1]], past_key_values, attention_mask=mask, position_ids=tail_positions
    )
    for number, ids in enumerate((TWO_PATHS, OPEN_BLOCK)):
        expected = logits_of(model, row(WORDS + ids))[0, len(WORDS) :]
        assert difference(found[number, : len(ids)], expected) <= 1e-5


@every_architecture
@every_padded_kind
def test_static_cache_gives_the_full_forward(architecture: str, attention: str, dtype: torch.dtype) -> None:
    model, _ = models(architecture, dtype, attention)
    input_ids, mask = pad([WORDS + NESTED, TWO_PATHS], "left")
    past_key_values = StaticCache(config=model.config, max_cache_len=input_ids.shape[1] + 7)
    sizes = sizes_from([4, 5, 6, 30, 31, 60], input_ids.shape[1])
    found, _ = in_chunks(model, input_ids, sizes, past_key_values, attention_mask=mask)
    for number, ids in enumerate((WORDS + NESTED, TWO_PATHS)):
        assert difference(found[number, mask[number] == 1], logits_of(model, row(ids))[0]) <= TOLERANCE[dtype]


@every_architecture
def test_static_cache_can_be_used_for_another_text_after_a_reset(architecture: str) -> None:
    model, _ = models(architecture)
    past_key_values = StaticCache(config=model.config, max_cache_len=len(NESTED) + 7)
    for ids in (NESTED, TWO_PATHS, WORDS):
        found, _ = in_chunks(model, row(ids), [9, len(ids) - 9], past_key_values)
        assert difference(found, logits_of(model, row(ids))) <= 1e-5
        past_key_values.reset()


@every_architecture
@pytest.mark.parametrize("cut", [2, 15, 25, 44, 70])
def test_returned_cache_carries_on(architecture: str, cut: int) -> None:
    model, _ = models(architecture)
    with torch.no_grad():
        past_key_values = model(input_ids=row(NESTED[:cut])).past_key_values
    assert past_key_values.get_seq_length() == cut
    found = logits_of(model, row(NESTED[cut:]), past_key_values=past_key_values)
    assert difference(found, logits_of(model, row(NESTED))[:, cut:]) <= 1e-5


@every_architecture
def test_cache_of_packed_documents_carries_on_in_the_last_one(architecture: str) -> None:
    model, _ = models(architecture)
    documents = [TWO_PATHS, WORDS, OPEN_BLOCK]
    ids = [token_id for document in documents for token_id in document]
    _, past_key_values = in_chunks(model, row(ids), [len(ids)], position_ids=restarting(documents))
    found, _ = in_chunks(model, row(NESTED), [20, len(NESTED) - 20], past_key_values)
    assert difference(found, logits_of(model, row(OPEN_BLOCK + NESTED))[:, len(OPEN_BLOCK) :]) <= 1e-5


@every_architecture
def test_cache_returned_in_a_tuple_carries_on(architecture: str) -> None:
    model, _ = models(architecture)
    with torch.no_grad():
        output = model(input_ids=row(NESTED[:30]), use_cache=True, return_dict=False)
    (past_key_values,) = (item for item in output if isinstance(item, Cache))
    found = logits_of(model, row(NESTED[30:]), past_key_values=past_key_values)
    assert difference(found, logits_of(model, row(NESTED))[:, 30:]) <= 1e-5


@every_architecture
def test_copied_cache_goes_its_own_way(architecture: str) -> None:
    model, _ = models(architecture)
    _, past_key_values = in_chunks(model, row(NESTED[:30]), [30])
    copied = copy.deepcopy(past_key_values)
    for branch, ids in ((past_key_values, NESTED[30:]), (copied, TWO_PATHS)):
        found, _ = in_chunks(model, row(ids), [len(ids)], branch)
        assert difference(found, logits_of(model, row(NESTED[:30] + ids))[:, 30:]) <= 1e-5


@every_architecture
@pytest.mark.parametrize("batch_size", [1, 3])
def test_other_number_of_rows_than_cached_raises(architecture: str, batch_size: int) -> None:
    model, _ = models(architecture)
    _, past_key_values = in_chunks(model, torch.tensor([NESTED[:30]] * 2), [30])
    with pytest.raises(ValueError, match=rf"`input_ids` has {batch_size} rows, `past_key_values` .* 2"):
        logits_of(model, torch.tensor([NESTED[30:]] * batch_size), past_key_values=past_key_values)
    found = logits_of(model, torch.tensor([NESTED[30:]] * 2), past_key_values=past_key_values)
    assert difference(found[:1], logits_of(model, row(NESTED))[:, 30:]) <= 1e-5


# --- Masks from outside, and what is refused -------------------------------------------------------------------------


@every_architecture
@every_attention
@every_dtype
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_explicit_mask_gives_what_the_built_one_gives(
    architecture: str, attention: str, dtype: torch.dtype, kind: str
) -> None:
    model, _ = models(architecture, dtype, attention)

    @examples(6)
    @given(texts)
    def check(ids: list[int]) -> None:
        layout = reference_layout(ids, TOKEN_IDS)
        mask = reference_mask(layout) if kind == "bool" else additive(reference_mask(layout), dtype)
        found = logits_of(model, row(ids), attention_mask=mask, position_ids=row(layout.positions))
        assert difference(found, logits_of(model, row(ids))) <= TOLERANCE[dtype]

    check()


@every_attention
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_explicit_mask_serves_rows_that_differ_and_a_cache(attention: str, kind: str) -> None:
    model, _ = models("qwen3", torch.float64, attention)
    rows = [TWO_PATHS, OPEN_BLOCK]
    input_ids, real = pad(rows, "right")
    length = input_ids.shape[1]
    mask = torch.eye(length, dtype=torch.bool).repeat(2, 1, 1, 1)
    positions = torch.zeros_like(input_ids)
    for number, ids in enumerate(rows):
        layout = reference_layout(ids, TOKEN_IDS)
        mask[number, 0, : len(ids), : len(ids)] = torch.tensor(layout.visible)
        positions[number, : len(ids)] = torch.tensor(layout.positions)
    mask = mask if kind == "bool" else additive(mask, torch.float64)
    past_key_values, found = None, []
    for start, end in ((0, 11), (11, 18), (18, length)):
        with torch.no_grad():
            output = model(
                input_ids=input_ids[:, start:end],
                attention_mask=mask[:, :, start:end, :end],
                position_ids=positions[:, start:end],
                past_key_values=past_key_values,
                use_cache=True,
            )
        past_key_values = output.past_key_values
        found.append(output.logits)
    logits = torch.cat(found, dim=1)
    for number, ids in enumerate(rows):
        assert difference(logits[number, real[number] == 1], logits_of(model, row(ids))[0]) <= 1e-5
    with pytest.raises(ValueError, match="`past_key_values` was filled under a 4D `attention_mask`"):
        logits_of(model, torch.tensor([TWO_PATHS] * 2), past_key_values=past_key_values)


@every_architecture
@every_attention
def test_explicit_bool_mask_is_honoured_on_untagged_text(architecture: str, attention: str) -> None:
    # Transformers' own eager attention adds a bool mask to the scores as 0 and 1, which hides nothing.
    model, base = models(architecture, torch.float64, attention)
    mask = torch.ones(len(WORDS), len(WORDS), dtype=torch.bool).tril()
    mask[8:, 2:5] = False
    found = logits_of(model, row(WORDS), attention_mask=mask[None, None])
    expected = logits_of(base, row(WORDS), attention_mask=additive(mask[None, None], torch.float64))
    assert difference(found, expected) <= 1e-5


@every_architecture
@pytest.mark.parametrize("ids", [TWO_PATHS, WORDS], ids=["tagged", "untagged"])
@pytest.mark.parametrize("dimensions", [1, 3, 5])
def test_attention_mask_with_other_dimensions_raises(architecture: str, ids: list[int], dimensions: int) -> None:
    model, _ = models(architecture)
    mask = torch.ones((1,) * (dimensions - 1) + (len(ids),), dtype=torch.bool)
    with pytest.raises(ValueError, match="`attention_mask` must have 2 dimensions"):
        logits_of(model, row(ids), attention_mask=mask)


@every_architecture
def test_explicit_mask_without_positions_raises_on_tagged_text(architecture: str) -> None:
    model, _ = models(architecture)
    mask = reference_mask(reference_layout(TWO_PATHS, TOKEN_IDS))
    with pytest.raises(ValueError, match="`position_ids` is None next to a 4D `attention_mask`"):
        logits_of(model, row(TWO_PATHS), attention_mask=mask)


@every_architecture
@pytest.mark.parametrize("masked", [False, True], ids=["built", "explicit"])
def test_unsupported_attention_raises_on_tagged_text(architecture: str, masked: bool) -> None:
    model = tiny_model(architecture)
    model.config._attn_implementation = "flash_attention_2"
    layout = reference_layout(TWO_PATHS, TOKEN_IDS)
    arguments = {"attention_mask": reference_mask(layout), "position_ids": row(layout.positions)} if masked else {}
    with pytest.raises(ValueError, match="`attn_implementation` is 'flash_attention_2'"):
        logits_of(model, row(TWO_PATHS), **arguments)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_sliding_windows_raise_on_tagged_text(architecture: str) -> None:
    model = tiny_model(architecture, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match=r"`config\.layer_types` .*`use_sliding_window=False`"):
        logits_of(model, row(TWO_PATHS))


# --- Cost, and the rest of the interface -----------------------------------------------------------------------------


@every_architecture
def test_structured_mask_is_built_once_and_for_blocks_only(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models(architecture)
    calls: list[dict] = []
    original = multiverse.masking_multiverse.create_causal_mask

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(multiverse.masking_multiverse, "create_causal_mask", spy)
    input_ids, mask = pad([WORDS, STRAY_TAGS], "left")
    logits_of(model, input_ids, attention_mask=mask)
    logits_of(model, row(WORDS), position_ids=restarting([WORDS[:6], WORDS[6:]]))
    _, past_key_values = in_chunks(model, row(STRAY_TAGS), [5, len(STRAY_TAGS) - 5])
    assert len(calls) == 0
    logits_of(model, row(TWO_PATHS))
    assert len(calls) == 1
    logits_of(model, row(TWO_PATHS), past_key_values=past_key_values)
    assert len(calls) == 2


@every_architecture
@every_attention
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(architecture: str, attention: str) -> None:
    found = []
    input_ids, mask = pad([NESTED, OPEN_BLOCK], "right")
    labels = input_ids.masked_fill(mask == 0, -100)
    for checkpointing in (False, True):
        model, _ = fresh_models(architecture, attention=attention)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        found.append((loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain_loss, plain_gradients), (loss, gradients) = found
    assert abs(loss - plain_loss) <= 1e-5
    for name, gradient in gradients.items():
        assert difference(gradient, plain_gradients[name]) <= 1e-5, name


@every_architecture
def test_hidden_states_and_attentions_arrive(architecture: str) -> None:
    model, _ = models(architecture, torch.float64, "eager")
    with torch.no_grad():
        output = model(input_ids=row(NESTED), output_hidden_states=True, output_attentions=True)
    length, layers = len(NESTED), model.config.num_hidden_layers
    assert [tuple(states.shape) for states in output.hidden_states] == [(1, length, 32)] * (layers + 1)
    assert [tuple(weights.shape) for weights in output.attentions] == [(1, 4, length, length)] * layers
    visible = torch.tensor(reference_layout(NESTED, TOKEN_IDS).visible)
    for weights in output.attentions:
        assert (weights[0, :, ~visible] == 0.0).all()
        assert (weights[0, :, visible] > 0.0).all()
        assert difference(weights.sum(dim=3), torch.ones(1, 4, length, dtype=torch.float64)) <= 1e-5


@every_architecture
def test_backbone_alone_knows_the_structure(architecture: str) -> None:
    # TRL's fused LM head calls the backbone and never the causal LM's forward.
    model, base = models(architecture)
    layout = reference_layout(NESTED, TOKEN_IDS)
    mask = additive(reference_mask(layout), torch.float64)
    with torch.no_grad():
        found = model.base_model(input_ids=row(NESTED)).last_hidden_state
        expected = base.base_model(
            input_ids=row(NESTED), attention_mask=mask, position_ids=row(layout.positions)
        ).last_hidden_state
    assert difference(found, expected) <= 1e-5


def test_embeddings_cannot_carry_on_a_cache_that_holds_blocks():
    model = tiny_model("llama")
    prompt = torch.tensor([[30, TOKEN_IDS["<Parallel>"], TOKEN_IDS["<Path>"], 31]])
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    embeddings = model.get_input_embeddings()(torch.tensor([[32]]))
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        model(inputs_embeds=embeddings, past_key_values=cache)
