"""Directions that are shorter along an estimated curvature: LOREN."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.directions.factors import parts_of
from zo_fused.directions.panels import panels_of
from zo_fused.directions.products import GRID
from zo_fused.noise.keys import Stream, on_device, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Sweep, Term
from zo_fused.step.rule import check_state
from zo_fused.step.vectors import Vector, float32, table, vector
from zo_fused.sweeps.arguments import matrix_shape
from zo_fused.sweeps.arithmetic import square_root
from zo_fused.sweeps.conversions import int64_tensor

CURVATURE = "curvature"  # a, in the optimizer's state
FRACTION = 2.0**24  # elements of u are rounded to its inverse for sums over rows, as integers


class Curved(Dense):
    """``d = u - (1 + sqrt(rho) / s) (a . u) / |a|^2 a`` with ``s = sqrt(rho + |a|^2)``, u of
    independent elements: a reflected root of the covariance ``rho (rho I + a a^T)^-1``.

    A matrix (m, n) has one a of n numbers, the same in every row: sums run over the whole matrix.
    One-dimensional parameters have one of their own shape. At first its elements are N(0, 1) over
    the root of the number of the parameter's elements, from stream (init, 0).

    State per parameter: ``curvature``: a, float32.
    """

    def __init__(self, rho: float, distribution: str) -> None:
        super().__init__(distribution)
        self.rho = rho

    def not_capturable(self, deferred: bool) -> str:
        return "whose sums of noise are at hand is for the host to say"

    def curvature(self, bucket: Bucket, seed: int) -> Curvature:
        """a of a bucket's parameters."""
        return bucket.once(CURVATURE, lambda: Curvature(bucket, self, seed))

    def sweep(self, sweep: Sweep) -> None:
        bucket, seed, terms, decay, rounding = sweep
        row = self.curvature(bucket, seed).row(seed, terms)
        self.write(bucket, bucket.params, seed, terms, row, decay, rounding)

    def write(
        self,
        bucket: Bucket,
        tensors: Sequence[Tensor],
        seed: int,
        terms: Sequence[Term],
        row: Tensor,
        decay: Vector,
        rounding: Tensor | None = None,
        also: tuple[Vector, Sequence[Tensor]] | None = None,
    ) -> None:
        """``tensor = decay * tensor + sum of coeff * u + row``, and perhaps ``+ gain * moment``.

        Args:
            tensors: the bucket's parameters, or others like them.
            row: for every row of each, as `Curvature.row` makes it.
            also: gains and moments.
        """
        keys = self.keys(seed, terms, bucket.device)
        coeffs = table([term.coeffs for term in terms])
        curvature = self.curvature(bucket, seed)
        rows = parts_of(row.float(), curvature.shapes)
        for lot in panels_of(bucket).lots():
            for part in lot.parts:
                added = rows[part.row]
                part.panel.copy_(added.T[part.rows] if curvature.flat_rows[part.row] else added)
                if also is not None:
                    gain = float32(also[0])[part.row]
                    part.panel.add_(part.of(also[1][part.row]) * gain)
            lot.write(tensors, keys, coeffs, float32(decay), rounding, **self.options)


