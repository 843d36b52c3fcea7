"""Products of large matrices that have the same bits on every device, in any order of summation."""

from __future__ import annotations

import torch
from torch import Tensor

MANTISSA = 53  # bits that float64 has


def exact_product(a: Tensor, b: Tensor, parts: int = 1) -> Tensor:
    """``a @ b``, float64, of matrices or batches of them.

    Both are rounded to integers of ``(53 - log2 k) / 2`` bits (20 for sums over k = 8192 products)
    times a power of two, so that float64 holds every sum of products exactly. Nothing is rounded
    in the product then, whoever computes it. An entry is off by about 2^-bits of the product of
    the largest entries of both, times sqrt(k).

    Args:
        parts: 1; or 2: both are sums of two such matrices, and bits are twice as many, for the
            threefold price.
    """
    bits = (MANTISSA - (a.shape[-1] - 1).bit_length()) // 2
    left, right = _rounded(a, bits, parts), _rounded(b, bits, parts)
    total = left[0] @ right[0]
    if parts == 2:  # the product of the small parts would be below the last bit
        total += left[0] @ right[1]
        total += left[1] @ right[0]
    return total


def _rounded(x: Tensor, bits: int, parts: int) -> list[Tensor]:
    """``x`` as a sum of matrices, each of integers of so many bits times a power of two."""
    rest, found = x.double(), []
    for _ in range(parts):
        _, exponent = torch.frexp(rest.abs().amax((-2, -1), keepdim=True))
        # 2^e from its bits: no device rounds that
        power = bits - exponent.to(torch.int64).clamp(-900, 900)
        scale = ((power + 1023) << 52).view(torch.float64)
        found.append((rest * scale).round_().div_(scale))
        rest = rest - found[-1]
    return found
