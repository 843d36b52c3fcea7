"""ConMeZO: directions from a cone around the momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from zo_fused.checks import bounded, choice, whole
from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.moments import STATE_DTYPES, kept
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Sweep, Term
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.rule import Rule, Update
from zo_fused.step.schedule import StepOptions
from zo_fused.step.vectors import Vector, float32, table, where
from zo_fused.sweeps.arithmetic import square_root

# A step divides by what is kept of m: less than this is taken for it, so that no rounding of m is
# multiplied by more than 2^10.
LEAST_KEPT = 2.0**-10


def _portable(x: float) -> float:
    """To float32: the last bit of a double from the host's mathematics is not that of others."""
    return float(np.float32(x))


class Cone(Dense):
    """``z = cos(theta) m / rms(m) + sin(theta) u`` with u of `Dense`; u alone where m is zero.

    State per parameter: ``momentum``: m, of its shape; ``rms``: of m, float64 [].
    """

    together = ("momentum", "rms")

    def __init__(self, theta: float, state_dtype: str, distribution: str) -> None:
        super().__init__(distribution)
        self._cosine, self._sine = _portable(math.cos(theta)), _portable(math.sin(theta))
        self.state_dtype = state_dtype

    def momentum(self, bucket: Bucket) -> list[Tensor]:
        return kept(bucket, self.state, "momentum", self.state_dtype)

    def rms(self, bucket: Bucket) -> Vector:
        """rms(m) of every parameter in one vector, whose elements the state has."""

        def make() -> Vector:
            rms = torch.zeros(len(bucket.params), dtype=torch.float64, device=bucket.device)
            for p, part in zip(bucket.params, rms.unbind(), strict=True):
                if "rms" in self.state[p]:
                    part.copy_(self.state[p]["rms"])
                self.state[p]["rms"] = part
            return rms

        return bucket.once("rms", make)

    def parts(self, rms: Vector) -> tuple[Vector, Vector]:
        """What z has of m and of u."""
        known = rms > 0
        alpha = where(known, self._cosine / rms, 0.0)
        return alpha, where(known, torch.full_like(rms, self._sine), 1.0)

    def sweep(self, sweep: Sweep) -> None:
        bucket, terms = sweep.bucket, sweep.terms
        alpha, gamma = self.parts(self.rms(bucket))
        zeros = [bucket.zeros for _ in terms]
        total = sum((term.coeffs for term in terms[1:]), terms[0].coeffs)
        self.run(
            sweep,
            zeros,
            [gamma * term.coeffs for term in terms],
            (bucket.ones, bucket.zeros, alpha * total),
        )

    def run(
        self,
        sweep: Sweep,
        grads: Sequence[Vector],
        restores: Sequence[Vector],
        columns: tuple[Vector, Vector, Vector],
    ) -> None:
        """``m = beta m + gain sum grads u``, ``p = decay p + sum restores u + step m``, with beta,
        gain and step the columns."""
        bucket, seed, terms, decay, rounding = sweep
        beta, gain, step = columns
        zero = bucket.zeros
        bucket.prepared("moments_", self.momentum(bucket), [], key="cone")(
            self.keys(seed, terms, bucket.device),
            table(list(grads)),
            table(list(restores)),
            table((beta, gain, zero, zero, zero, step)),
            float32(decay),
            "momentum",
            rounding,
            **self.options,
        )


