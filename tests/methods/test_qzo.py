"""QZO against its paper: scales move, by clipped estimates; all else stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.quantized import INPUT, quantized_network
from torch import Tensor, nn
from torch.func import functional_call

import zo_fused
from zo_fused.noise import Purpose, derive_key, normal, parameter_id

SEED, STEPS, EPS, LR, DECAY = 11, 50, 1e-4, 3e-6, 0.5
CLIP, FLOOR = 60.0, 2e-3
NAMES = ["0.scales", "3.scales"]
MODEL = quantized_network().double()


def z_of(name: str, scale: Tensor, step: int, query: int) -> Tensor:
    key = derive_key(SEED, Purpose.DENSE, step, query)
    return normal(scale.numel(), key, parameter_id(name)).double().view(scale.shape)


def float64_loss(scales: dict[str, Tensor]) -> float:
    """The loss as a function of the scales: its rounding plays no part."""
    return float(functional_call(MODEL, scales, (INPUT.double(),)).detach().square().mean())


def doubles(model: nn.Module) -> dict[str, Tensor]:
    scales = {name: b for name, b in model.named_buffers() if name in NAMES}
    return {name: scale.double().clone() for name, scale in scales.items()}


def paper(theta: dict[str, Tensor], queries: int, one_sided: bool) -> tuple[list[float], int]:
    """Moves theta; returns the clipped d, and how often the floor was met."""
    told, floored = [], 0
    for step in range(STEPS):
        update = {name: torch.zeros_like(scale) for name, scale in theta.items()}
        for query in range(queries):
            z = {name: z_of(name, scale, step, query) for name, scale in theta.items()}
            plus = float64_loss({name: s + EPS * z[name] for name, s in theta.items()})
            away = 0.0 if one_sided else -EPS
            minus = float64_loss({name: s + away * z[name] for name, s in theta.items()})
            d = (plus - minus) / (EPS - away)
            told.append(min(max(d, -CLIP), CLIP))
            for name in theta:
                update[name] += told[-1] * z[name] / queries
        for name, scale in theta.items():
            moved = scale - LR * (update[name] + DECAY * scale)
            floored += int((moved < FLOOR).sum())
            theta[name] = moved.clamp(min=FLOOR)
    return told, floored


@pytest.mark.parametrize("kw", [{}, {"queries": 2}, {"queries": 2, "one_sided": True}], ids=str)
def test_qzo_follows_its_paper(kw: dict[str, Any]) -> None:
    """Tolerances: a scale below 2^-8 is rounded to 2^-33 in each of 3 sweeps, so losses are taken
    2^-31 off their places at the most, and a slope of at most 100 along z is off by 100 * 2^-31 /
    eps = 5e-4. A step moves that far by lr |z| 5e-4, all of them by 50 * 3e-6 * 4 * 5e-4 < 4e-7;
    they add up like a random walk, and there is the rounding of 150 sweeps, 2^-33 * 12."""
    model = quantized_network()
    theta = doubles(model)
    start = {name: scale.clone() for name, scale in theta.items()}
    expected, floored = paper(theta, kw.get("queries", 1), kw.get("one_sided", False))
    opt = zo_fused.QZO(
        model, lr=LR, clip=CLIP, floor=FLOOR, eps=EPS, seed=SEED, weight_decay=DECAY, **kw
    )
    told: list[float] = []
    for _ in range(STEPS):
        opt.step(lambda: float64_loss(doubles(model)))
        assert opt.projected_grad is not None
        told += opt.projected_grad.reshape(-1).tolist()
    torch.testing.assert_close(torch.tensor(told), torch.tensor(expected), rtol=0, atol=1e-3)
    clipped = sum(abs(d) == CLIP for d in expected)
    assert len(expected) / 10 < clipped < len(expected) * 9 / 10, clipped
    assert floored > 10
    for name, scale in doubles(model).items():
        torch.testing.assert_close(scale, theta[name], rtol=0, atol=1e-7)
        assert float((scale - start[name]).abs().max()) > 1e-4
