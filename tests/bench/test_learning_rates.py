"""The table of the sweep of learning rates (bench/training/learning_rates.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.training import learning_rates
from bench.training.learning_rates import Rate
from zo_fused.cli import defaults
from zo_fused.cli.runs import Run
from zo_fused.task.files import to_json


def test_grids_lie_around_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defaults.EMBEDDED_BY_METHOD["mezo"], "lr", 3e-5)
    assert learning_rates.grid("mezo", 2) == ["3e-06", "9.5e-06", "3e-05", "9.5e-05", "0.0003"]
    assert learning_rates.grid("mezo:queries=4", 1) == ["9.5e-06", "3e-05", "9.5e-05"]


def test_the_best_rate_is_marked() -> None:
    rates = [
        Rate("mezo", "1", [0.5, 0.7]),
        Rate("mezo", "2", [0.9]),
        Rate("mezo", "3", []),
        Rate("lozo", "4", [0.8]),
        Rate("lozo", "5", [0.6]),
        Rate("lozo", "6", [0.5]),
    ]
    lines = learning_rates.markdown(rates, "Note.").splitlines()
    assert lines[2] == "| mezo | 1: 0.600 | **2: 0.900** | 3: failed |"
    assert lines[3] == "| lozo | **4: 0.800** (edge) | 5: 0.600 | 6: 0.500 |"
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[-1] == "Note."


def test_rates_are_read_from_finished_runs(tmp_path: Path) -> None:
    runs = []
    for seed, after in ((0, 0.5), (1, 0.7), (2, None)):
        name = f"mezo:lr={learning_rates.grid('mezo', 1)[0]}"
        runs.append(Run(name, seed, (), tmp_path / f"{seed}"))
        if after is not None:
            runs[-1].output.mkdir()
            (runs[-1].output / "history.jsonl").write_text("")
            summary = to_json({"accuracy": {"dev": {"after": after}}})
            (runs[-1].output / "summary.json").write_text(summary)
    rates = learning_rates.read_rates(["mezo"], 1, runs)
    assert [rate.accuracies for rate in rates] == [[0.5, 0.7], [], []]
