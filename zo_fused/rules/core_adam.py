"""Adam in the coordinates of a low-rank direction: SubZero+."""

from __future__ import annotations

from functools import partial
from typing import Any

from zo_fused.directions.factors import Factors, Flat
from zo_fused.directions.low_rank import LowRank
from zo_fused.rules.moments import steps_taken
from zo_fused.rules.windows import entered, gathered
from zo_fused.step.direction import Direction, Term
from zo_fused.step.rule import Rule, Update
from zo_fused.step.vectors import Vector
from zo_fused.sweeps.arithmetic import square_root


class CoreAdam(Rule):
    """Adam on the estimate ``G = sum of g Z`` of a step's queries, where Z are the coordinates of z
    (SubZero+, arXiv 2608.15665): the core (rank, rank) of SubZero, the factor (m, rank) of LOZO,
    all of a one-dimensional parameter.

    ``m = beta1 m + (1 - beta1) G``, ``v = beta2 v + (1 - beta2) G^2``, and the weights move by
    ``-lr m' / (sqrt(v') + eps)``, taken as coordinates, with the bias-corrected
    ``m' = m / (1 - beta1^t)``, ``v' = v / (1 - beta2^t)``; t counts steps that were not skipped. At
    a new window, whose coordinates mean something else, m, v and t of a matrix begin again.

    State per parameter: ``core_exp_avg`` and ``core_exp_avg_sq``, float32, of the shape of its
    coordinates; ``step``: t, float64 []; ``core_window``, the number of its window.
    """

    takes: tuple[type[Direction], ...] = (LowRank,)
    together = ("core_exp_avg", "core_exp_avg_sq", "step")
    not_capturable = "whether the moments begin again is for the host to say"

    def not_sharded(self) -> str:
        return ""

    def prepare(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> None:
        self._moments(update, direction.factors(update.bucket), state)
        update.bucket.once("step", partial(steps_taken, update.bucket, state))

    @staticmethod
    def _moments(update: Update, factors: Factors, state: dict[Any, Any]) -> list[Flat]:
        names = ["core_exp_avg", "core_exp_avg_sq"]
        make = partial(gathered, update, factors, state, names, "core_window")
        return update.bucket.once("core moments", make)

    def apply(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> None:
        u, factors = update, direction.factors(update.bucket)
        (m, _), (v, _), eps, gain = self.averages(u, direction, state)
        step = m / (square_root(v) + factors.spread(eps))
        u.write(
            direction,
            Term(u.number, u.back, query=u.displaced),
            Term(u.number, gain, step),
        )

    def averages(
        self, update: Update, direction: LowRank, state: dict[Any, Any]
    ) -> tuple[Flat, Flat, Vector, Vector]:
        """m and v with this step in them, eps and gain: the weights move by
        ``gain m / (sqrt(v) + eps)``, with the corrections of both moments in these numbers."""
        u, bucket = update, update.bucket
        factors = direction.factors(bucket)
        spread = factors.spread
        moments = self._moments(u, factors, state)
        (m, m_parts), (v, v_parts) = moments
        t = bucket.once("step", partial(steps_taken, bucket, state))
        for owner in entered(u, state, "core_window"):
            t[owner].zero_()
            if (row := bucket.row_of(owner)) is not None:
                m_parts[row].zero_()
                v_parts[row].zero_()
        t += u.finite
        t = bucket.spread(t)
        estimate = None
        for query, grad in enumerate(u.grads):
            part = spread(grad) * factors.of(u.seed, u.number, query).flat
            estimate = part if estimate is None else estimate + part
        assert estimate is not None
        betas = [[g["betas"][i] for g in u.param_groups] for i in (0, 1)]
        beta1, beta2 = map(bucket.constant, betas)
        for moment, beta, power in ((m, beta1, estimate), (v, beta2, estimate * estimate)):
            moment.mul_(spread(u.if_finite(beta, 1.0)))
            moment.add_(spread(u.if_finite(1 - beta, 0.0)) * power)
        # m' / (sqrt(v') + eps) = (root / (1 - beta1^t)) m / (sqrt(v) + eps root)
        powers1, powers2 = (bucket.powers(group, t) for group in betas)
        root = square_root(1 - powers2)
        eps = u.if_finite(bucket.hyper(u.param_groups, "adam_eps") * root, 1.0)
        gain = u.if_finite(-u.lr * root / (1 - powers1), 0.0)
        return moments[0], moments[1], eps, gain
