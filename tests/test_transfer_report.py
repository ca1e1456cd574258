"""Figures of the transfer experiment against their definitions, and reports from records that are not complete."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from multiverse.trainer import transfer
from multiverse.trainer.transfer_report import bootstrap_interval, budget_curve, compare, report_on


def record(problem: int, right: bool = True, steps: int = 100, reason: str = "eos") -> dict[str, Any]:
    return {
        "problem": problem,
        "right": right,
        "valid": reason == "eos",
        "finish_reason": reason,
        "generated_tokens": 2 * steps,
        "sequential_steps": steps,
    }


def answers(right: str, steps: int = 100) -> list[dict[str, Any]]:
    """Records of one run; `right` has a 1 for every problem that it solves."""
    return [record(number, mark == "1", steps) for number, mark in enumerate(right)]


def write(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def write_training(folder: Path, name: str, killed: bool = False) -> None:
    machine = {"processor": "p", "cores": 2, "threads": 1, "torch": "t"}
    sessions = [
        {"from_update": 0, "to_update": 2, "seconds": 5.0, "processor_seconds": 4.0, "machine": machine},
        {"from_update": 2, "to_update": 4, "seconds": 7.5, "processor_seconds": 6.0, "machine": machine},
    ]
    log = [{"step": step, "loss": 1.0 / step, "loss_content": 0.5 / step} for step in range(1, 5)]
    training = {
        "shares": [0.0, 1.0],
        "updates": 4,
        "tokens": 1234,
        "sessions": sessions[1:] if killed else sessions,
        "start_sha256": "abc",
        "log": log,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_training.json").write_text(json.dumps(training))


def test_budget_curve_is_what_runs_cut_after_that_many_steps_have_solved():
    rng = random.Random(0)
    records = [
        record(number, rng.random() < 0.8, rng.randint(1, 60), rng.choice(["eos", "eos", "eos", "length"]))
        for number in range(50)
    ]
    budgets = list(range(0, 70))
    expected = []
    for budget in budgets:
        solved = 0
        for each in records:
            finished = each["finish_reason"] == "eos" and each["sequential_steps"] <= budget
            solved += finished and each["right"]
        expected.append(solved / 50)
    assert budget_curve(records, budgets) == expected
    assert expected[0] == 0.0
    assert expected[-1] == sum(each["right"] and each["finish_reason"] == "eos" for each in records) / 50


def binomial_quantile(trials: int, share: float, level: float) -> int:
    total = 0.0
    for successes in range(trials + 1):
        total += math.comb(trials, successes) * share**successes * (1 - share) ** (trials - successes)
        if total >= level:
            return successes
    return trials


def mean(means: np.ndarray) -> np.ndarray:
    return means[:, 0]


def test_bootstrap_interval_of_a_share_is_the_binomials():
    # What is drawn with replacement from 30 problems, 20 of them solved, is binomial. Both levels lie four standard
    # errors of 10,000 draws or more from where its distribution jumps.
    values = np.array([[1.0]] * 20 + [[0.0]] * 10)
    low, high = bootstrap_interval(values, mean)
    assert low == pytest.approx(binomial_quantile(30, 2 / 3, 0.025) / 30, abs=1e-9)
    assert high == pytest.approx(binomial_quantile(30, 2 / 3, 0.975) / 30, abs=1e-9)


def test_bootstrap_interval_of_two_problems_and_of_equal_ones():
    # The mean of two draws is 0, 0.5 or 1, in a quarter, a half, a quarter of the cases.
    assert bootstrap_interval(np.array([[0.0], [1.0]]), mean) == (0.0, 1.0)
    assert bootstrap_interval(np.full((7, 1), 0.25), mean) == (0.25, 0.25)


def test_problems_are_drawn_for_both_arms_together():
    one = answers("1100110010")
    assert compare({0: one}, {0: one})["interval_95"] == [0.0, 0.0]
    # Every problem differs by as much, though problems differ from each other.
    harder = [{**each, "sequential_steps": 3 * (50 + each["problem"])} for each in one]
    easier = [{**each, "sequential_steps": 50 + each["problem"]} for each in one]
    found = compare({0: easier}, {0: harder})
    assert found["steps_ratio"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["steps_ratio_interval_95"] == pytest.approx([1 / 3, 1 / 3], abs=1e-4)


def test_seeds_are_averaged_over_those_that_both_arms_have():
    first = {0: answers("1111", 50), 1: answers("1100", 70), 2: answers("0000", 9)}
    second = {1: answers("1000", 200), 0: answers("0000", 100)}
    found = compare(first, second)
    assert found["seeds"] == [0, 1]
    assert found["accuracy_difference_by_seed"] == [1.0, 0.25]
    # By problem: 1, 1, 0.5, 0.5 less 0.5, 0, 0, 0.
    assert found["accuracy_difference"] == 0.625
    assert found["steps_ratio"] == 0.4
    low, high = found["interval_95"]
    # Differences of problems: 0.5, 1, 0.5, 0.5.
    assert low == 0.5
    assert 0.625 < high <= 1.0


def test_a_report_from_some_of_the_runs(tmp_path):
    folder = tmp_path / "transfer"
    write(folder, "multiverse-0", answers("1101", 40))
    write(folder, "multiverse-1", answers("1111", 60))
    write(folder, "sequential-0", answers("1000", 100))
    write(folder, "sequential-1", answers("10", 100))
    write(folder, "start", answers("1110", 100))
    write_training(folder, "multiverse-0")
    write_training(folder, "sequential-0", killed=True)
    report = report_on(folder, ["multiverse", "sequential", "curriculum"], [0, 1], 4)
    assert report["missing"] == [
        "curriculum-0: answers",
        "curriculum-0: training",
        "curriculum-1: answers",
        "curriculum-1: training",
        "multiverse-1: training",
        "sequential-1: answers (2 of 4)",
        "sequential-1: training",
    ]
    pooled = report["arms"]["multiverse"]
    assert pooled["seeds"] == [0, 1]
    assert (pooled["right"], pooled["problems"], pooled["accuracy"]) == (7, 8, 0.875)
    assert pooled["sequential_steps"] == 50
    assert pooled["mean_degree_of_parallelism"] == 2.0
    within = pooled["solved_within_steps"]
    assert (within["20"], within["40"], within["60"]) == (0.0, 0.375, 0.875)
    assert report["arms"].keys() == {"multiverse", "sequential"}
    assert report["runs"]["sequential-0"]["answers"]["right"] == 1
    facts = report["runs"]["multiverse-0"]["training"]
    assert (facts["updates"], facts["tokens"], facts["seconds"], facts["timed_updates"]) == (4, 1234, 12.5, 4)
    assert len(facts["machines"]) == 1
    assert report["runs"]["sequential-0"]["training"]["timed_updates"] == 2
    against = report["comparisons"]
    assert against.keys() == {"multiverse - sequential", "multiverse - start", "sequential - start"}
    assert against["multiverse - sequential"]["seeds"] == [0]
    assert against["multiverse - sequential"]["accuracy_difference"] == 0.5
    assert against["multiverse - sequential"]["steps_ratio"] == 0.4
    assert against["multiverse - start"]["accuracy_difference"] == 0.125
    assert against["sequential - start"]["accuracy_difference_by_seed"] == [-0.5]


def test_a_report_needs_a_run(tmp_path):
    write(tmp_path, "multiverse-0", answers("10"))
    with pytest.raises(ValueError, match="`results`"):
        report_on(tmp_path, ["multiverse"], [0], 4)


def test_the_report_is_written_beside_the_records(tmp_path, capsys):
    folder = tmp_path / "transfer"
    write(folder, "multiverse-3", answers("1101", 40))
    transfer.report(problems=4, results=tmp_path, pictures=False)
    report = json.loads((tmp_path / "transfer.json").read_text())
    assert report["arms"]["multiverse"]["seeds"] == [3]
    assert "multiverse-0: answers" in report["missing"]
    assert "3/4 right" in capsys.readouterr().out


def test_designs_are_reported_apart_and_share_the_start_that_lies_beside_its_weights(tmp_path):
    write(tmp_path / "starts", "any-name", answers("1110", 100))
    settings = {"model_name_or_path": "base", "adapter_path": str(tmp_path / "starts" / "any-name")}
    rights = {"short": "1000", "once": "1100"}
    for name, epochs in (("short", 8), ("once", 1)):
        config = tmp_path / f"smollm2_{name}.yaml"
        config.write_text(yaml.safe_dump({**settings, "num_train_epochs": epochs}))
        write(tmp_path / name, "multiverse-0", answers(rights[name], 40))
        transfer.report(problems=4, config=config, results=tmp_path, pictures=False)
        report = json.loads((tmp_path / f"{name}.json").read_text())
        assert report["runs"].keys() == {"multiverse-0", "start"}
        start = report["comparisons"]["multiverse - start"]
        assert start["accuracy_difference"] == rights[name].count("1") / 4 - 0.75
        assert any("curriculum" in line for line in report["missing"]) == (epochs > 1)


def test_pictures_of_some_of_the_runs(tmp_path):
    folder = tmp_path / "transfer"
    write(folder, "multiverse-0", answers("1101", 40))
    write(folder, "multiverse-1", answers("1111", 60))
    write(folder, "start", answers("1110", 100))
    write_training(folder, "multiverse-0")
    transfer.report(problems=4, results=tmp_path)
    for name in ("transfer_budget.svg", "transfer_arms.svg"):
        assert "</svg>" in (tmp_path / name).read_text()
