"""The picture shows what the mask says."""

from xml.etree import ElementTree

from multiverse.kernels.mask_picture import _CELL, example_mask, mask_svg


def test_every_visible_pair_is_drawn_in_a_block_that_is_visited() -> None:
    mask = example_mask()
    visible = mask.visible()[0]
    _, background, *shapes = ElementTree.fromstring(mask_svg(mask, 8, 8)).iter()
    assert background.get("fill") == "#dee2e6"
    cells, covered = set(), set()
    for shape in shapes:
        x, y, width, height = (int(float(shape.get(name))) for name in ("x", "y", "width", "height"))
        if shape.get("fill") != "white":
            cells |= {(y // _CELL, x // _CELL + number) for number in range((width + 2) // _CELL)}
            continue
        block = {
            (row, column)
            for row in range(y // _CELL, (y + height) // _CELL)
            for column in range(x // _CELL, (x + width) // _CELL)
        }
        seen = [bool(visible[place]) for place in block]
        assert any(seen)
        # A block that reaches over the edge needs its mask for that.
        assert (all(seen) and len(block) == 64) == (shape.get("stroke") != "none")
        covered |= block
    assert cells == {tuple(place) for place in visible.nonzero().tolist()}
    assert cells <= covered
    assert {(row // 8, key // 8) for row, key in covered} == {(row // 8, key // 8) for row, key in cells}
