"""What a low-rank z is made of: coordinates, drawn for every query, in a basis of the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_fused.directions.products import small_product
from zo_fused.noise.streams import Purpose


@dataclass(frozen=True)
class Form:
    """The z of a matrix (m, n) is ``U V^T``, U made of coordinates. What is linear in z is a sum of
    coordinates: updates, momentum, perturbations beside the weights.

    Attributes:
        purpose: the stream of the coordinates.
        right: that of V.
        shape: of the coordinates, from m and the rank.
        lift: U (m, rank) from Q (m, rank) and coordinates, also of batches; None: the coordinates
            are U, and there is no Q.
        clipped: whether the rank of a matrix is ``min(rank, m, n)``, as orthonormal columns need.
    """

    purpose: Purpose
    shape: Callable[[int, int], tuple[int, int]]
    lift: Callable[[Tensor, Tensor], Tensor] | None = None
    clipped: bool = False
    right: Purpose = Purpose.V


FACTOR = Form(Purpose.U, lambda m, rank: (m, rank))
CORE = Form(Purpose.CORE, lambda m, rank: (rank, rank), small_product, clipped=True)
DIAGONAL = Form(Purpose.CORE, lambda m, rank: (1, rank), torch.mul)
