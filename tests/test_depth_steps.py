"""Sequential steps of expression trees: as counted by hand, as the engine counts them, and as a benchmark of both."""

import importlib
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multiverse.trainer.expression_trees import Expression, ExpressionProblem, TreeOptions, predicted_steps
from multiverse.trainer.synthetic import Problem, Sum, generate_problems
from tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("parallel", "sequential")


@pytest.fixture(scope="module")
def depth_steps() -> Iterator[ModuleType]:
    """The benchmark, which is a program of the repository and not of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("benchmarks.depth_steps")


@pytest.fixture(scope="module")
def speaker(depth_steps: ModuleType) -> Any:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    return depth_steps.random_model(tokenizer), tokenizer


def predict(speaker: Any, text: str, **options: int) -> int:
    model, tokenizer = speaker
    return predicted_steps(text, tokenizer, model.config, **options)


def text_of(problem: Problem, form: str) -> str:
    return problem.messages(form)["completion"][0]["content"]


def tokens(text: str) -> int:
    """Tokens of the tiny tokenizer, by its definition: a tag, a merged word or a character is one."""
    return len(re.findall(r"</?[A-Z][a-z]+>|Answer|.", text, flags=re.DOTALL))


def test_steps_of_a_text_counted_by_hand(speaker: Any) -> None:
    first = Expression("A", parts=(Sum("A1", (1, 2)), Sum("A2", (9, -5, 2))), operators=("*",))
    problem = ExpressionProblem((first, Sum("B", (7, 3))), ("-",))
    goal = "<Parallel>\n<Goal>\n<Outline>\n1: A\n</Outline>\n<Outline>\n2: B\n</Outline>\n</Goal>"
    inner_goal = " A\n<Parallel>\n<Goal>\n<Outline>\n1.1: A1\n</Outline>\n<Outline>\n1.2: A2\n</Outline>\n</Goal>"
    inner_paths = " A1\n1+2=3\nA1=3\n</Path>", " A2\n9-5=4\n4+2=6\nA2=6\n</Path>"
    inner_rest = "\nA1*A2=3*6=18\n</Conclusion>\n</Parallel>\nA=18\n</Path>"
    rest = "\nA-B=18-10=8\n</Conclusion>\n</Parallel>\nAnswer: 8"
    # The engine forces the newline after a goal and after a path, a path's header up to its colon, and <Conclusion>.
    text = (
        f"{goal}\n<Path>\n1:{inner_goal}\n<Path>\n1.1:{inner_paths[0]}\n<Path>\n1.2:{inner_paths[1]}\n"
        f"<Conclusion>{inner_rest}\n<Path>\n2: B\n7+3=10\nB=10\n</Path>\n<Conclusion>{rest}"
    )
    assert problem.parallel() == text
    longest = tokens(inner_goal) + tokens(inner_paths[1]) + tokens(inner_rest)
    assert predict(speaker, text) == tokens(goal) + longest + tokens(rest) + 1
    twin = "A\nA1\n1+2=3\nA1=3\nA2\n9-5=4\n4+2=6\nA2=6\nA1*A2=3*6=18\nA=18\nB\n7+3=10\nB=10\nA-B=18-10=8\nAnswer: 8"
    assert problem.sequential() == twin
    assert predict(speaker, twin) == tokens(twin) + 1


@pytest.mark.parametrize("parts", [2, 3])
def test_parallel_steps_grow_with_depth_and_sequential_ones_with_size(speaker: Any, parts: int) -> None:
    means: dict[str, list[float]] = {form: [] for form in FORMS}
    for depth in (1, 2, 3):
        options = TreeOptions(depth=(depth, depth), branching=(parts, parts), terms=(4, 4))
        for form in FORMS:
            steps = [predict(speaker, text_of(problem, form)) for problem in generate_problems(10, 0, options)]
            means[form].append(sum(steps) / len(steps))
    first, second = (after - before for before, after in pairwise(means["parallel"]))
    # A block on the way down adds what the one above it added, and its longer labels and names.
    assert first <= second <= 1.4 * first
    assert all(parts <= after / before <= 1.4 * parts for before, after in pairwise(means["sequential"]))


@st.composite
def uneven_trees(draw: st.DrawFn) -> ExpressionProblem:
    """Trees of one to three blocks whose paths differ in depth and length."""
    chains = TreeOptions(terms=(2, 5))
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))

    def parts_at(depth: int, name: str) -> tuple[Sum, ...]:
        count = draw(st.sampled_from([2, 3] if depth == 1 else [2]))
        names = [f"{name}{number}" if name else chr(ord("A") + number - 1) for number in range(1, count + 1)]
        return tuple(node(depth, each) for each in names)

    def node(depth: int, name: str) -> Sum:
        if depth == 3 or not draw(st.booleans()):
            return chains.chain(rng, name, 20)
        parts = parts_at(depth + 1, name)
        return Expression(name, parts=parts, operators=("+",) * (len(parts) - 1))

    parts = parts_at(1, "")
    return ExpressionProblem(parts, ("+",) * (len(parts) - 1))


@settings(deadline=None, derandomize=True, max_examples=8, suppress_health_check=list(HealthCheck))
@given(problem=uneven_trees())
def test_the_engine_takes_the_predicted_steps(
    depth_steps: ModuleType, speaker: Any, problem: ExpressionProblem
) -> None:
    for form in FORMS:
        report = depth_steps.dictate(speaker, problem, form)
        assert report.sequential_steps == predict(speaker, text_of(problem, form))
        assert report.finish_reason == "eos"


def test_depth_three_takes_the_predicted_steps_and_one_path_at_a_time_a_step_per_sampled_token(
    depth_steps: ModuleType, speaker: Any
) -> None:
    (problem,) = generate_problems(1, 1, TreeOptions(depth=(3, 3), terms=(2, 3)))
    assert "1.1.1: A11" in problem.parallel()
    report = depth_steps.dictate(speaker, problem, "parallel")
    assert report.sequential_steps == predict(speaker, problem.parallel())
    alone = depth_steps.dictate(speaker, problem, "parallel", parallel=False)
    assert alone.sequential_steps == report.generated_tokens - report.forced_tokens > 2 * report.sequential_steps


def test_texts_whose_steps_cannot_be_told_are_refused(speaker: Any) -> None:
    (problem,) = generate_problems(1, 0, TreeOptions(depth=(2, 2), branching=(3, 3)))
    text = problem.parallel()
    with pytest.raises(ValueError, match="`text` is malformed"):
        predict(speaker, text.replace("</Goal>", ""))
    with pytest.raises(ValueError, match="`max_paths=9`"):
        predict(speaker, text, max_paths=8)
    assert predict(speaker, text, max_paths=9) == predict(speaker, text)


def test_another_text_than_the_dictated_one_is_not_counted(depth_steps: ModuleType, speaker: Any) -> None:
    (problem,) = generate_problems(1, 0, TreeOptions(depth=(1, 1), terms=(2, 2)))
    with pytest.raises(RuntimeError, match="another text"):
        depth_steps.dictate(speaker, problem, "parallel", max_sequential_steps=20)


def test_the_benchmark_writes_dictated_and_greedy_steps(
    depth_steps: ModuleType, speaker: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(depth_steps, "prepare_base_model", lambda base: base)
    monkeypatch.setattr(depth_steps.AutoTokenizer, "from_pretrained", lambda base: tiny_tokenizer())
    loaded: list[tuple[Path, Path]] = []

    def load_demo_model(*folders: Path) -> Any:
        loaded.append(folders)
        return speaker

    monkeypatch.setattr(depth_steps, "load_demo_model", load_demo_model)
    arguments: dict[str, Any] = {
        "branching": "2", "depths": "1,2", "terms": (2, 2), "problems": 2, "seed": 0, "adapter": None,
        "sequential_adapter": None, "max_new_tokens": 40, "base": tmp_path / "base", "picture": False,
        "output": tmp_path,
    }  # fmt: skip
    depth_steps.main(**arguments)
    rows = json.loads((tmp_path / "depth_steps.json").read_text())["rows"]
    assert [(row["branching"], row["depth"], row["leaves"]) for row in rows] == [(2, 1, 2), (2, 2, 4)]
    for row in rows:
        for form in FORMS:
            assert len(row[form]["measured"]) == 2
            assert row[form]["measured"] == row[form]["predicted"]

    depth_steps.main(**{**arguments, "depths": "1", "adapter": tmp_path / "arm"})
    (row,) = json.loads((tmp_path / "depth_steps_greedy.json").read_text())["rows"]
    assert loaded == [(tmp_path / "arm", tmp_path / "base")]
    assert row["parallel"]["predicted"] == rows[0]["parallel"]["predicted"]
    assert len(row["parallel"]["measured"]) == 2
    assert all(0 < steps <= 40 for steps in row["parallel"]["measured"])
    assert row["parallel"]["right"] == row["parallel"]["as_reference"] == [False, False]
    assert set(row["sequential"]) == {"predicted"}

    with pytest.raises(ValueError, match="`sequential_adapter`"):
        depth_steps.main(**{**arguments, "sequential_adapter": tmp_path})
    monkeypatch.setattr(depth_steps.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`picture`"):
        depth_steps.main(**{**arguments, "picture": True})
