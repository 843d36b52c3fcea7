"""What a step costs besides kernels and forward passes: ``python bench/overhead.py``.

The parameters of OPT-125M, each shrunk to two elements a dimension, so that sweeps have next to
nothing to compute, and a closure that returns a constant. One thread; medians of the later steps.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from models import opt_shapes
from torch import nn

import zo_fused

WARM_UP, STEPS = 50, 500
VARIANTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("MeZO", zo_fused.MeZO, {}),
    ("MeZO deferred", zo_fused.MeZO, {"deferred": True}),
    ("MeZO-M", zo_fused.MeZO, {"momentum": 0.9}),
    ("ZOAdam", zo_fused.ZOAdam, {}),
    ("LOZO", zo_fused.LOZO, {"interval": 10**9}),
    ("LOZO deferred", zo_fused.LOZO, {"interval": 10**9, "deferred": True}),
    ("LOZO-M", zo_fused.LOZO, {"interval": 10**9, "momentum": 0.9}),
    ("LOZO factored", zo_fused.LOZO, {"interval": 10**9, "mode": "factored"}),
]


def small_model() -> nn.Module:
    """As many parameters as OPT-125M has, as many dimensions, two elements in each."""
    module = nn.Module()
    for number, shape in enumerate(opt_shapes("opt-125m").values()):
        module.register_parameter(f"p{number}", nn.Parameter(torch.ones([2] * len(shape))))
    return module


def microseconds(cls: Any, options: dict[str, Any], steps: int = STEPS) -> float:
    """Median time of a step."""
    opt = cls(small_model(), **options)
    loss = torch.ones(())
    times = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        opt.step(lambda: loss)
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:]) * 1e6


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    print(f"{len(list(small_model().parameters()))} parameters, microseconds a step")
    for name, cls, options in VARIANTS:
        print(f"{name:16}{microseconds(cls, options):8.0f}")


if __name__ == "__main__":
    main()
