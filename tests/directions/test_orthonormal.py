"""Orthonormal columns against NumPy in float64, their law, and their bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_fused.directions import products
from zo_fused.directions.orthonormal import RankDeficient, cholesky_qr, orthonormal


def normals(n: int, rank: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, rank, generator=torch.Generator().manual_seed(seed))


def off_identity(q: torch.Tensor) -> float:
    exact = q.double()
    return float((exact.T @ exact - torch.eye(q.shape[1], dtype=torch.float64)).abs().max())


def tolerance(rank: int) -> float:
    """Elements of Q are rounded to float32, by 2^-24 of their size at most: that is 2 * 2^-24 in a
    product of two unit columns, by Cauchy and Schwarz. The last pass adds ``R^-T D R^-1`` with
    |D_ij| <= n 2^-41, and it is the last because ``n rank max|R^-1|^2 < 2^16``; R^-1 has `rank`
    rows, so an element is at most ``rank^2 n 2^-41 max^2 < rank 2^-25``."""
    return 2.0**-23 + rank * 2.0**-25


def householder(y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """LAPACK's Q and R, with the signs that make the diagonal positive."""
    q, r = np.linalg.qr(y.double().numpy())
    signs = np.sign(np.diag(r))
    return q * signs, r * signs[:, None]


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 12), more=st.integers(0, 40), size=st.integers(-60, 60), seed=st.integers(0)
)
def test_q_and_r(rank: int, more: int, size: int, seed: int) -> None:
    y = normals(rank + more, rank, seed % 2**63) * 2.0**size
    q, r = cholesky_qr(y)
    assert q.dtype is torch.float32
    assert q.shape == y.shape
    assert off_identity(q) <= tolerance(rank)
    assert torch.equal(r, r.triu())
    assert bool((r.diagonal() > 0).all())
    # a residual is that of Q's rounding, 2^-24 an element, times a column of R
    error = (q.double() @ r - y.double()).norm(dim=0)
    assert bool((error <= tolerance(rank) * rank * y.double().norm(dim=0)).all())


@pytest.mark.parametrize(("n", "rank"), [(200, 1), (300, 48), (64, 64), (1000, 128)])
def test_it_is_the_q_of_numpy(n: int, rank: int) -> None:
    y = normals(n, rank)
    q, r = cholesky_qr(y)
    want, want_r = householder(y)
    condition = np.linalg.cond(y.double().numpy())
    # both are exact to their precision, and Q's sensitivity is the condition of Y
    bound = tolerance(rank) * max(1.0, condition * 2.0**-10)
    assert np.abs(q.double().numpy() - want).max() <= bound
    assert np.abs(r.numpy() - want_r).max() <= 1e-6 * np.abs(want_r).max()


def test_ill_conditioned_columns_take_more_passes() -> None:
    """Directions that are 2^-20 of the others: the Gram matrix has them at 2^-40, the grid's
    place."""
    y = normals(500, 6).double()
    y[:, 3] = y[:, 2] + 2.0**-20 * y[:, 3]
    y[:, 5] *= 2.0**-30
    y32 = y.float()
    q = orthonormal(y32)
    assert off_identity(q) <= tolerance(6)
    want = householder(y32)[0]
    # the small part of column 3 is known to 2^-53 2^20 and a few passes, that is to float32
    assert np.abs(q.double().numpy() - want).max() <= 1e-6


def test_q_is_haar() -> None:
    """All of O(3) alike: with R's diagonal positive, determinants of both signs are equally
    frequent, and elements have mean 0, variance 1/3 and fourth moment 3 / (3 * 5)."""
    count = 2000
    found = torch.stack([orthonormal(normals(3, 3, seed)) for seed in range(count)]).double()
    # 5 standard deviations of the means; LAPACK's own signs have a first element below 0 always
    assert abs(float(torch.linalg.det(found).mean())) < 5 / math.sqrt(count)
    assert bool((found.mean(0).abs() < 5 * math.sqrt(1 / 3 / count)).all())
    fourth = found.pow(4).mean(0)
    assert bool((fourth - 1 / 5).abs().max() < 5 * math.sqrt(1 / 9 / count))


def test_bits_do_not_depend_on_threads() -> None:
    y = normals(5000, 20)
    one = cholesky_qr(y)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        other = cholesky_qr(y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_the_gram_matrix_is_exact_on_the_grid() -> None:
    """Integers add up in any order: a permutation of rows changes no bit, whatever it does to a sum
    in floating point; and chunks are summed in float64, exactly while they have 53 bits."""
    y = normals(3000, 7).clamp(-4, 4)
    whole = products.gram(y, y)
    assert torch.equal(whole, products.gram(y.flip(0), y.flip(0)))
    assert torch.equal(whole, sum(products.gram(part, part) for part in y.split(1000)))
    terms = [round(a * b * 2**40) for a, b in y[:50, :2].tolist()]
    assert products.gram(y[:50], y[:50])[0, 1] == sum(terms) / 2**40


def test_taller_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ROWS", 64)
    assert off_identity(orthonormal(normals(1000, 5))) <= tolerance(5)


def test_products_of_a_batch() -> None:
    tall, small = normals(24, 5).view(4, 6, 5), normals(20, 5).view(4, 5, 5)
    want = torch.stack([products.small_product(a, b) for a, b in zip(tall, small, strict=True)])
    assert torch.equal(products.small_product(tall, small), want)
    assert torch.allclose(want, tall @ small, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_dependent_columns_are_refused(seed: int) -> None:
    y = normals(60, 5, seed)
    twice = y.clone()
    twice[:, 4] = twice[:, 1]
    mixed = y.clone()
    mixed[:, 3] = 2 * mixed[:, 0] - 0.5 * mixed[:, 2]
    mixed = (mixed * 2**10).round() / 2**10  # so that the sum is exact in float32
    mixed[:, 3] = 2 * mixed[:, 0] - 0.5 * mixed[:, 2]
    zero = y.clone()
    zero[:, 2] = 0
    for broken in (twice, mixed, zero, y.T):
        with pytest.raises(RankDeficient):
            orthonormal(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    y = normals(60, 5)
    y[7, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        orthonormal(y)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_square_draws_have_a_q(size: int) -> None:
    """The worst that is drawn: square matrices have conditions without bound."""
    worst = max(range(3000), key=lambda seed: float(np.linalg.cond(normals(size, size, seed))))
    for seed in (worst, *range(100)):
        assert off_identity(orthonormal(normals(size, size, seed))) <= tolerance(size)
