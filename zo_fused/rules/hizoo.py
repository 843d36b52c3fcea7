"""Steps scaled by a diagonal Hessian that every step refines."""

from __future__ import annotations

from typing import Any

from zo_fused.directions.shaped import Scaled
from zo_fused.rules.sgd import SGD
from zo_fused.step.direction import Term
from zo_fused.step.rule import Rule, Update
from zo_fused.step.vectors import float32, table

FLOOR = 1e-6  # of H


class HessianSGD(Rule):
    """``H = max((1 - a) H + a curv H z^2, 1e-6)``, ``theta = (1 - lr weight_decay) theta - lr g z /
    sqrt(H)`` with the new H, from weights that lie along z / sqrt(H) with the old one: in one
    sweep. Of several queries the means of ``curv z^2`` and of ``g z`` count.

    curv of each query is what the direction has learned. State: that of `Scaled`.
    """

    takes = (Scaled,)
    draws = True
    not_capturable = "the host has the curvatures"

    def apply(self, update: Update, direction: Scaled, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        smooth = [float(group["hessian_smooth"]) for group in u.param_groups]
        if not bucket.has(smooth):  # H stays, and one coefficient does it all, as in MeZO
            SGD().apply(u, direction, state)
            return
        eps = [float(group["eps"]) for group in u.param_groups]
        # A group with its own eps has its own curvature from the same losses.
        gains = [a * (eps[0] / e) ** 2 for a, e in zip(smooth, eps, strict=True)]
        a, gain = bucket.constant(smooth), bucket.constant(gains)
        queries = range(len(u.grads))
        curvatures = direction.curvatures or [0.0] * len(queries)  # a step that is skipped
        terms = [Term(u.step, bucket.zeros, query=query) for query in queries]
        terms[u.displaced] = terms[u.displaced]._replace(coeffs=u.back)
        squares = [u.if_finite(gain * (c / len(queries)), 0.0) for c in curvatures]
        zero, one = bucket.zeros, bucket.ones
        columns = (zero, one, u.if_finite(1 - a, 1.0), zero, one * FLOOR, u.if_finite(-u.lr, 0.0))
        bucket.prepared("moments_", [], direction.shapes(bucket), key="hizoo")(
            direction.keys(u.seed, terms, bucket.device),
            table(u.grads),
            table([term.coeffs for term in terms]),
            table(columns),
            float32(u.factor),
            "hizoo",
            u.rounding,
            squares=table(squares),
            **direction.options,
        )
