"""The support modules agree with each other."""

from strategies import Sample
from tiny import NEWLINE, TOKEN_IDS, from_strategy


def test_sample_strategy_fits_the_fixed_vocabulary() -> None:
    assert from_strategy(Sample([0, 12]).ids) == [TOKEN_IDS["<Think>"], NEWLINE]
