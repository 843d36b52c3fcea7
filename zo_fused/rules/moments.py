"""Update rules with element-wise moments of the estimate ``g z``: momentum, Adam, sign.

The estimate is made in registers, in the sweep that also restores and updates; only the moments are
stored. A step that is skipped leaves the moments as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Term
from zo_fused.step.rule import Rule, Update, check_state
from zo_fused.step.vectors import Vector, float32, table
from zo_fused.sweeps.arithmetic import square_root

STATE_DTYPES = ("float32", "param")


def kept(
    bucket: Bucket, state: dict[Any, Any], name: str, state_dtype: str = "float32"
) -> list[Tensor]:
    """A moment of every parameter, zero at first."""

    def make() -> list[Tensor]:
        for p in bucket.owners:
            if name not in state[p]:
                dtype = p.dtype if state_dtype == "param" else torch.float32
                state[p][name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            check_state(name, state[p][name], p.shape, p)
        return bucket.like([state[p][name] for p in bucket.owners])

    return bucket.once(name, make)


def _sweep(
    update: Update,
    direction: Dense,
    rule: str,
    moments: list[list[Tensor]],
    beta: Vector,
    gain: Vector,
    beta2: Vector,
    gain2: Vector,
    eps: Vector,
    step: Vector,
) -> None:
    """With ``g`` the sum of all ``grad z``: ``m = beta m + gain g``, ``v = beta2 v + gain2 g^2``
    and ``p = decay p + restore z + step s`` with s of the rule; and the next perturbation."""
    u = update
    grads = list(u.grads)
    terms = [Term(u.step, u.bucket.zeros, query=query) for query in range(len(grads))]
    terms[u.displaced] = terms[u.displaced]._replace(coeffs=u.back)
    if u.ahead is not None:
        grads.append(u.bucket.zeros)
        terms.append(Term(u.step + 1, u.ahead))
    columns = (
        u.if_finite(beta, 1.0),
        u.if_finite(gain, 0.0),
        u.if_finite(beta2, 1.0),
        u.if_finite(gain2, 0.0),
        u.if_finite(eps, 1.0),
        u.if_finite(step, 0.0),
    )
    u.bucket.prepared("moments_", *moments, key=rule)(
        direction.keys(u.seed, terms, u.bucket.device),
        table(direction.stretched(u.seed, terms, grads)),
        table(direction.stretched(u.seed, terms, [term.coeffs for term in terms])),
        table(columns),
        float32(u.factor),
        rule,
        u.rounding,
        **direction.options,
    )


class Momentum(Rule):
    """``m = beta m + (1 - dampening) g z``, ``theta = (1 - lr weight_decay) theta - lr m``.

    State per parameter: ``momentum``, of its shape.
    """

    takes = (Dense,)
    draws = True

    def __init__(self, state_dtype: str) -> None:
        self.state_dtype = state_dtype

    def not_sharded(self) -> str:
        return ""

    def prepare(self, update: Update, direction: Dense, state: dict[Any, Any]) -> None:
        kept(update.bucket, state, "momentum", self.state_dtype)

    def apply(self, update: Update, direction: Dense, state: dict[Any, Any]) -> None:
        u = update
        beta = u.bucket.hyper(u.param_groups, "momentum")
        gain = 1 - u.bucket.hyper(u.param_groups, "dampening")
        zero = u.bucket.zeros
        m = kept(u.bucket, state, "momentum", self.state_dtype)
        _sweep(u, direction, "momentum", [m, []], beta, gain, zero, zero, zero, -u.lr)


def steps_taken(bucket: Bucket, state: dict[Any, Any]) -> Vector:
    """t of every owner in one vector, whose elements the state then holds."""
    t = torch.zeros(len(bucket.owners), dtype=torch.float64, device=bucket.device)
    for p, part in zip(bucket.owners, t.unbind(), strict=True):
        if "step" in state[p]:
            part.copy_(state[p]["step"])
        state[p]["step"] = part
    return t


class Adam(Rule):
    """``m = beta1 m + (1 - beta1) g z``, ``v = beta2 v + (1 - beta2) (g z)^2``,
    ``theta = (1 - lr weight_decay) theta - lr m' / (sqrt(v') + eps)`` with the bias-corrected
    ``m' = m / (1 - beta1^t)``, ``v' = v / (1 - beta2^t)``; t counts steps that were not skipped.

    State per parameter: ``exp_avg`` and ``exp_avg_sq`` of its shape, ``step``: t, float64 [].
    """

    takes = (Dense,)
    draws = True
    together = ("exp_avg", "exp_avg_sq", "step")

    def __init__(self, state_dtype: str) -> None:
        self.state_dtype = state_dtype

    def not_sharded(self) -> str:
        return ""

    def prepare(self, update: Update, direction: Dense, state: dict[Any, Any]) -> None:
        kept(update.bucket, state, "exp_avg", self.state_dtype)
        kept(update.bucket, state, "exp_avg_sq")
        self._steps(update.bucket, state)

    def _steps(self, bucket: Bucket, state: dict[Any, Any]) -> Vector:
        """t, an owner each."""
        return bucket.once("step", partial(steps_taken, bucket, state))

    def apply(self, update: Update, direction: Dense, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        betas = [[g["betas"][i] for g in u.param_groups] for i in (0, 1)]
        beta1, beta2 = map(bucket.constant, betas)
        gain1, gain2 = (bucket.constant([1 - beta for beta in group]) for group in betas)
        eps = bucket.hyper(u.param_groups, "adam_eps")
        t = self._steps(bucket, state)
        t += u.finite
        t = bucket.spread(t)
        powers1, powers2 = (bucket.powers(group, t) for group in betas)
        root = square_root(1 - powers2)
        # lr m' / (sqrt(v') + eps) = (lr root / (1 - beta1^t)) m / (sqrt(v) + eps root)
        step = -u.lr * root / (1 - powers1)
        m = kept(bucket, state, "exp_avg", self.state_dtype)
        v = kept(bucket, state, "exp_avg_sq")
        columns = (beta1, gain1, beta2, gain2, eps * root, step)
        _sweep(u, direction, "adam", [m, v], *columns)


class Sign(Rule):
    """``theta = (1 - lr weight_decay) theta - lr sign(g z)``, element by element. No state."""

    takes = (Dense,)
    draws = True

    def not_sharded(self) -> str:
        return ""

    def apply(self, update: Update, direction: Dense, state: dict[Any, Any]) -> None:
        u = update
        one, zero = u.bucket.ones, u.bucket.zeros
        _sweep(u, direction, "sign", [[], []], zero, one, zero, zero, zero, -u.lr)
