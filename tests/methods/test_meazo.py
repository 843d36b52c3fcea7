"""MEAZO against its paper: one second moment for all weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import blocks, loss_of, network
from support.textbook import EPS, SEED, STEPS, Loss, Weights, dense, follow, moved_by

import zo_fused

BETA, ZETA = 0.9, 1e-3


def paper(loss: Loss, theta: Weights, lr: float, queries: int, away: float) -> list[float]:
    """Its algorithm; v is of the mean of a step's projected gradients."""
    scaled, v = [], 0.0
    for t in range(STEPS):
        us = [{k: dense(k, w, t, i) for k, w in theta.items()} for i in range(queries)]
        gs = [
            float(loss(moved_by(theta, EPS, u)) - loss(moved_by(theta, away * EPS, u)))
            / ((1 - away) * EPS)
            for u in us
        ]
        v = BETA * v + (1 - BETA) * (math.fsum(gs) / queries) ** 2
        scale = 1 / (math.sqrt(v / (1 - BETA ** (t + 1))) + ZETA)
        for k, w in theta.items():
            mean = sum(g * u[k] for g, u in zip(gs, us, strict=True)) / queries
            theta[k] = w - lr * scale * mean
        scaled += [g * scale for g in gs]
    return scaled


@pytest.mark.parametrize("kw", [{}, {"queries": 2}, {"one_sided": True, "deferred": True}], ids=str)
def test_meazo_follows_its_paper(kw: dict[str, Any]) -> None:
    """Tolerances: of g as in test_textbook.py, 2e-4, or one-sided twice as much; over the root of
    v', which is above 0.05 of the largest g; and so of the weights, 1e-6."""
    lr = 3e-4
    away = 0.0 if "one_sided" in kw else -1.0
    run = follow(
        lambda model: zo_fused.MEAZO(model, lr=lr, beta=BETA, zeta=ZETA, eps=EPS, seed=SEED, **kw),
        lambda loss, theta: paper(loss, theta, lr, kw.get("queries", 1), away),
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=2e-3)
    assert run.off < 1e-6 < 0.05 < run.moved


def test_a_step_that_is_skipped_leaves_the_average() -> None:
    model = network()
    opt = zo_fused.MEAZO(model)
    opt.step(loss_of(model))
    kept = opt.state["meazo"][0].clone()
    losses = iter([1.0, math.inf])
    opt.step(lambda: next(losses))
    assert opt.skipped_steps == 1
    assert torch.equal(opt.state["meazo"][0], kept)
    assert float(kept[1]) == 1.0


def test_the_first_step_has_the_length_lr() -> None:
    """v' = g^2 then, whatever beta."""
    model = network()
    opt = zo_fused.MEAZO(model, zeta=0.0)
    opt.step(loss_of(model))
    assert abs(float(opt.projected_grad)) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(
    ("order", "steps"), [("sequential", [2.0, 1.0]), ("simultaneous", [3.0, 3.0])]
)
def test_every_block_has_an_average(order: str, steps: list[float]) -> None:
    model = network()
    opt = zo_fused.MEAZO(blocks(model), block_order=order)
    for _ in range(3):
        opt.step(loss_of(model))
    kept = opt.state["meazo"]
    assert [float(kept[block][1]) for block in (0, 1)] == steps
    assert kept[0][0] != kept[1][0]
