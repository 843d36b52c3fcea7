"""z of independent elements: MeZO and all methods with dense directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_fused.noise.keys import Stream, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction, Sweep, Term
from zo_fused.step.vectors import Vector, float32, table
from zo_fused.sweeps import operators


class Dense(Direction):
    """z of independent elements, one stream a query (MeZO, arXiv 2305.17333, algorithm 1)."""

    def length(self, seed: int, term: Term) -> float:
        """z is this number times elements of the distribution. A method may draw it anew in each
        step (`zo_fused.methods.kerzoo`)."""
        return 1.0

    def not_sharded(self) -> str:
        return ""

    def keys(self, seed: int, terms: Sequence[Term], device: torch.device) -> Tensor:
        """The stream keys of the z of terms, int64 [len(terms)]."""
        purposes = (Purpose.PROBE if term.probe else Purpose.DENSE for term in terms)
        streams = [
            Stream(purpose, term.step, query=term.query)
            for purpose, term in zip(purposes, terms, strict=True)
        ]
        return stream_keys(seed, streams, device)

    def stretched(self, seed: int, terms: Sequence[Term], values: Sequence[Vector]) -> list[Vector]:
        """What belongs to each z, for sweeps that draw the elements alone."""
        lengths = [self.length(seed, term) for term in terms]
        pairs = zip(values, lengths, strict=True)
        return [value if length == 1.0 else value * length for value, length in pairs]

    def sweep(self, sweep: Sweep) -> None:
        bucket, seed, terms, decay, rounding = sweep
        keys = self.keys(seed, terms, bucket.device)
        coeffs = table(self.stretched(seed, terms, [term.coeffs for term in terms]))
        bucket.prepared("dense_")(keys, coeffs, float32(decay), rounding, **self.options)

    def drawn(self, bucket: Bucket, seed: int, term: Term) -> list[Tensor]:
        """z of a query for every parameter, in its dtype."""
        key = self.keys(seed, [term], bucket.device)
        length, made = self.length(seed, term), []
        for row, p in enumerate(bucket.params):
            z = torch.empty(p.shape, dtype=torch.float32, device=p.device)
            where = slice(row, row + 1)
            operators.normal_([z], bucket.ids[where], bucket.offsets[where], key, self.transform)
            made.append((z if length == 1.0 else z * length).to(p.dtype))
        return made
