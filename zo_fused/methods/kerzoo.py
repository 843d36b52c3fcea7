"""KerZOO: lengths of z and weights of estimates by a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from torch import Tensor

from zo_fused.checks import choice
from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.noise.streams import uniform
from zo_fused.rules.sgd import SGD
from zo_fused.step.direction import Term
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import StepOptions
from zo_fused.step.vectors import Vector, vector

# K(r) / r. E[r K] = 1 over U(-1, 1), and the next odd moments are 0: none of them, one, two. In
# print the last constant is 195/64, with which E[r K] = 13/7.
KERNELS: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 3.0,
    "cubic": lambda r: 15 / 4 * (5 - 7 * r * r),
    "quintic": lambda r: 105 / 64 * (99 * r**4 - 126 * r**2 + 35),
}


class Stretched(Dense):
    """``z = r u``, u with independent elements and r ~ U(-1, 1), of a query."""

    def length(self, seed: int, term: Term) -> float:
        assert isinstance(term.step, int)
        return uniform(seed, term.step, term.query)

    def not_sharded(self) -> str:
        return ""

    def not_capturable(self, deferred: bool) -> str:
        return "the host draws the length of z"


@method(Recipe("kerzoo", "KerZOO"))
class KerZOO(ZerothOrderOptimizer):
    """Kernel-weighted zeroth-order SGD (arXiv 2505.18886): ``z = r u`` with ``u ~ N(0, I)`` and
    ``r ~ U(-1, 1)``, g as in MeZO, and ``theta = theta - lr * (K(r) g u + weight_decay * theta)``
    with the kernel ``K(r) = 15/4 r (5 - 7 r^2)``, which cancels the bias of order eps^2. Other
    kernels: "linear", ``3 r``, which cancels nothing; "quintic",
    ``105/64 r (99 r^4 - 126 r^2 + 35)``, which cancels eps^4, too (the paper prints 195/64).

    Two forward passes, three sweeps (two with ``deferred``), no state. E[(r K)^2] = 6.25 (linear
    1.8, quintic 13.3): where that bias does not matter, as at the usual eps, an estimate is worth
    1/6.25 of MeZO's.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        distribution: of the elements of u: "gaussian", "hadamard" or "rademacher".
        kernel: "cubic", "linear" or "quintic".
        common: eps, weight_decay, rounding, seed, deferred, one_sided, queries, block_order: see
            `ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        distribution: str = "gaussian",
        kernel: str = "cubic",
        **common: Unpack[StepOptions],
    ) -> None:
        defaults = {"lr": lr}
        options = {"distribution": distribution, "kernel": choice("kernel", kernel, KERNELS)}
        super().__init__(params, Stretched(distribution), SGD(), defaults, options, **common)
        self.kernel = kernel

    def transform(self, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]) -> Vector:
        """K(r) g u is K(r) / r g z."""
        queries = self.schedule.queries  # those of every block have the same z
        lengths = [uniform(self.seed, self.step_count, q % queries) for q in range(len(grads))]
        return grads * vector([KERNELS[self.kernel](r) for r in lengths], grads.device)
