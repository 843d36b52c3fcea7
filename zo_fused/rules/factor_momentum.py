"""Momentum kept in the factor: LOZO-M."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_fused.directions.factors import Factors
from zo_fused.directions.low_rank import LowRank
from zo_fused.directions.products import gram, small_product
from zo_fused.step.direction import Term
from zo_fused.step.rule import Rule, Update, check_state
from zo_fused.step.vectors import float32
from zo_fused.sweeps.conversions import int64_tensor


class FactorMomentum(Rule):
    """Momentum kept in the factor (LOZO-M, arXiv 2410.07698):

    ``N = beta * N + (1 - beta) * g * U``, ``theta = (1 - lr * weight_decay) * theta - lr * N V^T``.

    At a new window the old momentum is projected on the new V by least squares,
    ``N = N (V_old^T V_new) / n`` (V_new^T V_new is about n times the identity).

    State per parameter: ``momentum_factor``, float32 (m, rank), and ``momentum_window``, the number
    of the window that it belongs to. V_old is not kept but made anew. A matrix that is frozen over
    a window's end starts again from zero.
    """

    takes = (LowRank,)
    not_capturable = "whether the momentum moves to a new window is for the host to say"

    def prepare(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> None:
        self.averages(update, direction.factors(update.bucket), state)

    def averages(
        self, update: Update, factors: Factors, state: dict[Any, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """Where N of all parameters is, in one tensor, and its parts."""
        return update.bucket.once("momentum", lambda: gathered(update, factors, state))

    def apply(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> None:
        u = update
        factor = self.factor(u, direction, state)
        u.write(
            direction,
            Term(u.number, u.back, query=u.displaced),
            Term(u.number, u.if_finite(-u.lr, 0.0), factor),
        )

    def factor(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> Tensor:
        """N of this step, flat."""
        u, bucket = update, update.bucket
        factors = direction.factors(bucket)
        flat, moments = self.averages(u, factors, state)
        self.to_window(u, direction, moments, state)
        beta = bucket.hyper(u.param_groups, "momentum", 0.0)
        for query, grad in enumerate(u.grads):
            now = factors.of(u.seed, u.number, query)
            add = bucket.prepared("factor_momentum_", now.us, key=now.number, params=moments)
            kept = u.if_finite(beta, 1.0) if query == 0 else bucket.ones
            add(float32((1 - beta) * grad), float32(kept))
        return flat

    def to_window(
        self, update: Update, direction: LowRank, moments: list[Tensor], state: dict[Any, Any]
    ) -> None:
        """Where this step is the first of a window, project N on its V."""
        u, bucket = update, update.bucket
        if u.number == 0 or all(u.number % group["interval"] for group in bucket.fixed):
            return
        factors = direction.factors(bucket)
        old = factors.of(u.seed, u.number - 1).vs
        new = factors.of(u.seed, u.number).vs
        for row, (p, g) in enumerate(zip(bucket.params, bucket.group_of, strict=True)):
            square = direction.square(new[row].shape[0])
            if p.dim() >= 2 and u.number % bucket.fixed[g]["interval"] == 0:
                moments[row].copy_(project(moments[row], old[row], new[row], square))
                state[p]["momentum_window"].fill_(u.number // bucket.fixed[g]["interval"])


def gathered(
    update: Update, factors: Factors, state: dict[Any, Any]
) -> tuple[Tensor, list[Tensor]]:
    """The momenta of a bucket in one tensor, and its parts, which the state then holds."""
    bucket = update.bucket
    flat, parts = factors.buffer(factors.u_shapes)
    for p, g, part in zip(bucket.params, bucket.group_of, parts, strict=True):
        interval = bucket.fixed[g]["interval"]
        last = (update.number - 1) // interval  # the window that was left
        if "momentum_factor" in state[p]:
            check_state("momentum_factor", state[p]["momentum_factor"], part.shape, p)
        if "momentum_factor" in state[p] and int(state[p].get("momentum_window", last)) == last:
            part.copy_(state[p]["momentum_factor"])
        state[p]["momentum_factor"] = part
        if p.dim() >= 2:
            state[p]["momentum_window"] = int64_tensor([update.number // interval])[0]
    return flat, parts


def project(moment: Tensor, v_old: Tensor, v_new: Tensor, square: float) -> Tensor:
    """``moment @ (v_old.T @ v_new) / square`` through the r x r product, float32 (m, r), bit for
    bit the same on every device."""
    return small_product(moment, gram(v_old, v_new) / square)
