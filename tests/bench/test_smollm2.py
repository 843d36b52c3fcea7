"""The example of a pretrained model, on the embedded one, and its comparison."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import zo_fused
from bench.training import smollm2

EMBEDDED = Path(zo_fused.__file__).parent / "embedded"
EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2.py"
SIZES = {"train": 16, "dev": 8, "test": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The embedded model and some of its sentences, where the example looks for others."""
    (tmp_path / "model").symlink_to(EMBEDDED / "model")
    (tmp_path / "data").mkdir()
    for split, size in SIZES.items():
        lines = (EMBEDDED / "data" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines[:size]))
    (tmp_path / "data" / "task.json").write_text((EMBEDDED / "data" / "task.json").read_text())
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mezo", "lozo", "adamw"])
def test_the_example_runs(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(EXAMPLE), str(folder), "--method", method, "--forwards", "100"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(folder / "run")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    result = json.loads((folder / "run" / "result.json").read_text())
    assert [point[0] for point in result["curve"]][:2] == [0, 100 if method != "adamw" else 99]
    assert result["curve"][-1][1] != result["curve"][0][1]  # the weights moved
    assert 0 <= result["zero_shot"] <= 1
    assert 0 <= result["accuracy"] <= 1
    assert "accuracy on 8 tweets" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lozo", "adamw"])
def test_a_run_that_was_stopped_goes_on(
    method: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(out: str, *forwards: str) -> dict[str, Any]:
        for number in forwards:
            words = [str(EXAMPLE), str(folder), "--method", method, "--schedule", "constant"]
            words += ["--forwards", number, "--out", str(folder / out)]
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        found: dict[str, Any] = json.loads((folder / out / "result.json").read_text())
        return found

    straight, resumed = result("straight", "200"), result("resumed", "100", "200")
    assert resumed["accuracy"] == straight["accuracy"]
    assert resumed["curve"] == straight["curve"]


def test_what_is_kept_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[smollm2.Run] = []

    def go(run: smollm2.Run, folder: Path) -> dict[str, Any]:
        gone.append(run)
        gain = {"mezo": 0.1, "lozo": 0.2, "adamw": 0.2}[run.method]
        loss = abs(float(run.lr) - (3e-5 if run.method == "mezo" else 1e-5))
        return {
            **run._asdict(),
            "lr": float(run.lr),
            "zero_shot": 0.7,
            "accuracy": 0.7 + gain,
            "seconds_a_forward": 1.0,
            "peak_memory_bytes": 2**20,
            "curve": [[0, 0.6, 0.7], [run.forwards, loss, 0.7 + gain]],
        }

    monkeypatch.setattr(smollm2.Run, "go", go)
    monkeypatch.setattr(sys, "argv", ["smollm2", str(tmp_path), "--out", str(tmp_path)])
    assert smollm2.main() == 0
    assert len(gone) == len(set(gone)) == 9 + 2 + 9  # mezo is tried with 3e-5 and 1e-4, too
    assert {(run.method, run.lr) for run in gone if run.seed == 0} == {
        ("mezo", "1.5e-05"),
        ("lozo", "5e-06"),
        ("adamw", "5e-06"),
    }
    page = (tmp_path / "smollm2.md").read_text()
    assert "| mezo | 1.5e-05 | 1000 | 0.700 | 0.800 (0.800 to 0.800) | +10.0 | no |" in page
    assert "| lozo | 5e-06 | 1000 | 0.700 | 0.900 (0.900 to 0.900) | +20.0 | yes |" in page
    assert (tmp_path / "smollm2.png").stat().st_size > 1000
    gone.clear()
    assert smollm2.main() == 0
    assert not gone
