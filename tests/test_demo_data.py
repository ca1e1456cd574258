"""The demo's two arms are trained on the same problems, and tested on others."""

from pathlib import Path

import pytest
import yaml
from multiverse.trainer.held_out import stored_answers
from multiverse.trainer.sft import MultiverseScriptArguments, load_data
from multiverse.trainer.synthetic import train_and_test

CONFIGS = Path(__file__).parent.parent / "trainer" / "configs"
PHASES = ("", "_2", "_3")
#: Fields of a configuration that say what problems are drawn.
DRAWN = ("synthetic_samples", "synthetic_terms", "synthetic_repeats", "synthetic_largest")


def config(form: str, phase: str) -> dict:
    return yaml.safe_load((CONFIGS / f"smollm2_{form}{phase}.yaml").read_text())


@pytest.mark.parametrize("phase", PHASES)
def test_arms_differ_in_their_form_alone(phase: str) -> None:
    arms = [config(form, phase) for form in ("parallel", "sequential")]
    named = ("synthetic_form", "output_dir", "adapter_path")
    assert [arm["synthetic_form"] for arm in arms] == ["parallel", "sequential"]
    same = [{name: value for name, value in arm.items() if name not in named} for arm in arms]
    assert same[0] == same[1]
    if phase:
        before = PHASES[PHASES.index(phase) - 1]
        assert [arm["adapter_path"] for arm in arms] == [
            config(form, before)["output_dir"] for form in ("parallel", "sequential")
        ]


def test_no_problem_of_the_evaluation_or_the_demo_was_trained_on() -> None:
    held_out = {problem.question for seed in (0, 1) for problem in train_and_test(0, 256, seed)[1]}
    assert len(held_out) == 512
    trained = set()
    for phase in PHASES:
        drawn = config("parallel", phase)
        script = MultiverseScriptArguments(**{name: drawn[name] for name in DRAWN})
        rows = load_data(script, drawn["seed"])["train"]
        trained |= {row["prompt"][1]["content"] for row in rows}
    assert len(trained) == 2200
    assert not trained & held_out


def test_answers_to_other_problems_are_not_taken_for_done(tmp_path: Path) -> None:
    _, problems = train_and_test(0, 2, seed=1)
    stored = tmp_path / "parallel.jsonl"
    assert stored_answers(stored, problems) == []
    stored.write_text(f'{{"problem": 0, "question": {problems[0].question!r}}}\n'.replace("'", '"'))
    assert len(stored_answers(stored, problems)) == 1
    with pytest.raises(ValueError, match="`path`"):
        stored_answers(stored, problems[::-1])
