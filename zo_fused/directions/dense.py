"""z of independent elements: MeZO and all methods with dense directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zo_fused.checks import choice
from zo_fused.noise.keys import Stream, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction, Term
from zo_fused.step.vectors import Vector, float32, table

DISTRIBUTIONS = {"gaussian": "portable", "rademacher": "rademacher"}  # and their transforms


class Dense(Direction):
    """z of independent elements, one stream a query (MeZO, arXiv 2305.17333, algorithm 1).

    Args:
        distribution: "gaussian", N(0, 1), or "rademacher", -1 or 1.
    """

    def __init__(self, distribution: str = "gaussian") -> None:
        self._transform = DISTRIBUTIONS[choice("distribution", distribution, DISTRIBUTIONS)]

    @property
    def options(self) -> dict[str, Any]:
        return {} if self._transform == "portable" else {"transform": self._transform}

    def sweep(
        self,
        bucket: Bucket,
        seed: int,
        terms: Sequence[Term],
        decay: Vector,
        rounding: Tensor | None = None,
    ) -> None:
        streams = [Stream(Purpose.DENSE, term.step, query=term.query) for term in terms]
        keys = stream_keys(seed, streams, bucket.device)
        coeffs = table([term.coeffs for term in terms])
        bucket.sweep("dense_")(keys, coeffs, float32(decay), rounding, **self.options)
