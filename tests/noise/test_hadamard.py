"""The transform "hadamard": its definition in other words, and what its exact distribution is."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from zo_fused import noise
from zo_fused.noise import Purpose, derive_key, parameter_id
from zo_fused.noise.reference import CUBIC, LINEAR

NOISE_MD = Path(__file__).parents[2] / "docs" / "noise.md"

HADAMARD = scipy.linalg.hadamard(16)


def distribution(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The values of a sum of so many random bytes less their mean, and their probabilities."""
    chances = np.ones(1)
    for _ in range(count):
        chances = np.convolve(chances, np.full(256, 1 / 256))
    return np.arange(len(chances)) - 255 * count / 2, chances


def near_normal(y: np.ndarray) -> np.ndarray:
    """In float64."""
    return y * (LINEAR + CUBIC * y**2)


@pytest.mark.parametrize("tile", [0, 7, 2**33])
def test_it_is_a_hadamard_transform_of_the_bytes_of_a_counter(tile: int) -> None:
    """Against float64: square, sum and product of the cubic are rounded by 2^-24 each at most."""
    key, id_ = derive_key(42, Purpose.DENSE, 7), parameter_id("a.weight")
    z = noise.normal(128, key, id_, 128 * tile, transform="hadamard").view(2, 8, 8)
    words = noise.random_bits(32, key, id_, 32 * tile).view(8, 4).numpy()
    for n in range(8):
        low = [(w >> shift) & 255 for w in words[n] for shift in (0, 8)]
        high = [(w >> shift) & 255 for w in words[n] for shift in (16, 24)]
        wanted = near_normal(HADAMARD @ (np.array(low + high) - 127.5))
        got = torch.cat([z[0, n], z[1, n]]).double().numpy()
        assert np.allclose(got, wanted, rtol=3 * 2.0**-24, atol=0)


def test_vectors_of_the_documentation() -> None:
    key = derive_key(42, Purpose.DENSE, 7)
    id_ = parameter_id("model.decoder.layers.0.fc1.weight")
    for offset, documented in (
        (0, "3ecc2a7c be05c1a2 beffb7a7 3fa97f75 3f528d04 bfa7c08c bf0be576 bf911cd0"),
        (62, "bf06bc91 bdd4a236 bea9d2ba 3e4a5d72 3b5b7c07 bfc3c3a6"),
        (2**36 - 2, "bf7a5354 be6cad16 3fa59223 3fdcdec6"),
    ):
        z = noise.normal(len(documented.split()), key, id_, offset, transform="hadamard")
        bits = z.view(torch.int32).tolist()
        assert [f"{b & 0xFFFFFFFF:08x}" for b in bits] == documented.split()


def test_constants_of_the_documentation() -> None:
    found = re.search(r"fma\(y \* y, (\w{8}), (\w{8})\)", NOISE_MD.read_text(encoding="utf-8"))
    assert found is not None
    cubic, linear = (struct.unpack(">f", bytes.fromhex(word))[0] for word in found.groups())
    assert (cubic, linear) == (CUBIC, LINEAR)


def test_moments_and_tails_are_those_of_a_gaussian() -> None:
    """Sums over all values of y: there is nothing random here."""
    y, chances = distribution(16)
    assert (len(y), y[-1]) == (4081, 2040)
    z = near_normal(y)
    for power, wanted, tolerance in ((2, 1, 2e-8), (4, 3, 1e-7), (6, 15, 0.03), (8, 105, 0.8)):
        assert chances @ z**power == pytest.approx(wanted, abs=tolerance)
    for t, low, high in ((1, 0.999, 1.001), (2, 0.998, 1.0), (3, 1.0, 1.002), (4, 0.92, 0.93)):
        assert low < chances @ (abs(z) > t) / (2 * scipy.stats.norm.sf(t)) < high
    assert abs(z).max() == pytest.approx(7.9537, abs=1e-4)


def test_two_elements_of_a_counter_are_uncorrelated() -> None:
    """``y_i = u + v`` and ``y_j = u - v``: u sums the eight bytes whose signs agree, v the
    other eight. Over all pairs of u and v E[z_i z_j] is exact. Squares are not
    independent: the norm of a counter's sixteen elements varies less than that of Gaussians."""
    u, chances = distribution(8)
    z_i = near_normal(u[:, None] + u[None, :])
    z_j = near_normal(u[:, None] - u[None, :])
    weights = chances[:, None] * chances[None, :]
    assert abs((weights * z_i * z_j).sum()) < 1e-12
    covariance = (weights * z_i**2 * z_j**2).sum() - 1
    # The variance of a block's norm in units of a chi-square's, 2 * 16.
    assert (16 * 2 + 16 * 15 * covariance) / 32 == pytest.approx(0.41, abs=0.01)


def test_samples_follow_that_distribution() -> None:
    n = 1 << 20
    y, chances = distribution(16)
    grid = near_normal(y)
    between, below = (grid[1:] + grid[:-1]) / 2, np.cumsum(chances)
    for seed in range(4):
        z = noise.normal(n, derive_key(seed, Purpose.DENSE, 7), seed, transform="hadamard").numpy()
        # (Of a discrete distribution Kolmogorov's statistic is smaller than of a continuous one.)
        counts = np.bincount(np.searchsorted(between, z), minlength=len(grid))
        distance = abs(np.cumsum(counts) / n - below).max()
        assert distance < scipy.stats.kstwobign.isf(1e-4) / math.sqrt(n)


def test_blocks_are_independent_of_each_other() -> None:
    """Values and squares of neighbouring counters, halves of tiles and tiles."""
    n = 1 << 19
    key = derive_key(0, Purpose.DENSE)
    z = noise.normal(2 * n, key, transform="hadamard").double()
    tiles = z.view(-1, 2, 8, 8)
    rows = [
        tiles[:, 0, 0, 0], tiles[:, 0, 1, 0], tiles[:, 1, 1, 0], tiles[:, 0, 2, 0],
        tiles[:, 1, 7, 7], tiles.roll(-1, 0)[:, 0, 0, 0], tiles.roll(-1, 0)[:, 1, 0, 7],
    ]  # fmt: skip
    for values in (torch.stack(rows), torch.stack(rows) ** 2 - 1):
        correlation = torch.corrcoef(values).fill_diagonal_(0)
        assert correlation.abs().max() < 5 / math.sqrt(len(rows[0]))
