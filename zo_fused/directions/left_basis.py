"""z = P Psi with an orthonormal P on the left: ZO-Muon."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from zo_fused.directions.factored.direction import Factored
from zo_fused.directions.factors import Factors, Pair
from zo_fused.directions.forms import Form
from zo_fused.directions.low_rank import LowRank
from zo_fused.directions.orthonormal import orthonormal
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Term
from zo_fused.step.vectors import Vector
from zo_fused.sweeps.arguments import matrix_shape

PSI = Form(Purpose.RIGHT, lambda n, rank: (n, rank), clipped=True, right=Purpose.LEFT)


class LeftBasis(LowRank):
    """``z = P Psi`` for a parameter seen as (m, n): P (m, rank) with orthonormal columns, uniform
    (Haar), from stream (left, step // interval); Psi^T (n, rank) from stream (right, step, query).
    The rank is no more than m and n. One-dimensional parameters get dense noise.

    Seen from the other side, ``z^T = Psi^T P^T`` is `LowRank` with U = Psi^T and V = P.
    """

    def factors(self, bucket: Bucket) -> Factors:
        make = partial(LeftFactors, bucket, self.form, self.basis, self.options)
        return bucket.once("factors", make)

    @property
    def form(self) -> Form:
        return PSI

    def square(self, n: int) -> float:
        return 1.0

    def product(
        self, bucket: Bucket, seed: int, terms: Sequence[Term]
    ) -> tuple[tuple[list[Tensor], list[Tensor], Any], Vector]:
        (us, vs, key), coeffs = super().product(bucket, seed, terms)
        return (*self.turned(bucket, us, vs), key), coeffs

    def turned(self, bucket: Bucket, us: list[Tensor], vs: list[Tensor]) -> Pair:
        of_matrix = [p.dim() >= 2 for p in bucket.params]
        left = [v if turn else u for u, v, turn in zip(us, vs, of_matrix, strict=True)]
        right = [u if turn else v for u, v, turn in zip(us, vs, of_matrix, strict=True)]
        return left, right


class BesideLeftBasis(Factored, LeftBasis):
    """`LeftBasis` with sums of Psi that are kept beside the weights."""


class LeftFactors(Factors):
    """U = Psi^T of a query and V = P of a window."""

    @staticmethod
    def sides(p: Tensor) -> tuple[int, int]:
        m, n = matrix_shape(p)
        return n, m

    def shape_window(self, vs: list[Tensor]) -> None:
        for v in vs:
            v.copy_(orthonormal(v))
