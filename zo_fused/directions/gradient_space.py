"""The space of a gradient that probes have estimated, without ever having the estimate in memory.

``G^ = sum of c_j Z_j`` of a matrix (m, n), where Z_j is the z of probe j, is made anew from its
seed in panels of rows, whenever it is multiplied with something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_fused.directions.exact import exact_product
from zo_fused.directions.orthonormal import cholesky_qr, orthonormal
from zo_fused.noise.keys import Stream, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.sweeps import operators
from zo_fused.sweeps.conversions import int64_tensor

WORKSPACE = 64 << 20  # bytes of a panel, in float32 and in float64
# Where 100 probes look for a gradient of rank 3 in 48 x 48 weights, a space of rank 8 holds 0.91 of
# what the leading singular vectors of G^ hold of the gradient; with one iteration 0.85.
POWER_ITERATIONS = 2


class Space(NamedTuple):
    """``G^ ~ length U S V^T``, float32."""

    u: Tensor  # (m, r), orthonormal columns
    s: Tensor  # (r, r), of Frobenius norm 1; it may lie on the host
    v: Tensor  # (n, r), orthonormal columns
    length: float


class Estimate:
    """``G^ = sum of c_j Z_j`` of a parameter, seen as a matrix (m, n).

    Args:
        shape: m and n.
        id_: the parameter's, as `Bucket.id_list` has it.
        seed, step: whose probes they are.
        grads: c_j, what the probes found. G^ is theirs up to a factor: the largest c_j is taken to
            be 1.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        id_: int,
        seed: int,
        step: int,
        grads: Sequence[float],
        device: torch.device,
    ) -> None:
        self.shape = shape
        self._id = int64_tensor([id_])
        streams = [Stream(Purpose.PROBE, step, query=probe) for probe in range(len(grads))]
        self._keys = stream_keys(seed, streams, device)
        largest = max(map(abs, grads)) or 1.0
        self._coeffs = torch.tensor(
            [[c / largest for c in grads]], dtype=torch.float32, device=device
        )
        self._one = torch.ones(1, dtype=torch.float32, device=device)

    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of G^, float32, one panel after the other, in memory that the next one overwrites.
        They are the bits of a sweep over all of it."""
        m, n = self.shape
        rows = max(1, WORKSPACE // (12 * n))
        memory = torch.empty(min(rows, m), n, dtype=torch.float32, device=self._keys.device)
        for first in range(0, m, rows):
            panel = memory[: min(rows, m - first)].zero_()
            offset = int64_tensor([first * n])
            operators.dense_([panel], self._id, offset, self._keys, self._coeffs, self._one)
            yield slice(first, first + len(panel)), panel

    def times(self, right: Tensor) -> Tensor:
        """``G^ right``, float32 (m, r)."""
        return torch.cat([exact_product(panel, right) for _, panel in self.panels()]).float()

    def transposed_times(self, left: Tensor) -> Tensor:
        """``G^T left``, float32 (n, r)."""
        total = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64, device=left.device)
        for rows, panel in self.panels():
            total += exact_product(panel.T, left[rows])
        return total.float()


def space_of(estimate: Estimate, test: Tensor) -> Space:
    """The leading singular vectors of G^, up to rotations among them, and its core there: a
    randomized range finder with two power iterations (Halko, Martinsson, Tropp 2011, algorithm
    4.4). Six passes over panels, no SVD; the same bits on every device.

    With U of all columns that matter, ``S = U^T G^ V``. Where the rank is that of a full side, the
    side has the unit vectors for a basis.

    Args:
        test: normals (n, r), with r at most m and n.
    """
    m, n = estimate.shape
    rank, device = test.shape[1], test.device
    if rank == m:
        u = torch.eye(m, dtype=torch.float32, device=device)
    else:
        u = orthonormal(estimate.times(test))
        for _ in range(POWER_ITERATIONS):
            v = orthonormal(estimate.transposed_times(u))
            u = orthonormal(estimate.times(v))
    back = estimate.transposed_times(u)  # G^T U = V R
    if rank == n:
        v, upper = torch.eye(n, dtype=torch.float32, device=device), back
    else:
        v, upper = cholesky_qr(back)
    length = math.sqrt(math.fsum(x * x for x in upper.flatten().tolist()))
    return Space(u, (upper.T / length).float(), v, length)
