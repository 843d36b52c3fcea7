"""CPU sweeps and steps against the published algorithms in plain PyTorch. `make bench` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import zo_fused
from bench.models import DTYPES, opt_parameters
from bench.published import EPS, LR, METHODS
from zo_fused import noise

Race = Callable[..., None]
# Of zo_fused, of the published code.
ROUNDS = {"opt-tiny": (2, 1), "opt-125m": (9, 3), "opt-1.3b": (5, 1)}


@pytest.fixture(params=list(DTYPES))
def weights(request: pytest.FixtureRequest, model: str) -> dict[str, Any]:
    """The parameters, a twin to copy them to, and the labels of a row."""
    params = opt_parameters(model, DTYPES[request.param])
    twins = [torch.empty_like(p, requires_grad=False) for p in params.values()]

    def copy() -> None:
        for twin, p in zip(twins, params.values(), strict=True):
            twin.copy_(p.data)

    return {
        "named": list(params.items()),
        "params": list(params.values()),
        "copy": copy,
        "bytes": 2 * sum(p.numel() * p.element_size() for p in params.values()),
        "labels": {"model": model, "dtype": request.param},
        "rounds": ROUNDS[model],
    }


def optimizer(method: str, weights: dict[str, Any], **options: Any) -> Any:
    cls = getattr(zo_fused, method.removesuffix("-M"))
    if method == "LOZO-M":
        options["momentum"] = 0.9
    return cls(weights["named"], lr=LR, eps=EPS, **options)


@pytest.mark.parametrize("method", ["MeZO", "LOZO", "LOZO-M"])
def test_step_without_forward(method: str, weights: dict[str, Any], race: Race) -> None:
    """All of a step but its forward passes: three sweeps against the published four."""
    opt = optimizer(method, weights)
    published = METHODS[method](weights["params"]) if method in METHODS else None

    def fused() -> None:
        opt.perturb(+1)
        opt.perturb(-1)
        opt.step(loss_plus=1.0, loss_minus=0.9)

    race(
        fused,
        published and published.step_without_forward,
        weights["copy"],
        3,
        weights["bytes"],
        *weights["rounds"],
        what=f"{method} step",
        **weights["labels"],
    )


@pytest.mark.parametrize("method", ["MeZO", "LOZO"])
def test_perturbing_sweep(method: str, weights: dict[str, Any], race: Race) -> None:
    """One sweep `theta + eps z` against one of the published code."""
    opt = optimizer(method, weights)
    published = METHODS[method](weights["params"])
    sign = [1.0]

    def fused() -> None:
        opt.perturb(sign[0])
        sign[0] = -sign[0]

    race(
        fused,
        lambda: published.perturb(1),
        weights["copy"],
        1,
        weights["bytes"],
        *weights["rounds"],
        what=f"{method} perturb",
        **weights["labels"],
    )


def test_two_directions_in_one_sweep(weights: dict[str, Any], race: Race) -> None:
    """Restore, update and the next perturbation at once: K = 2."""
    keys = [noise.derive_key(0, noise.Purpose.DENSE, step) for step in range(2)]
    params = weights["params"]
    race(
        lambda: zo_fused.update_(params, keys, [1e-9, -1e-9]),
        None,
        weights["copy"],
        1,
        weights["bytes"],
        *weights["rounds"],
        what="dense K=2",
        **weights["labels"],
    )


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_lowrank_sweep(rank: int, weights: dict[str, Any], race: Race) -> None:
    """The low-rank sweep with factors regenerated from their streams."""
    params = weights["params"]
    race(
        lambda: zo_fused.lowrank_perturb_(params, 1, 2, 1e-9, rank=rank),
        None,
        weights["copy"],
        1,
        weights["bytes"],
        *weights["rounds"],
        what=f"low-rank r={rank}",
        **weights["labels"],
    )
