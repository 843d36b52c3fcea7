"""Methods and their variants, a row each, for the tests that every one must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zo_fused
from zo_fused.step.optimizer import ZerothOrderOptimizer

METHODS: dict[str, Callable[..., ZerothOrderOptimizer]] = {
    "MeZO": lambda params, **kw: zo_fused.MeZO(params, **{"lr": 1e-2, "seed": 3, **kw}),
    "LOZO": lambda params, **kw: zo_fused.LOZO(
        params, **{"lr": 1e-2, "seed": 3, "rank": 2, "interval": 3, "divide_by_rank": True, **kw}
    ),
    "LOZO-M": lambda params, **kw: zo_fused.LOZO(
        params, **{"lr": 1e-2, "seed": 3, "rank": 2, "interval": 3, "momentum": 0.9, **kw}
    ),
    "MeZO-M": lambda params, **kw: zo_fused.MeZO(
        params, **{"lr": 1e-2, "seed": 3, "momentum": 0.9, **kw}
    ),
    "ZOAdam": lambda params, **kw: zo_fused.ZOAdam(params, **{"lr": 1e-2, "seed": 3, **kw}),
    "ZOSignSGD": lambda params, **kw: zo_fused.ZOSignSGD(params, **{"lr": 1e-2, "seed": 3, **kw}),
}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stochastic": {"rounding": "stochastic"},
    "deferred": {"deferred": True},
    "deferred, stochastic": {"deferred": True, "rounding": "stochastic"},
    "factored": {"mode": "factored"},
    "factored, stochastic": {"mode": "factored", "rounding": "stochastic"},
}
