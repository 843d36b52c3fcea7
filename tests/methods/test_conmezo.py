"""ConMeZO against its paper: a cone around the momentum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import blocks, network
from support.textbook import EPS, SEED, STEPS, Loss, Weights, dense, follow, moved_by

import zo_fused
from zo_fused.methods.conmezo import ConeMomentum

THETA, LR, DECAY = 1.2, 3e-4, 0.5


def paper(loss: Loss, theta: Weights, betas: list[float]) -> list[float]:
    """Its algorithm 1 with the recursion of the released code for ``|m|``, in whole vectors."""
    grads: list[float] = []
    m = {k: torch.zeros_like(w) for k, w in theta.items()}
    d, norm = sum(w.numel() for w in theta.values()), 0.0
    for t, beta in enumerate(betas):
        u = {k: dense(k, w, t) for k, w in theta.items()}
        cos, sin = (math.cos(THETA), math.sin(THETA)) if norm else (0.0, 1.0)
        scale = math.sqrt(d) * cos / norm if norm else 0.0
        z = {k: scale * m[k] + sin * u[k] for k in theta}
        above, below = moved_by(theta, EPS, z), moved_by(theta, -EPS, z)
        g = float(loss(above) - loss(below)) / (2 * EPS)
        for k, w in theta.items():
            m[k] = beta * m[k] + (1 - beta) * g * z[k]
            theta[k] = w - LR * (g * z[k] + DECAY * w)
        along = beta * norm / math.sqrt(d) + (1 - beta) * g * cos
        norm = math.sqrt(d * (along**2 + ((1 - beta) * g * sin) ** 2))
        grads.append(g)
    return grads


@pytest.mark.parametrize("kw", [{}, {"deferred": True}, {"warmup": 40}], ids=str)
def test_conmezo_follows_its_paper(kw: dict[str, Any]) -> None:
    """Tolerances as in test_textbook.py: what m is rounded by is multiplied by eps at most."""
    options = {"momentum": 0.9, "warmup": 0, **kw}
    rule = ConeMomentum(options["warmup"])
    betas = [rule.beta_of(0.9, t) for t in range(STEPS)]
    run = follow(
        lambda model: zo_fused.ConMeZO(
            model, lr=LR, theta=THETA, eps=EPS, weight_decay=DECAY, seed=SEED, **options
        ),
        lambda loss, theta: paper(loss, theta, betas),
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=2e-4)
    assert run.off < 1e-6 < 0.05 < run.moved


def test_beta_rises_as_in_the_released_code() -> None:
    beta_of = ConeMomentum(2000).beta_of
    assert beta_of(0.99, 0) == beta_of(0.99, 200) == 0.1
    assert beta_of(0.99, 1100) == pytest.approx(0.99 - 0.89 / (1 + 8 * 0.5**1.8) ** 3)
    assert beta_of(0.99, 2001) == 0.99


def test_m_is_of_all_weights() -> None:
    with pytest.raises(ValueError, match="one momentum for all weights"):
        zo_fused.ConMeZO(blocks(network()), block_order="sequential")
