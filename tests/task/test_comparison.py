"""What a comparison makes of the histories of its runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from zo_fused.task.comparison import Outcome, curve, markdown, passes_to, speed, summarize
from zo_fused.task.comparison_picture import draw


def outcome(method: str, seed: int, dev_losses: list[float | None], forwards: int = 2) -> Outcome:
    """A run with an evaluation after every step."""
    history: list[dict[str, Any]] = []
    for step, loss in enumerate(dev_losses):
        if step:
            grads = {"loss": 0.0, "projected_grad": 0.0, "seconds": 0.5}
            history.append({"step": step, "forwards": forwards, **grads})
        history.append({"step": step, "dev_accuracy": step / 10, "dev_loss": loss})
    steps = len(dev_losses) - 1
    summary = {
        "settings": {"lr": 1e-3},
        "steps": steps,
        "forwards": steps * forwards,
        "accuracy": {"dev": {"before": 0.0, "after": steps / 10}},
        "peak_memory_bytes": None,
        "state_bytes": 8,
        "parameters": 4,
    }
    return Outcome(method, seed, summary, history)


def test_a_curve_is_the_mean_of_its_runs() -> None:
    made = curve([outcome("mezo", 0, [1.0, 0.5, 0.4]), outcome("mezo", 1, [1.0, 0.7, 0.2])])
    assert made.at == [0, 2, 4]
    assert made.mean == pytest.approx([1.0, 0.6, 0.3])
    assert (made.low, made.high) == ([1.0, 0.5, 0.2], [1.0, 0.7, 0.4])


def test_forward_passes_to_a_loss() -> None:
    made = curve([outcome("mezo", 0, [1.0, 0.8, 0.9, 0.4])])
    assert passes_to(made, 1.0) == 0
    assert passes_to(made, 0.9) == pytest.approx(1.0)  # half-way through the first step
    assert passes_to(made, 0.5) == pytest.approx(4 + 2 * 0.8)  # 0.4 of 0.5 of the third
    assert passes_to(made, 0.3) is None


def test_speed_is_the_ratio_of_forward_passes_to_the_same_loss() -> None:
    base = curve([outcome("mezo", 0, [1.0, 0.8, 0.6])])  # 4 passes to 0.6
    assert speed(curve([outcome("a", 0, [1.0, 0.6, 0.5])]), base) == pytest.approx(2.0)
    assert speed(curve([outcome("b", 0, [1.0, 0.9, 0.8])]), base) == pytest.approx(0.5)
    assert speed(base, base) == 1.0
    worse = curve([outcome("c", 0, [1.0, 1.1, 1.2])])  # it never left the start
    assert speed(worse, base) is None
    diverged = curve([outcome("d", 0, [1.0, None, None])])
    assert diverged.mean[1] == math.inf
    assert speed(diverged, base) is None


def test_rows_are_relative_to_the_first_method() -> None:
    runs = [outcome("mezo", 0, [1.0, 0.8, 0.6]), outcome("lozo", 0, [1.0, 0.6, 0.5], forwards=4)]
    first, second = summarize(runs)
    assert (first["speed"], second["speed"]) == (1.0, pytest.approx(1.0))  # 4 passes both
    assert second["lowest_dev_loss"] == {"mean": 0.5, "min": 0.5, "max": 0.5}
    assert "| lozo | 0.001 | 2 | 8 | - | 0.200 | 0.500 | 1.00 |" in markdown([first, second])


@pytest.mark.parametrize("count", [1, 7])
def test_the_picture(count: int, tmp_path: Path) -> None:
    runs = [
        outcome(f"mezo:queries={n + 1}", seed, [1.0, 0.8 - seed / 50, 0.9 / (n + 1)])
        for n in range(count)
        for seed in (0, 1)
    ]
    runs.append(outcome("diverged", 0, [1.0, None, None]))
    draw(runs, "title", tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
