"""z = s U Z V^T in a random subspace of a window: SubZero."""

from __future__ import annotations

import math

from torch import Tensor

from zo_fused.directions.factored.direction import Factored
from zo_fused.directions.low_rank import LowRank
from zo_fused.directions.orthonormal import orthonormal
from zo_fused.sweeps.arguments import matrix_shape


class Subspace(LowRank):
    """``z = s U Z V^T``: U (m, r) and V (n, r) with orthonormal columns for a window of
    ``interval`` steps, Z (r, r) fresh every step.

    U and V are Q of N(0, 1) elements from the streams (left, window) and (V, window), by
    `cholesky_qr`, so exactly Haar distributed; Z from (core, step, query). The rank is clipped to
    min(m, n), matrix by matrix. One-dimensional parameters get dense noise.

    Args:
        scale: whether s is ``sqrt(m n) / r``, so that z has as long a mean square as dense
            directions, else 1.
    """

    has_basis = True

    def __init__(self, scale: bool = True) -> None:
        super().__init__()
        self.scale = scale

    def not_capturable(self, deferred: bool) -> str:
        return "the host makes the factors of a window orthonormal"

    def not_sharded(self) -> str:
        return ""

    def basis(self, p: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        m, n = matrix_shape(p)
        s = math.sqrt(m * n) / left.shape[1] if self.scale else 1.0
        # V with elements near 1, as the forward pass expects (`factored.direction`).
        return orthonormal(left) * (s / math.sqrt(n)), orthonormal(right) * math.sqrt(n)


class BesideSubspace(Factored, Subspace):
    """`Subspace` with cores that are kept beside the weights."""

    def not_sharded(self) -> str:
        return super().not_sharded()
