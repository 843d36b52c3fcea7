"""The quantities of bench.training.curvature, where they are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zo_fused
from bench.training import curvature

EMBEDDED = Path(zo_fused.__file__).parent / "embedded"


def test_of_a_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """``|theta|^2 c / 2 + b . theta`` with another b for every batch."""
    torch.manual_seed(0)
    model, c = nn.Linear(50, 40, bias=False).double(), 3.0
    offsets = [torch.randn(40, 50, dtype=torch.float64) for _ in range(64)]
    data: Any = [{"b": b} for b in offsets]
    theta = model.weight

    def quadratic(_: Any, batch: dict[str, Tensor]) -> Tensor:
        return c / 2 * theta.square().sum() + (batch["b"] * theta).sum()

    monkeypatch.setattr(curvature, "loss", quadratic)
    before = theta.detach().clone()
    found = curvature.measured(model, data)
    grads = torch.stack([c * theta.detach() + b for b in offsets]).flatten(1)
    assert found.of_batch == pytest.approx(float(grads.square().sum(1).mean()))
    mean = (grads.sum(0).square().sum() - grads.square().sum()) / (64 * 63)  # of different batches
    assert found.grad == pytest.approx(float(mean), rel=1e-6)
    assert found.trace == pytest.approx(c * 2000, rel=5 * (2 / 2000 / curvature.DIRECTIONS) ** 0.5)
    assert torch.allclose(theta, before, atol=1e-12)


def test_of_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model", "data"):
        (tmp_path / name).symlink_to(EMBEDDED / name)
    for name, value in {"BATCH": 4, "BATCHES": 2, "DIRECTIONS": 2, "STEPS": (0, 1)}.items():
        monkeypatch.setattr(curvature, name, value)
    monkeypatch.setattr(sys, "argv", ["curvature", str(tmp_path)])
    curvature.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| 0", "| 1"]
    assert rows[1].split(" | ")[1:] != rows[2].split(" | ")[1:]
