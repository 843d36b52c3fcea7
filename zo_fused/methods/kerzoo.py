"""KerZOO: lengths of z and weights of estimates by a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.noise.streams import uniform
from zo_fused.rules.sgd import SGD
from zo_fused.step.direction import Term
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import StepOptions
from zo_fused.step.vectors import Vector, vector


class Stretched(Dense):
    """``z = r u``, u with independent elements and r ~ U(-1, 1), of a query."""

    def length(self, seed: int, term: Term) -> float:
        assert isinstance(term.step, int)
        return uniform(seed, term.step, term.query)

    def not_capturable(self, deferred: bool) -> str:
        return "the host draws the length of z"


@method(Recipe("kerzoo", "KerZOO"))
class KerZOO(ZerothOrderOptimizer):
    """Kernel-weighted zeroth-order SGD (arXiv 2505.18886): ``z = r u`` with ``u ~ N(0, I)`` and
    ``r ~ U(-1, 1)``, g as in MeZO, and ``theta = theta - lr * (K(r) g u + weight_decay * theta)``
    with the kernel ``K(r) = 15/4 r (5 - 7 r^2)``, which cancels the bias of order eps^2.

    Two forward passes, three sweeps (two with ``deferred``), no state. E[(r K)^2] = 6.25: where
    that bias does not matter, as at the usual eps, an estimate is worth 1/6.25 of MeZO's.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        distribution: of the elements of u: "gaussian", "hadamard" or "rademacher".
        common: eps, weight_decay, rounding, seed, deferred, one_sided, queries, block_order: see
            `ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        distribution: str = "gaussian",
        **common: Unpack[StepOptions],
    ) -> None:
        defaults = {"lr": lr}
        options = {"distribution": distribution}
        super().__init__(params, Stretched(distribution), SGD(), defaults, options, **common)

    def transform(self, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]) -> Vector:
        """K(r) g u is K(r) / r g z."""
        queries = self.schedule.queries  # those of every block have the same z
        lengths = [uniform(self.seed, self.step_count, q % queries) for q in range(len(grads))]
        return grads * vector([15 / 4 * (5 - 7 * r * r) for r in lengths], grads.device)