class ConeMomentum(Rule):
    """``m = beta m + (1 - beta) g z``, ``theta = (1 - lr weight_decay) theta - lr g z``, and rms(m)
    by what it would be if m and u were orthogonal, in one sweep.

    Args:
        warmup: steps until beta is that of the group; 0: always.
    """

    takes = (Cone,)
    draws = True

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.not_capturable = "the host has the warm-up of beta" if warmup else ""

    def beta_of(self, beta: float, step: int) -> float:
        """beta of a step: 0.1 for a tenth of the warm-up, then up, as in the released code."""
        start = self.warmup / 10
        if step > self.warmup or not self.warmup:
            return beta
        if step <= start:
            return 0.1
        part = ((step - start) / (self.warmup - start)) ** 1.8
        return _portable(beta - (beta - 0.1) / (1 + 8 * part) ** 3)

    def prepare(self, update: Update, direction: Cone, state: dict[Any, Any]) -> None:
        direction.momentum(update.bucket)
        direction.rms(update.bucket)

    def apply(self, update: Update, direction: Cone, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        beta = bucket.hyper(u.param_groups, "momentum")
        if self.warmup:
            beta = bucket.constant(
                [self.beta_of(float(g["momentum"]), u.number) for g in u.param_groups]
            )
        rms = direction.rms(bucket)
        alpha, gamma = direction.parts(rms)
        total = sum(u.grads[1:], u.grads[0])
        keep = beta + (1 - beta) * alpha * total
        keep = torch.where(keep < 0, keep.clamp(max=-LEAST_KEPT), keep.clamp(min=LEAST_KEPT))
        keep = u.if_finite(keep, 1.0)
        gains = [(1 - beta) * gamma * grad for grad in u.grads]
        # p gets `of_m` times the old m, which is (the new m - sum of gains u) / keep
        of_m = alpha * (u.back - u.if_finite(u.lr * total, 0.0))
        step = of_m / keep
        restores = []
        for query, (grad, gain) in enumerate(zip(u.grads, gains, strict=True)):
            back = u.back if query == u.displaced else bucket.zeros
            restores.append(gamma * (back - u.lr * grad) - step * gain)
        squares = sum((gain * gain for gain in gains[1:]), gains[0] * gains[0])
        rms.copy_(u.if_finite(square_root((keep * rms) ** 2 + squares), rms))
        terms = [Term(u.step, bucket.zeros, query=query) for query in range(len(gains))]
        if u.ahead is not None:
            alpha, gamma = direction.parts(rms)
            step = step + alpha * u.ahead
            terms.append(Term(u.step + 1, u.ahead))
            gains.append(bucket.zeros)
            restores.append(gamma * u.ahead)
        sweep = Sweep(bucket, u.seed, terms, u.factor, u.rounding)
        direction.run(sweep, gains, restores, (keep, bucket.ones, step))


@method(Recipe("conmezo", "ConMeZO", {"momentum": 0.99}))
class ConMeZO(ZerothOrderOptimizer):
    """Directions from a cone around the momentum (arXiv 2511.02757): with d weights,
    ``z = sqrt(d) cos(theta) m / |m| + sin(theta) u``, ``u ~ N(0, I)``, g as in MeZO,
    ``theta = theta - lr * (g z + weight_decay * theta)`` and ``m = beta m + (1 - beta) g z``. The
    first z is u alone. ``|m|`` is that of the released code's recursion, which takes m and u for
    orthogonal, in float64; with s = ``|m| / sqrt(d)``,
    ``s = sqrt((beta s + (1 - beta) g cos(theta))^2 + ((1 - beta) g sin(theta))^2)``.

    Two forward passes, three sweeps (two with ``deferred``). State: m.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate. The released scripts use 1e-7 for OPT models.
        momentum: beta, in [0, 1).
        theta: half the angle of the cone, in (0, pi / 2].
        warmup: steps in which beta rises from 0.1, as in the released code; 0: none.
        state_dtype: of m: "float32", or "param", the dtype of each weight.
        distribution: of the elements of u: "gaussian", "hadamard" or "rademacher".
        common: eps, weight_decay, rounding, seed, deferred, one_sided, queries: see
            `ZerothOrderOptimizer`. No block_order: m is that of all weights.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-7,
        momentum: float = 0.99,
        theta: float = 1.35,
        warmup: int = 2000,
        state_dtype: str = "float32",
        distribution: str = "gaussian",
        **common: Unpack[StepOptions],
    ) -> None:
        if common.get("block_order") is not None:
            raise ValueError("ConMeZO has one momentum for all weights: no block_order")
        choice("state_dtype", state_dtype, STATE_DTYPES)
        theta = bounded("theta", theta, "in (0, pi / 2]", lambda x: 0 < x <= math.pi / 2)
        options = {
            "theta": theta,
            "warmup": whole("warmup", warmup, 0),
            "state_dtype": state_dtype,
            "distribution": distribution,
        }
        direction = Cone(theta, state_dtype, distribution)
        defaults = {"lr": lr, "momentum": momentum}
        super().__init__(params, direction, ConeMomentum(warmup), defaults, options, **common)
