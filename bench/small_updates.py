"""What 16-bit weights make of small updates: ``python bench/small_updates.py``.

Weights N(0, 0.02^2) take 1000 steps with eps = 1e-3 and a projected gradient of one, as those of a
fine-tuned model would, but with losses that are given, so that what was asked for is known to the
bit: the sum of all ``-lr g z``. Two numbers tell what became of it:

* realised: the least squares slope of the moves on the moves asked for. 1: nothing is lost;
  0: nothing of it arrives. The standard error comes from what else moved the weights.
* drift: root mean square of what else moved them, rounding of perturbations included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import published
import torch
from models import DTYPES
from torch import Tensor, nn
from tqdm import tqdm

import zo_fused
from zo_fused import noise

EPS = 1e-3
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


def fused(rounding: str) -> Callable[[Tensor, float, int], Outcome]:
    """MeZO of this package."""

    def run(weights: Tensor, lr: float, steps: int) -> Outcome:
        w = nn.Parameter(weights.clone())
        opt = zo_fused.MeZO([("w", w)], lr=lr, eps=EPS, rounding=rounding)
        asked = torch.zeros(w.shape, dtype=torch.float64)
        for step in range(steps):
            opt.perturb(+1)
            opt.perturb(-1)
            opt.step(loss_plus=2 * EPS, loss_minus=0.0)
            key = noise.derive_key(0, noise.Purpose.DENSE, step)
            z = noise.normal(w.numel(), key, noise.parameter_id("w"))
            asked -= lr * z.double()
        return outcome(weights, w.detach(), asked)

    return run


def published_code(weights: Tensor, lr: float, steps: int) -> Outcome:
    """The operations of the released MeZO code in their order and dtype."""
    w = nn.Parameter(weights.clone())
    mezo = published.MeZO([w])
    asked = torch.zeros(w.shape, dtype=torch.float64)
    for step in range(steps):
        mezo.perturb(+1, step)
        mezo.perturb(-2, step)
        mezo.perturb(+1, step)
        torch.manual_seed(step)
        z = mezo.z(w)
        w.data = w.data - lr * (1.0 * z)
        asked -= lr * z.double()
    return outcome(weights, w.detach(), asked)


METHODS: dict[str, Callable[[Tensor, float, int], Outcome]] = {
    "published order": published_code,
    "zo_fused": fused("nearest"),
    'zo_fused, rounding="stochastic"': fused("stochastic"),
}


def rows(elements: int, steps: int) -> Iterator[tuple[str, str, float, Outcome]]:
    """All combinations."""
    torch.manual_seed(0)
    weights = torch.randn(elements) * 0.02
    combinations = [(d, m, r) for d in DTYPES for m in METHODS for r in RATES]
    for dtype, method, rate in tqdm(combinations, desc="small updates"):
        if dtype == "fp32" and "stochastic" in method:
            continue  # the same: float32 has nothing to round
        yield dtype, method, rate, METHODS[method](weights.to(DTYPES[dtype]), rate, steps)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--elements", type=int, default=1 << 18)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    found = list(rows(options.elements, options.steps))
    lines = [
        f"{options.elements} weights, {options.steps} steps: realised ± standard error, drift\n",
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
    text = "\n".join(lines)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