class Curvature:
    """a of the parameters of a bucket, flat, one after the other.

    All is computed in float64 in a fixed order, or as sums of integers, so every device has the
    same bits.

    Attributes:
        shapes: of every a, (1, n).
        flat_rows: whether the parameter is one-dimensional.
    """

    def __init__(self, bucket: Bucket, direction: Curved, seed: int) -> None:
        self._bucket, self._direction = bucket, direction
        self.flat_rows = [p.dim() < 2 for p in bucket.params]
        sizes = [p.numel() if p.dim() < 2 else matrix_shape(p)[1] for p in bucket.params]
        self.shapes = [(1, n) for n in sizes]
        owner = int64_tensor(range(len(sizes))).repeat_interleave(int64_tensor(sizes))
        self._owner = on_device(owner, bucket.device)
        counts = [p.numel() // n for p, n in zip(bucket.params, sizes, strict=True)]
        self._count = vector(counts, bucket.device)  # rows
        self._sums: dict[tuple[int, int], Tensor] = {}  # by step and query; of one step
        self._a = torch.zeros(sum(sizes), dtype=torch.float32, device=bucket.device)
        self._gather(seed)
        self._measure()

    def _gather(self, seed: int) -> None:
        """From the state, or else from the seed; the state then has parts of the flat tensor."""
        bucket, state = self._bucket, self._direction.state
        parts = parts_of(self._a, self.shapes)
        key = stream_keys(seed, [Stream(Purpose.INIT, 0)], bucket.device)
        fill = bucket.fill(parts, list(range(len(parts))), CURVATURE)
        fill(key.expand(len(parts)).contiguous())
        for p, part in zip(bucket.params, parts, strict=True):
            part *= 1 / math.sqrt(p.numel())
            if CURVATURE in state[p]:
                check_state(CURVATURE, state[p][CURVATURE], (part.numel(),), p)
                part.copy_(state[p][CURVATURE])
            state[p][CURVATURE] = part.view(-1)

    def _dot(self, one: Tensor, other: Tensor) -> Vector:
        """Inner products, a parameter each. Integers stay below 2^63 while m n < 2^38."""
        terms = (one * other * GRID).round().to(torch.int64)
        total = torch.zeros(len(self.shapes), dtype=torch.int64, device=terms.device)
        return total.index_add_(0, self._owner, terms).double() / GRID

    def _measure(self) -> None:
        """What is known of a until it changes."""
        a, count, rho = self._a.double(), self._count, self._direction.rho
        largest = torch.zeros_like(count).scatter_reduce_(0, self._owner, a.abs(), "amax")
        self._scale = torch.where(largest > 0, largest, 1.0)
        self._unit = a / self._scale[self._owner]  # at most 1
        square = count * self._dot(self._unit, self._unit)  # 0 where a is 0
        self._s = square_root(rho + self._scale * self._scale * square)
        self._mirror = math.sqrt(rho) / self._s  # a . d = -mirror a . u
        self._away = -(1 + self._mirror) / torch.where(square > 0, square, 1.0)

    def sums(self, seed: int, step: int, query: int) -> Tensor:
        """u of a query, summed over the rows, float64. They stay until another step is asked for.

        Elements are rounded to multiples of ``1 / FRACTION``: sums are exact in any order.
        """
        if any(known != step for known, _ in self._sums):
            self._sums.clear()
        if (step, query) not in self._sums:
            total = torch.zeros(len(self._owner), dtype=torch.float64, device=self._owner.device)
            parts = parts_of(total, self.shapes)
            stream = Stream(Purpose.DENSE, step, query=query)
            key = stream_keys(seed, [stream], self._bucket.device)
            for lot in panels_of(self._bucket).lots():
                lot.draw(key, **self._direction.options)
                lot.memory.mul_(FRACTION).round_()
                for row, rows, panel in lot.parts:
                    if self.flat_rows[row]:
                        parts[row].T[rows].add_(panel)
                    else:
                        parts[row].add_(panel.sum(0, keepdim=True, dtype=torch.float64))
            self._sums[step, query] = total / FRACTION
        return self._sums[step, query]

    def row(self, seed: int, terms: Sequence[Term]) -> Tensor:
        """What terms ``coeff * d`` have besides ``coeff * u``, in every row, float64."""
        total = torch.zeros_like(self._count)
        for term in terms:
            assert isinstance(term.step, int)
            total = total + term.coeffs * self._along(self.sums(seed, term.step, term.query))
        return total[self._owner] * self._unit

    def _along(self, sums: Tensor) -> Vector:
        """What d has besides u, along a in units of its largest element."""
        return self._away * self._dot(self._unit, sums)

    def learn(self, seed: int, step: int, weights: Sequence[Vector], lr: float) -> None:
        """``a = a - lr * sum of weight_k * s_k``, where ``s_k = a / (rho + |a|^2) - (a . d_k) d_k /
        rho``, summed over rows, is the derivative of the logarithm of the density of d_k."""
        owner, a, s = self._owner, self._a.double(), self._s
        slope = torch.zeros_like(a)
        for query, weight in enumerate(weights):
            sums = self.sums(seed, step, query)
            rows = sums + (self._along(sums) * self._count)[owner] * self._unit  # of d
            product = -self._mirror * self._scale * self._dot(self._unit, sums)  # a . d
            slope += (weight * self._count / (s * s))[owner] * a
            slope -= (weight * product / self._direction.rho)[owner] * rows
        self._a.copy_(a - slope * lr)
        self._measure()
