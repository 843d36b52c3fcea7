"""Steps along curved directions, which learn from them: LOREN."""

from __future__ import annotations

from typing import Any

from zo_fused.directions.curved import Curved
from zo_fused.rules.moments import kept
from zo_fused.step.direction import Term
from zo_fused.step.rule import Rule, Update


class CurvedSGD(Rule):
    """``theta = (1 - lr weight_decay) theta - lr g d``, or with momentum
    ``m = beta m + (1 - beta) g d``, ``theta = (1 - lr weight_decay) theta - lr m``; then a of the
    directions goes down the slope of the mean loss (`Curvature.learn`), once a step: all queries of
    a step have the same a.

    State per parameter: with momentum ``momentum``, float32, of its shape.

    Args:
        lr_cov: learning rate of a.
        momentum: whether there is an m.
    """

    takes = (Curved,)

    def __init__(self, lr_cov: float, momentum: bool) -> None:
        self.lr_cov = lr_cov
        self.momentum = momentum

    def prepare(self, update: Update, direction: Curved, state: dict[Any, Any]) -> None:
        direction.curvature(update.bucket, update.seed)
        if self.momentum:
            kept(update.bucket, state, "momentum")

    def apply(self, update: Update, direction: Curved, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        curvature = direction.curvature(bucket, u.seed)
        also = None
        if self.momentum:
            beta = bucket.hyper(u.param_groups, "momentum")
            estimate = [Term(u.step, (1 - beta) * g, query=q) for q, g in enumerate(u.grads)]
            row = curvature.row(u.seed, estimate)
            m = kept(bucket, state, "momentum")
            direction.write(bucket, m, u.seed, estimate, row, u.if_finite(beta, 1.0))
            also = u.if_finite(-u.lr, 0.0), m
            terms = [Term(u.step, u.back, query=u.displaced)]
        else:
            terms = [Term(u.step, -u.lr * g, query=q) for q, g in enumerate(u.grads)]
            displaced = terms[u.displaced]
            terms[u.displaced] = displaced._replace(coeffs=displaced.coeffs + u.back)
        row = curvature.row(u.seed, terms)
        eps = bucket.hyper(u.param_groups, "eps")
        curvature.learn(u.seed, u.number, [eps * grad for grad in u.grads], self.lr_cov)
        if u.ahead is not None:
            ahead = [Term(u.number + 1, u.ahead)]
            row = row + curvature.row(u.seed, ahead)
            terms += ahead
        direction.write(bucket, bucket.params, u.seed, terms, row, u.factor, u.rounding, also)
