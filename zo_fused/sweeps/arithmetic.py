"""Roots and powers with the same bits on every device.

torch's are those of the library that it was built with: MKL's square roots are off by an ulp for
one float32 in five, and powers differ between instruction sets.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

BITS = 31  # of an exponent


def square_root(x: Tensor) -> Tensor:
    """The correctly rounded square root, of float32 or float64."""
    if x.device.type == "cpu":
        root = torch.empty_like(x)
        with np.errstate(invalid="ignore"):
            np.sqrt(x.numpy(), out=root.numpy())  # the processor's, as IEEE 754 wants it
        return root
    if x.dtype == torch.float32:  # torch's may be approximate there
        return x.double().sqrt().float()  # 53 bits are enough for 24 (Figueroa 1995)
    return x.sqrt()


@cache
def squares(base: float) -> list[float]:
    """``base^(2^i)`` for every bit of an exponent."""
    made = [base]
    for _ in range(BITS - 1):
        made.append(made[-1] * made[-1])
    return made


def power(base: float, exponent: int) -> float:
    """``base^exponent`` by single products in a fixed order, 0 <= exponent < 2^BITS."""
    factors = [x if exponent >> bit & 1 else 1.0 for bit, x in enumerate(squares(base))]
    while len(factors) > 1:
        half = len(factors) // 2
        pairs = zip(factors[:half], factors[half:], strict=False)
        factors = [left * right for left, right in pairs] + factors[2 * half :]
    return factors[0]


@lru_cache
def first_powers(base: float, count: int) -> tuple[float, ...]:
    """``base^0 .. base^(count - 1)``."""
    return tuple(power(base, exponent) for exponent in range(count))


def powers(of_bits: Tensor, exponents: Tensor) -> Tensor:
    """The same of tensors, on their device.

    Args:
        of_bits: the `squares` of every base, float64 [BITS, n].
        exponents: whole numbers [n].
    """
    bits = torch.arange(BITS, device=exponents.device)[:, None]
    factors = torch.where(exponents.long() >> bits & 1 == 1, of_bits, 1.0)
    while len(factors) > 1:
        half = len(factors) // 2
        paired = factors[:half] * factors[half : 2 * half]
        factors = torch.cat([paired, factors[2 * half :]])
    return factors[0]


def sum_of_columns(x: Tensor) -> Tensor:
    """The sum over the last dimension, in a fixed order."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]
