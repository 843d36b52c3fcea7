"""ZOConservative: no step that would not help."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.step.direction import Direction, Term
from zo_fused.step.estimates import Estimate
from zo_fused.step.evaluation import Closure
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.rule import Rule, Update
from zo_fused.step.schedule import Position
from zo_fused.step.vectors import Vector
from zo_fused.step.weights import THETA, Place


class Chosen(Rule):
    """The weights are where the step goes: that is theta from here on."""

    not_capturable = "the host compares the candidates"

    def not_sharded(self) -> str:
        return ""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        if update.skipped and update.restore.any():
            update.write(direction, Term(update.step, update.restore, query=update.displaced))


@method(Recipe("zo-conservative", "ZO-Conservative"))
class ZOConservative(ZerothOrderOptimizer):
    """Conservative zeroth-order SGD (ZO-SGD-Cons; Bergou et al. 2020, arXiv 1902.03591, three-point
    method, as in arXiv 2402.11592): with z and g as in MeZO, theta becomes the best of ``theta``,
    ``theta - lr g z`` and ``theta + lr g z`` on the step's batch. If no loss is better than that of
    theta, theta stays.

    Five forward passes; six sweeps (five where the last candidate wins). The candidates are places
    on the line along z, so there is no copy of the weights and no state. The released code gives
    the same three to an optimizer with moments (AdamW by default), whose second step is not the
    mirror of the first. There is no weight decay: a decayed weight would be none of the three.

    The host waits for the losses, to say where to go. A place is reached up to rounding, as with
    all sweeps (docs/noise.md, "Rounding"), and the way back from one that is far away (``lr g`` of
    thousands) rounds at the size of that place.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        eps: perturbation radius.
        distribution: of the elements of z: "gaussian", "hadamard" or "rademacher".
        seed, parallel, block_order: see `ZerothOrderOptimizer`; not "simultaneous".
    """

    needs_closure = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        eps: float = 1e-3,
        distribution: str = "gaussian",
        *,
        seed: int = 0,
        parallel: Option = "auto",
        block_order: str | None = None,
    ) -> None:
        if block_order == "simultaneous":
            raise ValueError("ZOConservative compares the places of one z: sequential blocks only")
        defaults = {"lr": lr, "eps": eps}
        options = {"distribution": distribution}
        super().__init__(
            params,
            Dense(distribution),
            Chosen(),
            defaults,
            options,
            seed=seed,
            parallel=parallel,
            block_order=block_order,
        )

    @property
    def forwards(self) -> int:
        return super().forwards + 3

    _best: Place | None = None  # where this step goes; None: nowhere, or a replay says it

    def measure(self, closure: Closure) -> Estimate:
        estimate = super().measure(closure)
        grad = float(estimate.grads[0].float())
        if math.isfinite(grad):
            self._best = self._search(closure, grad)
            self.weights.go(self._best)
        return estimate

    def _search(self, closure: Closure, grad: float) -> Place:
        """The candidate with the lowest loss; theta, if none is lower."""
        places = [self._candidate(number * grad) for number in (0, -1, 1)]
        losses = [float(self.loss_at(place, closure)) for place in places]
        known = [math.inf if math.isnan(loss) else loss for loss in losses]
        return places[known.index(min(known))]  # the first of equals

    def _candidate(self, grad: float) -> Place:
        """``theta + lr grad z``."""
        groups = self.param_groups
        # eps cancels: where a group is not of this step's block, there is none of it
        radii = self.weights.along(Position(1.0)).at
        scale = grad * float(groups[0]["eps"])
        at = [
            float(group["lr"]) * scale * radius / float(group["eps"]) ** 2
            for group, radius in zip(groups, radii, strict=True)
        ]
        return Place(tuple(at)) if any(at) else THETA

    def update(self, grads: Vector) -> None:
        best, self._best = self._best, None
        if best is not None:
            self.weights.go(best)  # in case that somebody has looked
        super().update(grads)
