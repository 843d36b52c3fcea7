"""Derives the two constants of the transform "hadamard" (docs/noise.md), and what it can't do.

Every y is a sum of 16 independent bytes less their mean, so its distribution is known: the uniform
one, 16 times convolved with itself. LINEAR and CUBIC make variance and kurtosis of
``z = y (LINEAR + CUBIC y^2)`` those of a Gaussian. Prints them, further moments and the tails.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import fsolve
from scipy.stats import norm


def distribution(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of a sum of so many bytes less their mean, and their probabilities."""
    chances = np.ones(1)
    for _ in range(count):
        chances = np.convolve(chances, np.full(256, 1 / 256))
    return np.arange(len(chances)) - 255 * count / 2, chances


def constants() -> tuple[float, float]:
    y, chances = distribution(16)
    scale = np.sqrt(16 * (256**2 - 1) / 12)

    def lacks(x: np.ndarray) -> list[float]:
        z = y / scale * (x[0] + x[1] * (y / scale) ** 2)
        return [chances @ z**2 - 1, chances @ z**4 - 3]

    linear, cubic = fsolve(lacks, [1.0, 0.0], xtol=1e-15)
    return linear / scale, cubic / scale**3


def main() -> None:
    linear, cubic = map(np.float32, constants())
    print("LINEAR", float(linear).hex(), "CUBIC", float(cubic).hex())
    y, chances = distribution(16)
    z = y * (float(linear) + float(cubic) * y**2)
    for power, gaussian in ((2, 1), (4, 3), (6, 15), (8, 105)):
        print(f"E z^{power} = {chances @ z**power:.7f}, of a Gaussian {gaussian}")
    for t in (1, 2, 3, 4, 5, 6):
        ratio = chances @ (abs(z) > t) / (2 * norm.sf(t))
        print(f"P(|z| > {t}) is {ratio:.4f} of a Gaussian's")
    print(f"largest |z| {abs(z).max():.3f}")


if __name__ == "__main__":
    main()
