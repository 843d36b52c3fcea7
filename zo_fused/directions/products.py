"""Products of tall and small matrices, bit for bit the same on every device.

A matrix product of a library sums in an order of its own, another on every device. Here sums over
the long side are made of integers, which add up to the same in any order, and those over the short
side run in a fixed order in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 2.0**40  # |a * b| < 44, so 2**17 rows sum below 2**63
ROWS = 1 << 17


def gram(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b`` of tall matrices, float64 [columns of a, columns of b], every product of elements
    rounded to a multiple of ``1 / GRID``.

    Args:
        a, b: float32 or float64 with the same number of rows, ``|a_ij b_ik| < 44``.
    """
    parts = max(1, -(-len(a) // ROWS))
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for left, right in zip(a.chunk(parts), b.chunk(parts), strict=True):
        right = right.double()
        for q, column in enumerate(left.double().unbind(1)):
            terms = column[:, None] * right * GRID
            total[q] += terms.round().to(torch.int64).sum(0).double() / GRID
    return total


def product(tall: Tensor, small: Tensor) -> Tensor:
    """``tall @ small``, float64. The number of columns of `tall` is small. Leading dimensions are a
    batch: many matrices cost as many operations as one."""
    shape = (*tall.shape[:-1], small.shape[-1])
    total = torch.zeros(shape, dtype=torch.float64, device=tall.device)
    for column, row in zip(tall.unbind(-1), small.double().unbind(-2), strict=True):
        total += column[..., None].double() * row[..., None, :]
    return total


def small_product(tall: Tensor, small: Tensor) -> Tensor:
    """`product`, rounded to float32."""
    return product(tall, small).float()
