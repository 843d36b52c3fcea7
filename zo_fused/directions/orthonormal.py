"""Orthonormal columns by CholeskyQR, bit for bit the same on every device.

LAPACK's QR has other bits on every device, and signs that make Q anything but Haar distributed.
``Y = Q R`` with ``R^T R = Y^T Y``, R upper triangular with a positive diagonal, has neither
problem: of N(0, 1) elements its Q is exactly Haar.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zo_fused.directions.products import GRID, gram, product

Matrix = npt.NDArray[np.float64]  # on the host

PASSES = 5  # three do for all that is not refused
LEAST = 2.0**-30
ENOUGH = 2.0**16


class RankDeficient(ValueError):
    """A matrix has columns that depend on each other, so it has no Q."""


def orthonormal(y: Tensor) -> Tensor:
    """Q of `cholesky_qr`."""
    return cholesky_qr(y)[0]


def cholesky_qr(y: Tensor) -> tuple[Tensor, Tensor]:
    """``Y = Q R``: Q^T Q is the identity to about 2^-23, R upper triangular, its diagonal positive.

    One pass makes ``Q = Y R^-1`` from the Cholesky factor of the Gram matrix, which squares the
    condition of Y (Yamamoto et al. 2015). A pass whose error could be seen in float32 is followed
    by another, and where the Gram matrix is indefinite for its rounding, its diagonal is shifted
    (Fukaya et al. 2020): one pass for tall normal Y, two or three for square or dependent ones.

    Sums over rows run on a grid of integers (`gram`), all others in a fixed order in float64; the
    Cholesky factor is made on the host, which waits for the device.

    Args:
        y: float32 (n, r), n >= r.

    Returns:
        Q, float32 (n, r), on the device of Y. R, float64 (r, r), on the host.

    Raises:
        RankDeficient: a column lies within 2^-30 of its length (or so) of the span of those before
            it, or there are more columns than rows. Columns that only the rounding of float32 sets
            apart are not refused.
        ValueError: Y is not finite.
    """
    n, rank = y.shape
    if n < rank:
        raise RankDeficient(f"{rank} columns of {n} rows depend on each other")
    q, total = y.double(), torch.eye(rank, dtype=torch.float64, device="cpu")
    for _ in range(PASSES):
        up = _powers_of_two(q)
        q = q * up.to(q.device)
        r, inverse = _factor(gram(q, q).cpu(), shift=n * rank / GRID)
        q = product(q, inverse.to(q.device))
        total = product(r / up, total)
        lengths = total.abs().amax(0)
        if bool((total.diagonal() < LEAST * lengths).any()):
            break
        # Elements of the Gram matrix are off by n / (2 GRID) at most, and those of Q^T Q by what
        # R^-1 makes of that.
        if n * rank * float(inverse.abs().max()) ** 2 < ENOUGH:
            return q.float(), total
    raise RankDeficient(f"columns of a matrix {tuple(y.shape)} depend on each other")


def _powers_of_two(q: Tensor) -> Tensor:
    """What takes the largest element of each column to [2, 4), float64 [r], on the host."""
    largest = q.abs().amax(0).tolist()
    if not all(map(math.isfinite, largest)):
        raise ValueError(f"a matrix {tuple(q.shape)} whose columns are wanted is not finite")
    if not all(largest):
        raise RankDeficient(f"a column of a matrix {tuple(q.shape)} is zero")
    powers = [2.0 ** (2 - math.frexp(value)[1]) for value in largest]
    return torch.tensor(powers, dtype=torch.float64, device="cpu")


def _factor(square: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factor R and R^-1 of a matrix that is off by `shift` / 2 at most; of the matrix
    with `shift` on its diagonal if otherwise a pivot would be as small."""
    known = square.numpy()
    r = _cholesky(known, shift)
    if r is None:
        r = _cholesky(known + shift * np.eye(len(known)), 0.0)
        assert r is not None  # the shift makes it positive definite
    return torch.from_numpy(r), torch.from_numpy(_inverse(r))


# Single operations of NumPy in a fixed order, each of which IEEE 754 rounds, the square root too:
# torch's may be MKL's, which is another on other processors.


def _cholesky(square: Matrix, least: float) -> Matrix | None:
    """R, or None if a pivot is not above `least`."""
    rest, r = square.copy(), np.zeros_like(square)
    for k, pivot in enumerate(rest.diagonal()):  # a view: it changes with the rest
        if not pivot > least:
            return None
        r[k, k:] = rest[k, k:] / np.sqrt(pivot)
        rest[k + 1 :, k + 1 :] -= r[k, k + 1 :, None] * r[k, k + 1 :]
    return r


def _inverse(r: Matrix) -> Matrix:
    """Of an upper triangular matrix, by back substitution."""
    inverse = np.eye(len(r))
    for k in reversed(range(len(r))):
        inverse[k] /= r[k, k]
        inverse[:k] -= r[:k, k, None] * inverse[k]
    return inverse
