"""Branches can be told apart: on any page, and by any reader."""

import itertools

import numpy as np
import pytest
from multiverse.hub_card.drawings import COLOURS, ROOT_COLOUR, branch_colour


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2)."""
    return float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour))


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(light: np.ndarray) -> np.ndarray:
    """Björn Ottosson's Oklab, in which distances are alike to the eye."""
    cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    axes = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45059], [0.02590, 0.78277, -0.80868]]
    return np.array(axes) @ np.cbrt(np.clip(np.array(cones) @ light, 0, None))


#: What is left of linear RGB to readers who lack one kind of cone (Machado, Oliveira and Fernandes 2009).
VISION = {
    "full": np.eye(3),
    "protan": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deutan": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
    "tritan": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}


@pytest.mark.parametrize("background", ["#ffffff", "#16181d"])
@pytest.mark.parametrize("colour", [*COLOURS, ROOT_COLOUR])
def test_every_colour_stands_out_on_a_light_and_on_a_dark_page(colour, background):
    lighter, darker = sorted([luminance(colour) + 0.05, luminance(background) + 0.05], reverse=True)
    assert lighter / darker >= 3


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart_by_readers_who_see_fewer(vision):
    seen = [oklab(np.clip(VISION[vision] @ linear(colour), 0, 1)) for colour in COLOURS]
    distances = {
        pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in itertools.combinations(range(8), 2)
    }
    # 0.02 is about what is just noticed side by side.
    assert min(distances.values()) > 0.09
    assert min(distances[min(pair), max(pair)] for pair in ((n, (n + 1) % 8) for n in range(8))) > 0.12


def test_the_root_is_grey_and_paths_take_turns():
    assert branch_colour(0) == ROOT_COLOUR
    assert [branch_colour(branch) for branch in range(1, 20)] == [*COLOURS, *COLOURS, *COLOURS[:3]]
