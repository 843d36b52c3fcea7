"""Momentum kept in the factor: LOZO-M."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from zo_fused.directions.factors import Factors, Flat
from zo_fused.directions.low_rank import LowRank
from zo_fused.directions.products import gram, small_product
from zo_fused.rules.windows import entered, gathered
from zo_fused.step.direction import Term
from zo_fused.step.rule import Rule, Update
from zo_fused.step.vectors import float32


class FactorMomentum(Rule):
    """Momentum kept in the factor (LOZO-M, arXiv 2410.07698), or in other coordinates of z:

    ``N = beta * N + (1 - beta) * g * U``, ``theta = (1 - lr * weight_decay) * theta - lr * N V^T``.

    At a new window the old momentum is projected on the new V by least squares,
    ``N = N (V_old^T V_new) / n`` (V_new^T V_new is about n times the identity). Coordinates in a
    basis Q, which changes too, begin again from zero.

    State per parameter: ``momentum_factor``, float32, of the shape of the coordinates, (m, rank)
    for LOZO, and ``momentum_window``, the number of the window that it belongs to. V_old is not
    kept but made anew. A matrix that is frozen over a window's end starts again from zero.
    """

    takes = (LowRank,)
    names: tuple[str, ...] = (
        "momentum_factor",
    )  # in the state, of the shape of the coordinates; N first
    not_capturable = "whether the momentum moves to a new window is for the host to say"

    def not_sharded(self) -> str:
        return ""

    def prepare(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> None:
        self.averages(update, direction.factors(update.bucket), state)

    def averages(self, update: Update, factors: Factors, state: dict[Any, Any]) -> Flat:
        """N of all parameters in one tensor, and its parts."""
        return self.gathered(update, factors, state)[0]

    def gathered(self, update: Update, factors: Factors, state: dict[Any, Any]) -> list[Flat]:
        """What the state has under `names`."""
        make = partial(gathered, update, factors, state, self.names, "momentum_window")
        return update.bucket.once("momentum", make)

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
            add = bucket.prepared("factor_momentum_", now.parts, key=now.number, params=moments)
            kept = u.if_finite(beta, 1.0) if query == 0 else bucket.ones
            add(float32((1 - beta) * grad), float32(kept))
        return flat

    def to_window(
        self, update: Update, direction: LowRank, moments: list[Tensor], state: dict[Any, Any]
    ) -> None:
        """Where this step is the first of a window, N in the coordinates of that window."""
        u, factors = update, direction.factors(update.bucket)
        found = map(u.bucket.row_of, entered(u, state, "momentum_window"))
        rows = [row for row in found if row is not None]
        if rows and not direction.form.lift:
            old = factors.of(u.seed, u.number - 1).vs
            new = factors.of(u.seed, u.number).vs
        for row in rows:
            if direction.form.lift:
                moments[row].zero_()
                continue
            square = direction.square(new[row].shape[0])
            moments[row].copy_(project(moments[row], old[row], new[row], square))


def project(moment: Tensor, v_old: Tensor, v_new: Tensor, square: float) -> Tensor:
    """``moment @ (v_old.T @ v_new) / square`` through the r x r product, float32 (m, r), bit for
    bit the same on every device."""
    return small_product(moment, gram(v_old, v_new) / square)
