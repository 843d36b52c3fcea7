"""KerZOO against its paper: kernels and steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.models import INPUT, loss_of, network
from torch import Tensor, nn

import zo_fused
from zo_fused.noise import Purpose, derive_key, normal, parameter_id
from zo_fused.noise.streams import uniform


def vector_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def kernel_of(name: str, r: Any) -> Any:
    """K(r), as the paper writes it; of the last one with the constant that makes E[r K] = 1."""
    if name == "linear":
        return 3 * r
    if name == "cubic":
        return 15 / 4 * r * (5 - 7 * r**2)
    return 105 / 64 * r * (99 * r**4 - 126 * r**2 + 35)


@pytest.mark.parametrize(
    ("name", "moments", "square"),
    [
        ("linear", [0, 1, 0, 3 / 5], 1.8),
        ("cubic", [0, 1, 0, 0, 0], 6.25),
        ("quintic", [0, 1, 0, 0, 0, 0], 13.3),
    ],
)
def test_the_moments_of_a_kernel(name: str, moments: list[float], square: float) -> None:
    """Of r^k K(r) over U(-1, 1), by quadrature that is exact for these degrees (below 24)."""
    from zo_fused.methods.kerzoo import KERNELS

    r, weights = np.polynomial.legendre.leggauss(12)
    kernel = r * np.array([KERNELS[name](x) for x in r])
    found = [float((weights / 2 * kernel * r**k).sum()) for k in range(len(moments))]
    assert np.allclose(found, moments, atol=1e-12)
    assert float((weights / 2 * (kernel * r) ** 2).sum()) == pytest.approx(square, abs=0.05)
    if name == "quintic":  # with the constant in print
        assert found[1] * 195 / 105 == pytest.approx(13 / 7)


def test_there_is_no_other_kernel() -> None:
    with pytest.raises(ValueError, match=r"kernel must be one of \('linear', 'cubic', 'quintic'\)"):
        zo_fused.KerZOO(network(), kernel="septic")


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"deferred": True},
        {"one_sided": True, "queries": 2},
        {"kernel": "linear"},
        {"kernel": "quintic"},
    ],
    ids=str,
)
def test_kerzoo_follows_its_textbook(kw: dict[str, Any]) -> None:
    model, eps, lr, decay, seed = network(), 1e-2, 1e-2, 0.1, 11
    opt = zo_fused.KerZOO(model, lr=lr, eps=eps, weight_decay=decay, seed=seed, **kw)
    theta = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    x = INPUT.double()

    def loss(weights: dict[str, Tensor]) -> float:
        return float(torch.func.functional_call(network().double(), weights, (x,)).square().mean())

    start = vector_of(model)
    queries, one_sided = kw.get("queries", 1), kw.get("one_sided", False)
    for step in range(50):
        opt.step(loss_of(model))
        steps = {name: torch.zeros_like(w) for name, w in theta.items()}
        for query in range(queries):
            r = uniform(seed, step, query)
            u = {
                name: normal(
                    w.numel(), derive_key(seed, Purpose.DENSE, step, query), parameter_id(name)
                )
                .double()
                .view(w.shape)
                for name, w in theta.items()
            }
            plus = loss({name: w + eps * r * u[name] for name, w in theta.items()})
            away = 0.0 if one_sided else -1.0
            minus = loss({name: w + away * eps * r * u[name] for name, w in theta.items()})
            c = (plus - minus) / (eps * (1 if one_sided else 2))
            for name in theta:
                steps[name] += kernel_of(kw.get("kernel", "cubic"), r) * c * u[name] / queries
        theta = {name: w - lr * (steps[name] + decay * w) for name, w in theta.items()}
    got = vector_of(model).double()
    expected = torch.cat([w.flatten() for w in theta.values()])
    moved = float((expected - start.double()).abs().max())
    # losses near 0.3 are rounded to 2^-25, so estimates to 2^-25 / eps, times lr K |u|, 50 steps
    assert float((got - expected).abs().max()) < 2e-5
    assert moved > 1e-3
