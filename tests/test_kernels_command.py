"""`multiverse kernels`: the facts, and the command."""

from pathlib import Path

import pytest
import torch
from multiverse.cli import app
from multiverse.kernels import availability, dispatch
from multiverse.kernels.availability import backend_report
from multiverse.kernels.dispatch import AUTOMATIC, FLASH, SUPPORTED_ATTENTION, TRITON
from tiny import tiny_config
from typer.testing import CliRunner

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (availability, dispatch):
        monkeypatch.setattr(module, "runs_triton", lambda device: device.type == "cuda")
    monkeypatch.setattr(availability, "INTERPRETED", False)


def statuses(*arguments, **options) -> dict[tuple[str, str], availability.BackendStatus]:
    return {(each.purpose, each.name): each for each in backend_report(*arguments, **options)}


def test_model_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "runs_triton", lambda device: False)
    monkeypatch.setattr(availability, "INTERPRETED", False)
    report = statuses("sdpa", "auto", CPU, torch.float32, 64)
    assert [key for key, each in report.items() if each.chosen] == [("forward", "sdpa"), ("decode", "folded")]
    assert {name for purpose, name in report if purpose == "forward"} == set(SUPPORTED_ATTENTION)
    assert not report["forward", TRITON].runs
    assert "cpu" in report["decode", "path_decode"].why


@pytest.mark.usefixtures("gpu_with_triton")
def test_model_on_a_gpu() -> None:
    report = statuses(AUTOMATIC, "auto", GPU, torch.bfloat16, 128)
    assert [key for key, each in report.items() if each.chosen] == [("forward", AUTOMATIC), ("decode", "path_decode")]
    assert report["decode", "path_decode"].runs
    for dtype, head_dim, words in ((torch.float64, 64, "float64"), (torch.float32, 512, "512")):
        refused = statuses(TRITON, "auto", GPU, dtype, head_dim)["forward", TRITON]
        assert refused.chosen
        assert not refused.runs
        assert words in refused.why


def test_without_triton_or_flash_attention_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "triton", None)
    monkeypatch.setattr(availability, "is_flash_attn_2_available", lambda: False)
    report = statuses("sdpa", "auto", CPU, torch.float32, 64)
    assert "triton is not installed" in report["forward", TRITON].why
    assert "flash-attn is not installed" in report["forward", FLASH].why


def test_flash_attention_wants_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "is_flash_attn_2_available", lambda: True)
    assert "float32" in statuses(FLASH, "auto", GPU, torch.float32, 64)["forward", FLASH].why
    assert statuses(FLASH, "auto", GPU, torch.bfloat16, 64)["forward", FLASH].runs


def test_sliding_windows_are_refused_by_all() -> None:
    assert not any(each.runs for each in backend_report("sdpa", "auto", CPU, torch.float32, 64, sliding_window=True))


def test_command_reads_a_checkpoint(tmp_path: Path) -> None:
    config = tiny_config("qwen2", head_dim=96)
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["kernels", str(tmp_path), "--device", "cpu"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "bfloat16, head dim 96" in result.output
    chosen = [line for line in result.output.splitlines() if "→" in line]
    assert len(chosen) == 2
    assert "sdpa" in chosen[0]
    assert "folded" in chosen[1]


@pytest.mark.parametrize(
    "arguments", [["--attn-implementation", "paged"], ["--decode-attention", "fast"], ["--dtype", "float31"]]
)
def test_unknown_names_are_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["kernels", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert arguments[1] in result.output


def test_choice_that_does_not_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "triton", None)
    result = CliRunner().invoke(app, ["kernels", "--attn-implementation", TRITON, "--device", "cpu"])
    assert result.exit_code == 1
