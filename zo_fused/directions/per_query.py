"""z = U V^T / sqrt(rank) with both factors of each query alone: EGGROLL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from zo_fused.directions.factors import Factors
from zo_fused.directions.forms import FACTOR
from zo_fused.directions.homing import by_theta
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction, Sweep, Term
from zo_fused.step.vectors import Vector, constant, float32

Product = tuple[tuple[list[Tensor], list[Tensor], Any], Vector]


class PerQuery(Direction):
    """``z = U V^T / sqrt(rank)``, whose elements have variance 1 whatever the rank.

    For a parameter seen as (m, n): U (m, rank) from stream (U, step, query), V (n, rank) from
    stream (V, step, query), both N(0, 1). So the z of a step have columns of their own, and their
    sum has a rank of up to queries * rank. One-dimensional parameters get dense noise, as in
    `LowRank`. No rule knows these z (`Rule.takes`) but those that leave sweeps to the direction.
    """

    fixed = ("rank",)

    def legs(self, sweep: Sweep) -> Sequence[Sweep]:
        """In 16 bits by way of theta, as `Homing`; there is no one pass for it."""
        rounded = any(p.element_size() < 4 for p in sweep.bucket.params)
        return by_theta(sweep) if rounded else (sweep,)

    def sweep(self, sweep: Sweep) -> None:
        bucket, seed, terms, decay, rounding = sweep
        (us, vs, key), coeffs = self.product(bucket, seed, terms)
        bucket.prepared("lowrank_", us, vs, key=key)(float32(coeffs), float32(decay), rounding)

    def product(self, bucket: Bucket, seed: int, terms: Sequence[Term]) -> Product:
        """The terms as ``coeff * U V^T``: their ranks add up.

        Returns:
            U's and V's, a name for where they lie, and the coefficients.
        """
        make = partial(Factors, bucket, FACTOR, self._no_basis, self.options, fresh=True)
        factors = bucket.once("factors", make)
        scale = bucket.once("1/sqrt(rank)", lambda: self._scale(bucket, factors))
        if len(terms) == 1:
            step = factors.of(seed, terms[0].step, terms[0].query)
            return (step.parts, step.vs, ("step", step.number)), terms[0].coeffs * scale
        for place, term in enumerate(terms):
            step = factors.of(seed, term.step, term.query)
            _, us = factors.add(0, term.coeffs * scale, step.flat, first=True)
            factors.place((us, step.vs), place, len(terms))
        return (*factors.side_by_side(len(terms)), ("joined", len(terms))), bucket.ones

    @staticmethod
    def _no_basis(p: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left, right

    @staticmethod
    def _scale(bucket: Bucket, factors: Factors) -> Vector:
        ranks = [rank for _, rank in factors.v_shapes]  # 1 for vectors
        return constant([1 / math.sqrt(rank) for rank in ranks], bucket.device)
