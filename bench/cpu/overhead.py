"""What a step costs besides kernels and forward passes: ``python -m bench.cpu.overhead``.

The parameters of OPT-125M, each shrunk to two elements a dimension, so that sweeps have next to
nothing to compute, and a closure that returns a constant. One thread; medians of the later steps.
"kernels" is the time inside the C++ backend's sweeps, "rest" what Python and small operations add.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

import zo_fused
from bench.models import opt_shapes
from zo_fused.sweeps.backends import cpu

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


@contextmanager
def timed_sweeps() -> Iterator[list[float]]:
    """A block in which sweeps that the C++ backend prepares add their seconds to a number."""
    spent, prepare = [0.0], cpu.prepare

    def prepare_timed(*arguments: Any) -> Callable[..., None]:
        sweep = prepare(*arguments)

        def timed(*rows: Any, **options: Any) -> None:
            start = time.perf_counter()
            sweep(*rows, **options)
            spent[0] += time.perf_counter() - start

        return timed

    with mock.patch.object(cpu, "prepare", prepare_timed):
        yield spent


def microseconds(cls: Any, options: dict[str, Any], steps: int = STEPS) -> tuple[float, float]:
    """Median time of a step, and of the kernels in it."""
    opt = cls(small_model(), **options)
    losses = itertools.cycle([torch.tensor(1.0), torch.tensor(1.5)])
    times, kernels = [], []
    with timed_sweeps() as spent:
        for _ in range(WARM_UP + steps):
            spent[0] = 0.0
            start = time.perf_counter()
            opt.step(lambda: next(losses))
            times.append(time.perf_counter() - start)
            kernels.append(spent[0])
    return statistics.median(times[WARM_UP:]) * 1e6, statistics.median(kernels[WARM_UP:]) * 1e6


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    print(f"{len(list(small_model().parameters()))} parameters, microseconds a step")
    print(f"{'':16}{'step':>8}{'kernels':>9}{'rest':>8}")
    for name, cls, options in VARIANTS:
        step, kernels = microseconds(cls, options)
        print(f"{name:16}{step:8.0f}{kernels:9.0f}{step - kernels:8.0f}")


if __name__ == "__main__":
    main()
