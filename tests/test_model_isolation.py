"""Isolation: paths neither see nor change each other."""

from collections.abc import Sequence

import torch
from cases import every_architecture
from forward import (
    NESTED,
    TWO_PATHS,
    difference,
    every_attention,
    every_dtype,
    examples,
    logits_of,
    models,
    row,
    tagged_texts,
)
from hypothesis import given
from hypothesis import strategies as st
from reference_layout import reference_layout
from tiny import FIRST_WORD, TOKEN_IDS
from tiny import VOCABULARY as TINY_VOCABULARY
from transformers import PreTrainedModel


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
