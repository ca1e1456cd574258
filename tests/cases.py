"""What many test files share: the cases that they are run for, and how far two computations may differ."""

import gc
from collections.abc import Iterator

import pytest
import torch
from tiny import ARCHITECTURES

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
both_modes = pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """What is there already, all that was imported, is not looked through at every collection of garbage."""
    gc.freeze()
    yield
    gc.unfreeze()
