"""What the benchmark of growth counts and computes; nothing here looks at how long anything took."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benched import programs, tiny_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from multiverse.trainer.expression_trees import TreeOptions, predicted_steps
from multiverse.trainer.synthetic import generate_problems


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    yield from programs("growth", "growth_picture", "workloads")


@pytest.fixture(scope="module")
def pair(bench: SimpleNamespace) -> Any:
    return tiny_pair(bench.workloads)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    exponent=st.floats(-2, 3),
    factor=st.floats(1e-3, 1e3),
    sizes=st.lists(st.integers(1, 10_000), min_size=3, max_size=8, unique=True),
)
def test_a_power_law_is_found_again(bench: SimpleNamespace, exponent: float, factor: float, sizes: list[int]) -> None:
    law = bench.growth.fit_power_law(sizes, [factor * size**exponent for size in sizes])
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    assert law.factor == pytest.approx(factor, rel=1e-4)
    assert law.standard_error == pytest.approx(0, abs=1e-5)


def test_the_standard_error_by_hand(bench: SimpleNamespace) -> None:
    # Logarithms to base e of 1, e, e^2, e^3 against 0, 2, 1, 3: slope 4/5, residuals -0.3, 0.9, -0.9, 0.3.
    law = bench.growth.fit_power_law([math.e**x for x in range(4)], [math.e**y for y in (0, 2, 1, 3)])
    assert law.exponent == pytest.approx(0.8)
    assert law.factor == pytest.approx(math.e**0.3)
    assert law.standard_error == pytest.approx(math.sqrt((0.3**2 + 0.9**2 + 0.9**2 + 0.3**2) / 2 / 5))


def test_what_has_no_power_law_is_refused(bench: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="three points"):
        bench.growth.fit_power_law([1, 2], [1, 2])
    with pytest.raises(ValueError, match="three points"):
        bench.growth.fit_power_law([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="positive"):
        bench.growth.fit_power_law([1, 2, 3], [1, 0, 2])


def test_medians_of_the_rounds_are_fitted_and_the_largest_points_by_themselves(bench: SimpleNamespace) -> None:
    axis = bench.growth.Axis("a", "sizes", [1, 2, 4, 8, 16], None, {"cost": (0, 1, "so")})
    # Constant at first and linear later, with one wild round in three.
    curve = {1: 4.0, 2: 4.0, 4: 4.0, 8: 8.0, 16: 16.0}
    rounds = [{size: {"cost": (10 * size, times * cost)} for size, cost in curve.items()} for times in (1.0, 9.0, 0.5)]
    row = bench.growth.summarise(axis, rounds)
    found = row["series"]["cost"]
    assert (row["sizes"], found["sizes"]) == ([1, 2, 4, 8, 16], [10, 20, 40, 80, 160])
    assert found["medians"] == list(curve.values())
    assert found["values"][3] == [8.0, 72.0, 4.0]
    assert found["fit_of_largest"]["exponent"] == pytest.approx(1)
    assert 0.3 < found["fit"]["exponent"] < 0.7
    short = bench.growth.summarise(axis, [{size: costs for size, costs in rounds[0].items() if size < 4}])
    assert short["sizes"] == [1, 2]
    assert "fit" not in short["series"]["cost"]


def test_steps_are_taken_while_all_paths_are_live(bench: SimpleNamespace, pair: Any) -> None:
    for paths in (1, 3, 12):
        times, first, last = bench.growth.forked_steps(pair, pair.prompt(400, paths), paths, 5)
        assert last - first == 5
        assert [b - a for a, b in zip(times.slots[first - 1 : last - 1], times.slots[first:last], strict=True)] == [
            paths
        ] * 5
    assert len(times.whole) == len(times.attention) == len(times.slots)
    assert all(0 < inside < whole for inside, whole in zip(times.attention, times.whole, strict=True))
    times = bench.growth.StepTimes([9.0, 4.0, 3.0, 8.0], [9.0, 1.0, 2.5, 2.0], [0] * 4)
    assert times.medians(1, 4) == {"step": 4000.0, "attention": 2000.0, "all else": 3000.0}


def test_the_clock_leaves_the_engine_as_it_was(bench: SimpleNamespace, pair: Any) -> None:
    growth = bench.growth
    before = growth.Engine._step, growth.attention.folded_attention
    with growth.step_clock() as times:
        report = pair.run_ours(pair.prompt(200, 2), 40, max_path_tokens=9).reports[0]
    assert len(times.whole) == report.sequential_steps
    assert times.slots[-1] == report.kv_slots
    with pytest.raises(KeyError), growth.step_clock():
        raise KeyError
    assert (growth.Engine._step, growth.attention.folded_attention) == before


def test_costs_are_set_against_what_they_grow_with(bench: SimpleNamespace, pair: Any) -> None:
    costs = bench.growth.prompt_case(pair, 300, 4, 3)
    goal = pair.tokenizer.encode("<Parallel>\n<Goal>\n" + "".join(
        f"<Outline>\n{number}: look\n</Outline>\n" for number in range(1, 5)) + "</Goal>")  # fmt: skip
    assert costs["prompt"][0] == 300 - len(goal)
    # A separator, four headers of four tokens, and what was sampled before: 2, 3 and 4 tokens a path.
    assert costs["step"][0] == 300 + 1 + 4 * 4 + 4 * 3
    assert set(costs) == {"prompt", "step", "attention", "all else"}
    assert {size for size, _ in bench.growth.branch_case(pair, 3, 300, 3).values()} == {3}
    assert {size for size, _ in bench.growth.batch_case(pair, 2, 3, 300, 3).values()} == {2}
    for depth in (1, 2):
        costs = bench.growth.depth_case(pair, depth)
        options = TreeOptions(depth=(depth, depth), branching=(2, 2), terms=(2, 2))
        (problem,) = generate_problems(1, 0, options)
        assert costs["steps"] == (depth, predicted_steps(problem.parallel(), pair.tokenizer, pair.ours.config))


def test_growth_keeps_what_it_has_and_draws_it(
    bench: SimpleNamespace, pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    growth = bench.growth
    monkeypatch.setattr(growth.Pair, "load", classmethod(lambda cls: pair))
    monkeypatch.setattr(growth, "load_of_others", lambda: 0.0)
    arguments: dict[str, Any] = {
        "repeats": 2, "steps": 3, "prompts": "256,512,1024", "branches": "1,2,4", "depths": "1,2,3",
        "batches": "1,2,3", "output": tmp_path,
    }  # fmt: skip
    broken = growth.depth_case

    def fails_at_two(pair: Any, depth: int) -> Any:
        if depth == 2:
            raise RuntimeError("out of memory")
        return broken(pair, depth)

    monkeypatch.setattr(growth, "depth_case", fails_at_two)
    with pytest.raises(RuntimeError, match="out of memory"):
        growth.main(**{**arguments, "prompts": ""})
    kept = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [(row["axis"], row["sizes"]) for row in kept] == [("branches", [1, 2, 4]), ("depth", [1])]

    monkeypatch.setattr(growth, "depth_case", broken)
    growth.main(**arguments)
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [row["axis"] for row in rows] == ["prompt", "branches", "depth", "batch"]
    for row in rows:
        assert len(row["sizes"]) == 3
        for found in row["series"].values():
            assert [len(values) for values in found["values"]] == [2, 2, 2]
            law = growth.fit_power_law(found["sizes"], found["medians"])
            assert found["fit"]["exponent"] == pytest.approx(law.exponent)
    assert ElementTree.parse(tmp_path / "growth.svg").getroot() is not None
    drawn = (tmp_path / "growth.svg").read_text()
    for row in rows:
        assert f"<!-- {row['axis']} -->" in drawn

    monkeypatch.setattr(growth.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="matplotlib"):
        growth.main(**arguments)
