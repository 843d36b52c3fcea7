"""Derives the coefficients of the portable normal transform (docs/noise.md).

Each polynomial is the minimax fit (Lawson's iteratively reweighted least squares) of a smooth
function on the interval that the transform reaches, under the weight that turns its error into an
error of z. Prints float32 bits, constant term first, and the largest error of each fit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]

# In units of the transform: t = 2**23 * -log2(u), and r = sqrt(-ln u).
LOG_SCALE = 2.0**23
SQRT_SCALE = np.sqrt(np.log(2) / LOG_SCALE)
RSQRT_MAGIC = 0x5F200000


def minimax(
    f: Function, low: float, high: float, powers: range, weight: Function, rounds: int = 3000
) -> tuple[np.ndarray, float]:
    """Coefficients c of `powers` that minimise max |weight * (sum c x**k - f)|, and the maximum."""
    angles = np.pi * (np.arange(4000) + 0.5) / 4000
    x = (low + high) / 2 + (high - low) / 2 * np.cos(angles)
    scale = weight(x)
    matrix = np.stack([x**k for k in powers], axis=1) * scale[:, None]
    target = f(x) * scale
    emphasis = np.ones_like(x)
    best: tuple[np.ndarray, float] = (np.zeros(len(powers)), np.inf)
    for _ in range(rounds):
        root = np.sqrt(emphasis)
        c = np.linalg.lstsq(matrix * root[:, None], target * root, rcond=None)[0]
        error = np.abs(matrix @ c - target)
        if error.max() < best[1]:
            best = (c, float(error.max()))
        emphasis *= error
        emphasis /= emphasis.sum()
    return best


def log_correction() -> tuple[np.ndarray, float]:
    """L(v): log2(1.5 + v) - (0.5 + v) = w(v) * h(v) with w = 1/4 - v^2. Relative error of t.

    The binade of u just below 1 is the one that counts: t is smallest there.
    """

    def h(v: np.ndarray) -> np.ndarray:
        return (np.log2(1.5 + v) - 0.5 - v) / (0.25 - v * v)

    def weight(v: np.ndarray) -> np.ndarray:
        return (0.25 - v * v) / -np.log2((1.5 + v) / 2)

    c, error = minimax(h, -0.5 + 1e-6, 0.5 - 1e-6, range(5), weight, 4000)
    return -LOG_SCALE * c, error


def rsqrt_correction() -> tuple[np.ndarray, float]:
    """R(c): c**-1/2 over the range of c = t y^2 that the bit-level guess y reaches."""
    bits = np.arange(0, 1 << 24, 16, dtype=np.uint32) + np.uint32(0x3F800000)  # t in [1, 4)
    t = bits.view(np.float32).astype(np.float64)
    y = (np.uint32(RSQRT_MAGIC) - (bits >> np.uint32(1))).view(np.float32).astype(np.float64)
    c = t * y * y
    r, error = minimax(lambda x: x**-0.5, c.min(), c.max(), range(4), np.sqrt)
    return SQRT_SCALE * r, error


def sine() -> tuple[np.ndarray, float]:
    """A(w): sin(pi/4 s) / s as a polynomial in w = s^2."""
    return minimax(
        lambda w: np.sin(np.pi / 4 * np.sqrt(w)) / np.sqrt(w), 1e-12, 1, range(3), np.sqrt
    )


def cosine() -> tuple[np.ndarray, float]:
    """B(w): cos(pi/4 s) with constant term 1."""
    c, error = minimax(
        lambda w: np.cos(np.pi / 4 * np.sqrt(w)) - 1, 1e-12, 1, range(1, 4), np.ones_like
    )
    return np.concatenate([[1.0], c]), error


def main() -> None:
    """Prints the table of docs/noise.md."""
    fits = {"L": log_correction, "R": rsqrt_correction, "A": sine, "B": cosine}
    for name, fit in fits.items():
        coefficients, error = fit()
        bits = " ".join(f"{b:08x}" for b in coefficients.astype(np.float32).view(np.uint32))
        print(f"{name}: {bits}   largest error {error:.1e}")


if __name__ == "__main__":
    main()
