"""ZOConservative: no step that would not help."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.rules.sgd import SGD
from zo_fused.step.optimizer import Closure, ZerothOrderOptimizer
from zo_fused.step.schedule import Position, Schedule
from zo_fused.step.vectors import Flag, Vector, all_finite


class Chosen(SGD):
    """Nothing: the weights are where the step goes."""

    not_capturable = "the host compares the candidates"


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
        seed: base seed of the run.
        distribution: of the elements of z: "gaussian", or "rademacher", -1 or 1.
        block_order: None or "sequential", see `ZerothOrderOptimizer`.
    """

    needs_closure = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        eps: float = 1e-3,
        seed: int = 0,
        distribution: str = "gaussian",
        block_order: str | None = None,
    ) -> None:
        if block_order == "simultaneous":
            raise ValueError("ZOConservative compares the places of one z: sequential blocks only")
        defaults = {"lr": lr, "eps": eps}
        schedule = Schedule(block_order=block_order)
        super().__init__(params, defaults, Dense(distribution), Chosen(), seed, schedule)
        self._options = {"distribution": distribution, "block_order": block_order}

    def _reset(self) -> None:
        super()._reset()
        self._chosen: list[float] | None = None  # where this step goes

    def _estimate(self, closure: Closure) -> tuple[Tensor, Vector]:
        loss, grads = super()._estimate(closure)
        if all_finite(grads):
            self._go_to_the_best(closure, float(grads[0]))
        return loss, grads

    def _go_to_the_best(self, closure: Closure, grad: float) -> None:
        """Leave the weights at the candidate with the lowest loss; theta, if none is lower."""
        places = {number: self._candidate(number * grad) for number in (0, -1, 1)}
        losses: dict[int, float] = {}
        for number, place in places.items():
            self._put(place)
            if self._generators is not None:
                self._generators.rewind()
            loss = float(self._loss(closure))
            losses[number] = math.inf if math.isnan(loss) else loss
        self._chosen = places[min(losses, key=losses.__getitem__)]  # the first of equals
        self._put(self._chosen)

    def _candidate(self, grad: float) -> list[float]:
        """Coefficient of z, a group."""
        groups = self.param_groups
        # eps cancels: where a group is not of this step's block, there is none of it
        ratios = zip(groups, self._displacement(Position(1.0)), strict=True)
        scale = grad * float(groups[0]["eps"])
        return [float(g["lr"]) * scale * at / float(g["eps"]) ** 2 for g, at in ratios]

    def _put(self, place: list[float]) -> None:
        with self._timed("perturb"):
            self._go(place, 0, {"at": place})

    def _apply(self, grads: Vector, finite: Flag) -> None:
        """Where the weights are is the new theta; that of a step that is skipped is the old."""
        if not finite:
            self._move([0.0] * len(self.param_groups))
        elif self._chosen is not None:  # in case that somebody has looked
            self._put(self._chosen)
        self._chosen = None
        self._at = []
