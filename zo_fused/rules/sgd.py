"""What a projected gradient does to the weights: one class per update rule.

A rule takes back the last perturbation, applies the update and, where the schedule asks for it,
perturbs along the next step's z, all in one sweep. All numbers are vectors with a row a parameter
(`zo_fused.step.vectors`); on GPUs nothing waits for the host.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zo_fused.step.direction import Direction, Term
from zo_fused.step.rule import Rule, Update


class SGD(Rule):
    """``theta = (1 - lr * weight_decay) * theta - lr * g * z`` from the perturbed weights."""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        u = update
        terms = []
        for query, grad in enumerate(u.grads):
            back = u.back if query == u.displaced else u.bucket.zeros
            terms.append(Term(u.step, back - u.lr * grad, query=query))
        u.write(direction, *terms)


class ScalarSign(Rule):
    """``theta = (1 - lr weight_decay) theta - lr sign(g) z`` (of several queries the mean).
    No state."""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        signs = [grad.sign() / len(update.grads) for grad in update.grads]
        SGD().apply(replace(update, grads=signs), direction, state)
