"""What the kernel tests share: random masks and inputs, the reference's answer, and the tolerances."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from multiverse import BranchLayout
from multiverse.kernels.path_mask import PathMask
from multiverse.kernels.reference import path_attention_reference
from multiverse.structure import StructureMachine

#: Largest error of outputs and gradients, as a share of the largest entry of the exact ones.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}


@dataclass
class MaskCase:
    """A mask, and what it stands for in dense form.

    Attributes:
        mask (`PathMask`): of B rows, Q queries and S slots.
        visible (`torch.BoolTensor` of shape `(B, Q, S)`): from the branch table, not from the mask.
    """

    mask: PathMask
    visible: torch.Tensor

    @property
    def real(self) -> torch.Tensor:
        """Bool of shape `(B, S)`: slots that are no padding."""
        return self.mask.branch_ids >= 0

    @property
    def real_queries(self) -> torch.Tensor:
        """Bool of shape `(B, Q)`."""
        return self.real[:, self.real.shape[1] - self.mask.queries :]


def random_machine(rng: random.Random, length: int, documents: int = 1) -> StructureMachine:
    """Reads a random text of exactly `length` tokens: documents with blocks on up to three levels, of one to four
    paths each, some of them malformed, cut off wherever the length is reached."""
    machine, depth = StructureMachine(), 0

    def words(most: int) -> None:
        machine.read_plain(rng.randint(0, most))

    def text(level: int) -> None:
        words(5)
        for _ in range(rng.randint(0 if level else 1, 2) if level < depth else 0):
            block(level)
            words(3)

    def block(level: int) -> None:
        machine.read_tag("<Parallel>")
        words(2)
        machine.read_tag("</Goal>")
        words(1)
        for _ in range(rng.randint(1, 4)):
            machine.read_tag("<Path>")
            text(level + 1)
            machine.read_tag("</Path>")
            words(1)
        if rng.random() < 0.9:
            machine.read_tag("<Conclusion>")
            text(level + 1)
        if rng.random() < 0.1:  # malformed: one more path after the conclusion
            machine.read_tag("<Path>")
            words(4)
        if rng.random() < 0.9:
            machine.read_tag("</Parallel>")

    borders = sorted(rng.sample(range(1, length), documents - 1)) if documents > 1 else []
    for end in [*borders, length]:
        depth = rng.choice((0, 1, 2, 3, 3))
        while machine.length < end:
            text(0)
            if rng.random() < 0.2:
                machine.read_plain(rng.randint(1, 8))
        machine = machine.truncated(end)
        if end < length:
            machine.start_document()
    return machine


def mask_case(
    machines: list[StructureMachine], real: torch.Tensor, queries: int | None = None, device: str = "cpu"
) -> MaskCase:
    """The mask of rows whose tokens stand where `real`, bool of shape `(B, S)`, is True, beside its dense form."""
    queries = real.shape[1] if queries is None else queries
    branch_ids = torch.full(real.shape, -1)
    visible = torch.zeros(*real.shape, real.shape[1], dtype=torch.bool)
    for row, machine in enumerate(machines):
        layout = BranchLayout.from_machine(machine)
        slots = real[row].nonzero().flatten()
        branch_ids[row, slots] = layout.branch_ids
        visible[row, slots[:, None], slots] = layout.attention_mask()
    mask = PathMask.from_machines(machines, branch_ids, queries, device)
    return MaskCase(mask, visible[:, real.shape[1] - queries :].to(device))


def random_case(
    seed: int,
    batch: int = 2,
    slots: int | None = None,
    queries: int | None = None,
    documents: int | None = None,
    padded: bool = True,
    device: str = "cpu",
) -> MaskCase:
    """A batch of random trees: odd lengths, packed documents, padding on either side and in the middle.

    Args:
        slots (`int`, *optional*): S, between 17 and 70 by default.
        queries (`int`, *optional*): Q, all slots or (one case in three) some of the last by default.
        documents (`int`, *optional*): per row, one to three by default.
        padded (`bool`): whether rows hold padding; then the last row of some cases is nothing else but one token.
    """
    rng = random.Random(seed)
    slots = rng.randint(17, 70) if slots is None else slots
    if queries is None:
        queries = slots if rng.random() < 0.67 else rng.randint(1, slots)
    real = torch.ones(batch, slots, dtype=torch.bool)
    for row in real if padded else ():
        for _ in range(rng.randint(0, 2)):
            start = rng.choice((0, rng.randrange(slots), rng.randrange(slots)))
            row[start : start + rng.randint(1, max(1, slots // 4))] = False
        if rng.random() < 0.1:
            row[1:] = False
        row[rng.randrange(slots)] = True
    machines = []
    for length in real.sum(1).tolist():
        count = rng.choice((1, 1, 2, 3)) if documents is None else documents
        machines.append(random_machine(rng, length, min(count, length)))
    return mask_case(machines, real, queries, device)


def random_masks(seed: int, batch: int = 2, **options) -> PathMask:
    """The mask of `random_case`."""
    return random_case(seed, batch, **options).mask


@dataclass
class Inputs:
    """Leaves that require gradients, and the gradient of the output."""

    query: torch.Tensor  # [B, HQ, Q, D]
    key: torch.Tensor  # [B, HKV, S, D]
    value: torch.Tensor  # [B, HKV, S, D]
    grad_output: torch.Tensor  # [B, HQ, Q, D]

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another dtype, as leaves of their own."""
        leaves = (leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves)
        return Inputs(*leaves, self.grad_output.to(dtype))


