"""What a projected gradient does to the weights: one class per update rule.

A rule takes back the last perturbation, applies the update and, where the schedule asks for it,
perturbs along the next step's z, all in one sweep. All numbers are vectors with a row a parameter
(`zo_fused.step.vectors`); on GPUs nothing waits for the host.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zo_fused.step.direction import Direction, Term
from zo_fused.step.rule import Rule, Update


class SGD(Rule):
    """``theta = (1 - lr * weight_decay) * theta - lr * g * z`` from the perturbed weights."""

    def not_sharded(self) -> str:
        return ""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        u = update
        terms = []
        for query, grad in enumerate(u.grads):
            back = u.back if query == u.displaced else u.bucket.zeros
            terms.append(Term(u.step, back - u.lr * grad, query=query))
        u.write(direction, *terms)


class Floored(SGD):
    """`SGD`, then ``theta = max(theta, floor)``, element by element, which reads no noise. A step
    that is skipped changes nothing."""

    sweeps_alone = False

    def __init__(self, floor: float) -> None:
        self.floor = floor

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        super().apply(update, direction, state)
        if update.skipped is True:
            return
        floor: Any = self.floor
        if isinstance(update.skipped, Tensor):
            floor = torch.where(update.skipped, -math.inf, self.floor)
        with torch.inference_mode():  # the parameters may have been made in it
            for p in update.bucket.params:
                p.clamp_(min=floor)


class ScalarSign(Rule):
    """``theta = (1 - lr weight_decay) theta - lr sign(g) z`` (of several queries the mean).
    No state."""

    def not_sharded(self) -> str:
        return ""

    def apply(self, update: Update, direction: Direction, state: dict[Any, Any]) -> None:
        signs = [grad.sign() / len(update.grads) for grad in update.grads]
        SGD().apply(replace(update, grads=signs), direction, state)
