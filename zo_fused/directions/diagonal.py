"""z = U diag(tau) V^T: TeZO."""

from __future__ import annotations

import math

from torch import Tensor

from zo_fused.directions.factored.direction import Factored
from zo_fused.directions.forms import DIAGONAL, Form
from zo_fused.directions.low_rank import LowRank


class Diagonal(LowRank):
    """``z = s U diag(tau) V^T``: U (m, rank) and V (n, rank) for a window of ``interval`` steps,
    tau (rank) fresh every step.

    All N(0, 1), from the streams (left, window), (V, window) and (core, step, query).
    One-dimensional parameters get dense noise.

    Args:
        scale: whether s is ``1 / sqrt(rank)``, so that elements of z have variance 1, else 1.
    """

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.scale = scale

    @property
    def form(self) -> Form:
        return DIAGONAL

    def not_sharded(self) -> str:
        return ""

    def basis(self, p: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left * (1 / math.sqrt(left.shape[1])) if self.scale else left, right


class BesideDiagonal(Factored, Diagonal):
    """`Diagonal` with coefficients of tau that are kept beside the weights."""

    def not_sharded(self) -> str:
        return super().not_sharded()
