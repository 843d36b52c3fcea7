"""The toy problems (bench/training/toys.py): what is known of them, and how rates are found."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.training import toys
from zo_fused.methods.table import recipes


def test_the_lowest_loss_of_the_regressions_is_that_of_least_squares() -> None:
    toy = toys.quadratic()
    model = toy.start(0)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_change=0.0
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = toy.loss(model(toy.x), toy.y)
        loss.backward()
        return loss

    optimizer.step(closure)
    # the inputs' spectrum makes a condition number of 64, which 300 steps see to
    assert closure().item() == pytest.approx(toy.lowest, rel=1e-2)
    assert toy.loss(toy.start(0)(toy.x), toy.y).item() > 100 * toy.lowest


def test_the_lowest_loss_of_the_network_is_its_teachers() -> None:
    toy = toys.network()
    assert toy.loss(toy.y.log(), toy.y).item() == pytest.approx(toy.lowest, rel=1e-5)
    start = toy.loss(toy.start(0)(toy.x), toy.y).item()
    assert start > 1.1 * toy.lowest


def test_starts_are_those_of_the_seeds() -> None:
    for make, differ in ((toys.quadratic, True), (toys.network, False)):
        one, again, other = (make().start(seed) for seed in (0, 0, 1))
        for p, q, r in zip(*(m.parameters() for m in (one, again, other)), strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p, r) != differ


@pytest.mark.parametrize("method", toys.METHODS)
def test_every_method_has_the_passes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its steps are known beforehand, for schedules over all of them."""
    monkeypatch.setattr(toys, "FORWARDS", 90)
    monkeypatch.setattr(toys, "POINTS", 3)
    losses = toys.run("network", method, 1e-4, 0)
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))


def test_methods_are_those_of_the_command_line_but_those_that_need_more() -> None:
    missing = recipes().keys() - {name for name, _ in toys.METHODS.values()}
    # gradients, quantized weights, and no rate to try: a candidate is kept or not
    assert missing == {"forward-grad", "qzo", "zo-conservative", "tezo-m"}


@pytest.mark.parametrize(("best", "count"), [(-5, 7), (0, 3), (3, 6)])
def test_the_best_rate_lies_between_worse_ones(
    best: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(problem: str, method: str, lr: float, seed: int) -> list[float]:
        power = round(2 * math.log10(lr / 0.01))
        return [math.inf if power > best + 2 else abs(power - best) + 1.0 + seed] * toys.POINTS

    monkeypatch.setattr(toys, "run", run)
    lr, tried, curves = toys.tuned("quadratic", "MeZO")
    assert lr == toys.rate(best)
    assert tried == count
    assert [curve[-1] for curve in curves] == [1.0, 2.0, 3.0]


def test_a_table_and_a_picture(tmp_path: Path) -> None:
    slow = [[1 - 0.5 * i / toys.POINTS for i in range(1, toys.POINTS + 1)]] * 3
    fast = [[1 - 1.0 * i / toys.POINTS for i in range(1, toys.POINTS + 1)]] * 3
    rows = {"MeZO": (0.01, 3, slow), "LOZO": (0.1, 4, fast)}
    lines = toys.table(rows).splitlines()
    assert lines[2].startswith("| MeZO | 0.01 | 3 | 0.5")
    assert lines[3].endswith("| 2.00 |")
    toys.draw({"quadratic": rows, "network": rows}, tmp_path / "toys.png")
    assert (tmp_path / "toys.png").stat().st_size > 1000
