"""Steps along the matrix sign of an estimate: ZO-Muon."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.exact import exact_product
from zo_fused.directions.factors import Factors, Flat
from zo_fused.directions.left_basis import LeftBasis
from zo_fused.directions.low_rank import LowRank
from zo_fused.directions.orthonormal import RankDeficient, orthonormal
from zo_fused.rules.factor_momentum import FactorMomentum
from zo_fused.step.rule import Update
from zo_fused.sweeps.arithmetic import square_root

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(FactorMomentum):
    """``theta = (1 - lr weight_decay) theta - lr P msign(M)``, where M (rank, n) is the mean of
    ``g Psi`` over a step's queries, or its moving average as in `FactorMomentum`, of which M^T is
    the factor. One-dimensional parameters: SGD.

    ``msign(M) = (M M^T)^(-1/2) M`` by five steps of Newton-Schulz with the coefficients of Muon:
    singular values end between 0.7 and 1.2.

    With ``sign="power"`` (ZO-MOPI, arXiv 2605.09034) it is ``U V^T`` of a step of the power
    iteration, ``V = qr(M^T (M V))`` and U the columns of M V, each divided by its length, from the
    V of the step before (at first of M^T itself), which the state has: ``right_vectors``, float32
    (n, rank) a matrix. A V that has no such successor, as of M = 0, stays.

    Args:
        momentum: whether M is a moving average. If not, there is no state.
        sign: whether it is M or its sign, and how that is made: False, True, or "power".
    """

    takes = (LeftBasis,)
    not_capturable = "the number of the step is the host's"

    def __init__(self, momentum: bool, sign: bool | str) -> None:
        self.momentum = momentum
        self.sign = sign
        if sign == "power":
            self.names = self.together = (*self.names, "right_vectors")

    def averages(self, update: Update, factors: Factors, state: dict[Any, Any]) -> Flat:
        if self.momentum:
            return super().averages(update, factors, state)
        return update.bucket.once("mean", lambda: factors.buffer(factors.shapes))

    def to_window(
        self, update: Update, direction: LowRank, moments: list[Tensor], state: dict[Any, Any]
    ) -> None:
        if self.momentum:
            super().to_window(update, direction, moments, state)

    def factor(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> Tensor:
        mean = super().factor(update, direction, state)
        if not self.sign:
            return mean
        bucket, factors = update.bucket, direction.factors(update.bucket)
        flat, signs = bucket.once("signs", lambda: factors.buffer(factors.shapes))
        flat.copy_(mean)
        matrices = [part for p, part in zip(bucket.params, signs, strict=True) if p.dim() >= 2]
        if self.sign == "power":
            _, (_, rights) = self.gathered(update, factors, state)
            moving = bool(update.finite)
            of_matrices = [v for p, v in zip(bucket.params, rights, strict=True) if p.dim() >= 2]
            for part, right in zip(matrices, of_matrices, strict=True):
                part.copy_(power_sign(part, right, moving))
            return flat
        same: defaultdict[int, list[Tensor]] = defaultdict(list)
        for part in matrices:
            same[part.shape[1]].append(part)
        for parts in same.values():
            grams = torch.stack([exact_product(part.T, part, parts=2) for part in parts])
            for part, root in zip(parts, inverse_roots(grams), strict=True):
                part.copy_(exact_product(part, root, parts=2))
        return flat


def power_sign(m: Tensor, right: Tensor, moving: bool) -> Tensor:
    """``V U^T`` of M^T (n, r) after a step of the power iteration, bit for bit the same on every
    device; 0 of 0.

    Args:
        right: V (n, r), zero at first; what it becomes, if it is moving.
    """
    start = right if bool(right.any()) else m
    try:
        forth = exact_product(m.T, start, parts=2)
        v = orthonormal(exact_product(m, forth, parts=2).float())
    except RankDeficient:
        v = start
    if moving and v is not m:
        right.copy_(v)
    u = exact_product(m.T, v, parts=2)
    ones = torch.ones((1, len(u)), dtype=torch.float64, device=u.device)
    lengths = square_root(exact_product(ones, u * u, parts=2))
    u = torch.where(lengths > 0, u / lengths, 0.0)
    return exact_product(v, u.T, parts=2).float()


def inverse_roots(grams: Tensor) -> Tensor:
    """About ``A^(-1/2)`` of positive semi-definite matrices [.., r, r], float64; 0 of 0.

    Newton-Schulz of a matrix M is a polynomial in ``A = M M^T`` times M, and all such polynomials
    commute: ``M_k = T_k M`` with ``T_k`` [r, r]. Nothing of the size of M is iterated, and the
    result has the same bits on every device.
    """
    a, b, c = COEFFICIENTS
    one = torch.eye(grams.shape[-1], dtype=torch.float64, device=grams.device)
    diagonal = grams.diagonal(dim1=-2, dim2=-1)
    trace = exact_product(diagonal[..., None, :], torch.ones_like(diagonal)[..., None], parts=2)
    trace = torch.where(trace > 0, trace, 1.0)
    now, root = grams / trace, one / square_root(trace)  # T_k A T_k, T_k
    for _ in range(ITERATIONS):
        square = exact_product(now, now, parts=2)
        step = a * one + b * now + c * square
        root = exact_product(step, root, parts=2)
        now = exact_product(step, exact_product(step, now, parts=2), parts=2)
    return root