def random_inputs(
    case: MaskCase,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    poisoned: bool = True,
) -> Inputs:
    """N(0, 1) in `dtype`, strided as in transformers (tokens before heads); padding holds NaN if `poisoned`.

    Args:
        heads (`tuple[int, int]`): of queries, and of keys and values.
    """
    mask, generator = case.mask, torch.Generator().manual_seed(seed)

    def leaf(tokens: int, heads: int, real: torch.Tensor | None) -> torch.Tensor:
        tensor = torch.randn(mask.batch_size, tokens, heads, dim, generator=generator).to(mask.device, dtype)
        if real is not None:
            tensor[~real] = torch.nan
        return tensor.transpose(1, 2)

    real, real_queries = (case.real, case.real_queries) if poisoned else (None, None)
    query, key, value = (
        leaf(tokens, count, which).requires_grad_()
        for tokens, count, which in (
            (mask.queries, heads[0], real_queries),
            (mask.slots, heads[1], real),
            (mask.slots, heads[1], real),
        )
    )
    return Inputs(query, key, value, leaf(mask.queries, heads[0], None))


@dataclass
class Answer:
    """Output and gradients."""

    output: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def answer(inputs: Inputs, attend: Callable[..., torch.Tensor]) -> Answer:
    """Runs `attend(query, key, value)` forward and backward."""
    output = attend(*inputs.leaves)
    gradients = torch.autograd.grad(output, inputs.leaves, inputs.grad_output, allow_unused=True)
    filled = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, inputs.leaves, strict=True))
    return Answer(output.detach(), *filled)


def reference_answer(inputs: Inputs, case: MaskCase, scale: float | None = None) -> Answer:
    """The reference in float64 on the very numbers of `inputs`."""
    return answer(inputs.to(torch.float64), lambda *qkv: path_attention_reference(*qkv, case.visible, scale)[0])


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float, what: str) -> None:
    """No entry differs by more than `tolerance` times the largest exact one; NaN never passes."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs().max()
    bound = tolerance * exact.abs().max()
    assert error <= bound, f"{what}: error {error:.2e}, allowed {bound:.2e}"


def assert_matches_reference(
    attend: Callable[..., torch.Tensor],
    case: MaskCase,
    inputs: Inputs,
    scale: float | None = None,
) -> None:
    """Output and all gradients against the reference; what stands at padding is not read and gets exactly 0.

    Args:
        attend: called as `attend(query, key, value, mask, scale)`; returns the output, `(B, HQ, Q, D)`.
    """
    found = answer(inputs, lambda *qkv: attend(*qkv, case.mask, scale))
    exact = reference_answer(inputs, case, scale)
    assert found.output.dtype == inputs.query.dtype
    tolerance = TOLERANCE[inputs.query.dtype]
    for name, expected in vars(exact).items():
        assert_close(getattr(found, name), expected, tolerance, name if name == "output" else f"gradient of {name}")
    blind = ~case.visible.any(2)
    for name, unread in (("output", blind), ("query", blind), ("key", ~case.real), ("value", ~case.real)):
        rows = getattr(found, name).transpose(1, 2)
        assert (rows[unread] == 0).all(), name
