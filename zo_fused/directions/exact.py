"""Products of large matrices that have the same bits on every device, in any order of summation."""

from __future__ import annotations

import torch
from torch import Tensor

MANTISSA = 53  # bits that float64 has


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, float64, of matrices or batches of them.

    Both are rounded to integers of ``(53 - log2 k) / 2`` bits (20 for sums over k = 8192 products)
    times a power of two, so that float64 holds every sum of products exactly. Nothing is rounded
    in the product then, whoever computes it. An entry is off by about 2^-bits of the product of
    the largest entries of both, times sqrt(k).
    """
    bits = (MANTISSA - (a.shape[-1] - 1).bit_length()) // 2
    return _rounded(a, bits) @ _rounded(b, bits)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """To integers of so many bits times a power of two, which is that of the matrix."""
    _, exponent = torch.frexp(x.abs().amax((-2, -1), keepdim=True))
    # 2^e from its bits: no device rounds that
    power = bits - exponent.to(torch.int64).clamp(-900, 900)
    scale = ((power + 1023) << 52).view(torch.float64)
    return (x.double() * scale).round_().div_(scale)
