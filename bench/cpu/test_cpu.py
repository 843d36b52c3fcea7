"""CPU sweeps and steps against the published algorithms and their rivals. `make bench` runs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import zo_fused
from bench.models import DTYPES, opt_parameters
from bench.published import EPS, LR, METHODS, MeZO
from bench.rivals import RIVALS
from zo_fused import noise

Race = Callable[..., None]
ROUNDS = {"opt-tiny": 2, "opt-125m": 9, "opt-1.3b": 5}
# Steps of zo_fused: the method, with rivals where it has no momentum, and options.
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "MeZO": ("MeZO", {}),
    "MeZO, hadamard": ("MeZO", {"distribution": "hadamard"}),
    "LOZO": ("LOZO", {}),
    "LOZO-M": ("LOZO", {"momentum": 0.9}),
}


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


def rivals_of(method: str, weights: dict[str, Any]) -> dict[str, MeZO]:
    """The published code and what `bench.rivals` makes of it, by name."""
    published = METHODS[method](weights["params"])
    return {"published": published, **{name: make(published) for name, make in RIVALS.items()}}


@pytest.mark.parametrize("what", STEPS)
def test_step_without_forward(what: str, weights: dict[str, Any], race: Race) -> None:
    """All of a step but its forward passes: three sweeps against the published four."""
    method, options = STEPS[what]
    opt = getattr(zo_fused, method)(weights["named"], lr=LR, eps=EPS, **options)
    rivals = {} if "momentum" in options else rivals_of(method, weights)

    def fused() -> None:
        opt.perturb(+1)
        opt.perturb(-1)
        opt.step(loss_plus=1.0, loss_minus=0.9)

    race(
        fused,
        {name: rival.step_without_forward for name, rival in rivals.items()},
        weights["copy"],
        3,
        weights["bytes"],
        weights["rounds"],
        what=f"{what} step",
        **weights["labels"],
    )


@pytest.mark.parametrize("method", ["MeZO", "LOZO"])
def test_perturbing_sweep(method: str, weights: dict[str, Any], race: Race) -> None:
    """One sweep `theta + eps z` against one of each rival."""
    opt = getattr(zo_fused, method)(weights["named"], lr=LR, eps=EPS)
    sign = [1.0]

    def fused() -> None:
        opt.perturb(sign[0])
        sign[0] = -sign[0]

    race(
        fused,
        {
            name: functools.partial(rival.perturb, 1)
            for name, rival in rivals_of(method, weights).items()
        },
        weights["copy"],
        1,
        weights["bytes"],
        weights["rounds"],
        what=f"{method} perturb",
        **weights["labels"],
    )


def test_two_directions_in_one_sweep(weights: dict[str, Any], race: Race) -> None:
    """Restore, update and the next perturbation at once: K = 2."""
    keys = [noise.derive_key(0, noise.Purpose.DENSE, step) for step in range(2)]
    params = weights["params"]
    race(
        lambda: zo_fused.update_(params, keys, [1e-9, -1e-9]),
        {},
        weights["copy"],
        1,
        weights["bytes"],
        weights["rounds"],
        what="dense K=2",
        **weights["labels"],
    )


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_lowrank_sweep(rank: int, weights: dict[str, Any], race: Race) -> None:
    """The low-rank sweep with factors regenerated from their streams."""
    params = weights["params"]
    race(
        lambda: zo_fused.lowrank_perturb_(params, 1, 2, 1e-9, rank=rank),
        {},
        weights["copy"],
        1,
        weights["bytes"],
        weights["rounds"],
        what=f"low-rank r={rank}",
        **weights["labels"],
    )
