"""HiZOO: MeZO scaled by a diagonal Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zo_fused.directions.shaped import Scaled
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.hizoo import HessianSGD
from zo_fused.step.estimates import Estimate
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import Position
from zo_fused.step.vectors import as_float64


@method(Recipe("hizoo", "HiZOO"))
class HiZOO(ZerothOrderOptimizer):
    """Hessian-informed zeroth-order SGD (arXiv 2402.15173). With z ~ N(0, I), a diagonal H that is
    ones at first, ``L+- = L(theta +- eps z / sqrt(H))`` and ``L0 = L(theta)``:

    ``g = (L+ - L-) / (2 eps)``, ``curv = |L+ + L- - 2 L0| / (2 eps^2)``,
    ``H = max((1 - a) H + a curv H z^2, 1e-6)``,
    ``theta = theta - lr * (g z / sqrt(H) + weight_decay * theta)`` with the new H.

    a is `hessian_smooth`. Three forward passes (the released code makes a fourth, for its log) and
    three sweeps; the last one goes back with the old H, makes the new one and steps. State: H,
    float32, 4 bytes a weight, read by every sweep and written by the last. The released code keeps
    it in the dtype of the weights, where float16 turns ``1e-8 curv`` into 0 and H stays 1. With
    a = 0 this is MeZO to the bit, with a forward pass more.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        hessian_smooth: a, in [0, 1).
        distribution: of the elements of z: "gaussian" or "hadamard". Not "rademacher": z^2 is 1
            there, and H would stay the same for all weights.
        eps, weight_decay, rounding, seed, parallel, queries: see `ZerothOrderOptimizer`. There is
            no deferred, for L0 needs theta, and no one_sided, for the curvature needs both sides.
    """

    needs_closure = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        hessian_smooth: float = 1e-4,
        distribution: str = "gaussian",
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "nearest",
        *,
        seed: int = 0,
        parallel: Option = "auto",
        queries: int = 1,
    ) -> None:
        if distribution == "rademacher":
            raise ValueError(
                'HiZOO learns H from z^2, which is 1 with distribution="rademacher": choose '
                '"gaussian" or "hadamard"'
            )
        defaults = {
            "lr": lr,
            "hessian_smooth": hessian_smooth,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
        }
        options = {"distribution": distribution}
        super().__init__(
            params,
            Scaled(distribution),
            HessianSGD(),
            defaults,
            options,
            seed=seed,
            parallel=parallel,
            queries=queries,
        )

    def positions(self) -> list[Position]:
        return [Position(0.0), *super().positions()]

    def difference(self, losses: Mapping[Position, Any]) -> Estimate:
        """As for all, and the rule gets the curvatures; if one is not finite, the step is
        skipped."""
        numbers = {position: float(as_float64(loss)) for position, loss in losses.items()}
        radius = float(self.param_groups[0]["eps"])
        found = [
            abs(loss + numbers[position._replace(sign=-1.0)] - 2 * numbers[Position(0.0)])
            / (2 * radius**2)
            for position, loss in numbers.items()
            if position.sign > 0
        ]
        if not all(map(math.isfinite, found)):
            return super().difference(dict.fromkeys(losses, math.nan))
        self.weights.learn(found)
        return super().difference(losses)
