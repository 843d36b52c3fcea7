"""What 16-bit weights make of small updates: ``python -m bench.training.small_updates``.

Weights N(0, 0.02^2) take 1000 steps with eps = 1e-3 and a projected gradient of one, as those of a
fine-tuned model would, but with losses that are given, so that what was asked for is known to the
bit: the sum of all ``-lr g z``. They are one square matrix, so that low-rank z are what they are in
a model. Two numbers tell what became of it:

* realised: the least squares slope of the moves on the moves asked for. 1: nothing is lost;
  0: nothing of it arrives. The standard error comes from what else moved the weights.
* drift: root mean square of what else moved them, rounding of perturbations included.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import zo_fused
from bench import published
from bench.models import DTYPES
from bench.page import publish
from zo_fused import noise

EPS, RANK, INTERVAL = 1e-3, 2, 50
RATES = (1e-7, 1e-6, 1e-5, 1e-4)


class Outcome(NamedTuple):
    realised: float
    error: float  # standard error of that
    drift: float


def outcome(start: Tensor, end: Tensor, asked: Tensor) -> Outcome:
    """start, end: weights; asked: float64 of the same shape, what should have been added."""
    moved = end.double() - start.double()
    realised = float((moved * asked).sum() / asked.square().sum())
    drift = float((moved - realised * asked).square().mean().sqrt())
    return Outcome(realised, drift / float(asked.norm()), drift)


def direction(cls: Any, step: int, side: int) -> Tensor:
    """z of a step of this package, for a matrix: float64 [side, side]."""

    def normal(purpose: noise.Purpose, at: int, columns: int) -> Tensor:
        key = noise.derive_key(0, purpose, at)
        return noise.normal(side * columns, key, noise.parameter_id("weight")).view(side, columns)

    if cls is zo_fused.MeZO:
        return normal(noise.Purpose.DENSE, step, side).double()
    u = normal(noise.Purpose.U, step, RANK)
    v = normal(noise.Purpose.V, step // INTERVAL, RANK)
    return u.double() @ v.double().T


def fused(cls: Any, weights: Tensor, lr: float, steps: int, **options: Any) -> Outcome:
    """A method of this package."""
    side = len(weights)
    module = nn.Linear(side, side, bias=False, dtype=weights.dtype)
    module.weight.data.copy_(weights)
    if cls is zo_fused.LOZO:
        options = {**options, "rank": RANK, "interval": INTERVAL}
    opt = cls(module, lr=lr, eps=EPS, **options)
    asked = torch.zeros(side, side, dtype=torch.float64)
    for step in range(steps):
        opt.perturb(+1)
        opt.perturb(-1)
        opt.step(loss_plus=2 * EPS, loss_minus=0.0)
        asked -= lr * direction(cls, step, side)
    opt.flush()
    return outcome(weights, module.weight.detach(), asked)


def published_code(cls: Any, weights: Tensor, lr: float, steps: int) -> Outcome:
    """The operations of a released code in their order and dtype."""
    w = nn.Parameter(weights.clone())
    asked = torch.zeros(w.shape, dtype=torch.float64)
    for step in range(steps):
        if step % INTERVAL == 0:
            code = cls([w])  # LOZO draws its V here
        code.perturb(+1, step)
        code.perturb(-2, step)
        code.perturb(+1, step)
        torch.manual_seed(step)
        z = code.z(w)
        w.data = w.data - lr * (1.0 * z)
        asked -= lr * z.double()
    return outcome(weights, w.detach(), asked)


STOCHASTIC = {"rounding": "stochastic"}
FACTORED = {"mode": "factored"}
# name, how it runs, class, options of the constructor
METHODS: list[tuple[str, Callable[..., Outcome], Any, dict[str, Any]]] = [
    ("published MeZO order", published_code, published.METHODS["MeZO"], {}),
    ("MeZO", fused, zo_fused.MeZO, {}),
    ("MeZO, stochastic", fused, zo_fused.MeZO, STOCHASTIC),
    ("MeZO deferred", fused, zo_fused.MeZO, {"deferred": True}),
    ("MeZO deferred, stochastic", fused, zo_fused.MeZO, {"deferred": True, **STOCHASTIC}),
    ("published LOZO order", published_code, published.METHODS["LOZO"], {}),
    ("LOZO", fused, zo_fused.LOZO, {}),
    ("LOZO, stochastic", fused, zo_fused.LOZO, STOCHASTIC),
    ("LOZO deferred", fused, zo_fused.LOZO, {"deferred": True}),
    ("LOZO factored", fused, zo_fused.LOZO, FACTORED),
    ("LOZO factored, stochastic", fused, zo_fused.LOZO, {**FACTORED, **STOCHASTIC}),
]


def rows(side: int, steps: int) -> Iterator[tuple[str, str, float, Outcome]]:
    """All combinations."""
    torch.manual_seed(0)
    weights = torch.randn(side, side) * 0.02
    combinations = [(d, m, r) for d in DTYPES for m in METHODS for r in RATES]
    for dtype, (name, run, cls, options), rate in tqdm(combinations, desc="small updates"):
        if dtype == "fp32" and "rounding" in options:
            continue  # the same: float32 has nothing to round
        yield dtype, name, rate, run(cls, weights.to(DTYPES[dtype]), rate, steps, **options)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 18, help="rounded down to a square")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    side = math.isqrt(options.elements)
    found = list(rows(side, options.steps))
    lines = [
        f"{side * side} weights, {options.steps} steps: realised ± standard error, drift\n",
        "| dtype | code | " + " | ".join(f"lr g = {rate:g}" for rate in RATES) + " |",
        "|---|---|" + "---|" * len(RATES),
    ]
    for dtype, method in dict.fromkeys((dtype, method) for dtype, method, *_ in found):
        cells = [
            f"{o.realised:.2f} ± {o.error:.2f}, {o.drift:.1e}"
            for d, m, _, o in found
            if (d, m) == (dtype, method)
        ]
        lines.append(f"| {dtype} | {method} | " + " | ".join(cells) + " |")
    publish(lines, options.out)


if __name__ == "__main__":
    main()
