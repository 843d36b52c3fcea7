"""The low-rank factors of a bucket: U and V of a step, in flat buffers.

A parameter is seen as a matrix (m, n) with U (m, rank) and V (n, rank), float32. All U of a bucket
lie one after the other in one tensor, so that a sum of factors is one operation for the whole
model. A step's noise is drawn at most once, and the factors of two steps are kept: the next one's,
where a schedule looks ahead, or the last one's, where momentum moves to a new window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from zo_fused.noise.keys import DeviceStep, Step, Stream, on_device, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.vectors import Vector, float32
from zo_fused.sweeps.arguments import matrix_shape
from zo_fused.sweeps.conversions import int64_tensor

Pair = tuple[list[Tensor], list[Tensor]]
Basis = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class StepFactors:
    """The factors of one step."""

    flat_u: Tensor
    flat_v: Tensor
    us: list[Tensor]  # parts of flat_u, (m, rank) each
    vs: list[Tensor]
    number: int  # 0 or 1
    qs: list[Tensor]  # of matrices, where there is a basis: (m, rank) each
    step: Any = None  # what tells whose U is in it: of which step and query
    windows: Any = None  # the same of V, over all groups


class Factors:
    """U fresh every step and V fixed for a window of ``interval`` steps, from their own streams.

    One-dimensional parameters get dense noise: U is the noise itself, V is 1.

    With a basis, U of a matrix is ``Q Z``: Q (m, rank) is made with V once a window, Z (rank, rank)
    is fresh every step.

    Args:
        basis: from a matrix and normals of the shapes of Q and V to Q and V; None: there is no Q.
        options: of the sweeps that draw, as `Direction.options`.
        fresh: V is drawn anew for each query, from stream (V, step, query).
    """

    def __init__(
        self,
        bucket: Bucket,
        basis: Basis | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        fresh: bool = False,
    ) -> None:
        self._bucket = bucket
        self._fresh = fresh
        self._options = options
        self._basis = basis
        shapes = [
            (*matrix_shape(p), bucket.fixed[g]["rank"]) if p.dim() >= 2 else (p.numel(), 1, 1)
            for p, g in zip(bucket.params, bucket.group_of, strict=True)
        ]
        self.u_shapes = [(m, rank) for m, _, rank in shapes]
        self.v_shapes = [(n, rank) for _, n, rank in shapes]
        self._all = list(range(len(shapes)))
        self._matrices = [i for i, p in enumerate(bucket.params) if p.dim() >= 2]
        self._vectors = [i for i, p in enumerate(bucket.params) if p.dim() < 2]
        self._intervals = [1 if fresh else group["interval"] for group in bucket.fixed]
        vector = int64_tensor([int(p.dim() < 2) for p in bucket.params])
        self._is_vector = on_device(vector, bucket.device)
        self._group_of_matrix = bucket.group_index[on_device(vector == 0, bucket.device)]
        sizes = int64_tensor([m * rank for m, rank in self.u_shapes])
        # which parameter an element of a flat U belongs to
        owner = int64_tensor(range(len(sizes))).repeat_interleave(sizes)
        self._owner = on_device(owner, bucket.device)
        self._slots = [self._slot(0), self._slot(1)]

    def _slot(self, number: int) -> StepFactors:
        u, us = self.buffer(self.u_shapes)
        v, vs = self.buffer(self.v_shapes)
        qs = (
            []
            if self._basis is None
            else self.buffer([self.u_shapes[i] for i in self._matrices])[1]
        )
        return StepFactors(u, v.fill_(1.0), us, vs, number, qs)  # the ones of vectors stay

    def buffer(
        self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, list[Tensor]]:
        """Zeros in one tensor, and its parts in these shapes."""
        sizes = [rows * columns for rows, columns in shapes]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=self._bucket.device)
        parts = zip(flat.split(sizes), shapes, strict=True)
        return flat, [part.view(shape) for part, shape in parts]

    def spread(self, per_parameter: Vector) -> Tensor:
        """A number a parameter as a number an element of a flat U, float32."""
        return float32(per_parameter)[self._owner]

    def of(self, seed: int, step: Step, query: int = 0) -> StepFactors:
        """The factors of a step's query, until the next query of that step is asked for; those of
        the step before it stay as they are."""
        slot = self._slots[step.ahead if isinstance(step, DeviceStep) else step % 2]
        now = (seed, step, query)
        if slot.step != now:
            windows = now if self._fresh else self.windows(seed, step)
            if slot.windows != windows:
                self._draw_v(slot, seed, step, query, windows)
            self._draw_u(slot, seed, step, query)
            slot.step, slot.windows = now, windows
        return slot

    def forget(self) -> None:
        """What a direction has learnt changes the basis: it is made anew."""
        for slot in self._slots:
            slot.step = slot.windows = None

    def windows(self, seed: int, step: Step) -> Any:
        """What tells whose V a step has."""
        if isinstance(step, DeviceStep):  # only the device knows which window it is
            return (seed, step)
        return (seed, *(step // interval for interval in self._intervals))

    def _draw_u(self, slot: StepFactors, seed: int, step: Step, query: int) -> None:
        matrices = Purpose.U if self._basis is None else Purpose.CORE
        streams = [Stream(purpose, step, query=query) for purpose in (matrices, Purpose.DENSE)]
        keys = stream_keys(seed, streams, self._bucket.device)[self._is_vector]
        if self._basis is None:
            self._bucket.fill(slot.us, self._all, ("u", slot.number))(keys, **self._options)
            return
        us = [slot.us[i] for i in self._vectors]
        self._bucket.fill(us, self._vectors, ("u", slot.number))(
            keys[self._vectors], **self._options
        )
        cores = self._bucket.once("cores", self._cores)
        self._bucket.fill(cores, self._matrices, "cores drawn")(
            keys[self._matrices], **self._options
        )
        for i, q, core in zip(self._matrices, slot.qs, cores, strict=True):
            slot.us[i].copy_(small_product(q, core))

    def _cores(self) -> list[Tensor]:
        return self.buffer([(self.u_shapes[i][1],) * 2 for i in self._matrices])[1]

    def _draw_v(self, slot: StepFactors, seed: int, step: Step, query: int, windows: Any) -> None:
        vs = [slot.vs[i] for i in self._matrices]
        of_query = query if self._fresh else 0
        self._draw_for_window(vs, slot.number, seed, step, Purpose.V, of_query)
        if self._basis is None or not vs:
            return
        other = self._slots[1 - slot.number]
        if other.windows == windows:
            torch._foreach_copy_(slot.qs + vs, other.qs + [other.vs[i] for i in self._matrices])
            return
        self._draw_for_window(slot.qs, slot.number, seed, step, Purpose.LEFT)
        for i, q, v in zip(self._matrices, slot.qs, vs, strict=True):
            left, right = self._basis(self._bucket.params[i], q, v)
            q.copy_(left)
            v.copy_(right)

    def _draw_for_window(
        self,
        outs: list[Tensor],
        number: int,
        seed: int,
        step: Step,
        purpose: Purpose,
        query: int = 0,
    ) -> None:
        streams = [Stream(purpose, step, interval, query) for interval in self._intervals]
        keys = stream_keys(seed, streams, self._bucket.device)[self._group_of_matrix]
        self._bucket.fill(outs, self._matrices, (purpose, number))(keys, **self._options)

    def add(self, number: int, coeffs: Vector, factor: Tensor, first: bool) -> list[Tensor]:
        """``sum += coeff * factor``, from zero at first, in buffer 0 or 1; its parts.

        Product and sum are rounded one by one, so that every device has the same bits.

        Args:
            factor: of the shape of a flat U.
        """
        flat, parts = self._bucket.once(("sum", number), lambda: self.buffer(self.u_shapes))
        product = self.spread(coeffs) * factor
        flat.copy_(product) if first else flat.add_(product)
        return parts

    def joined(self, parts: Sequence[Pair]) -> Pair:
        """Products ``U V^T`` as one, whose rank is the sum of theirs, in memory that the next call
        overwrites."""
        for number, part in enumerate(parts):
            self.place(part, number, len(parts))
        return self.side_by_side(len(parts))

    def place(self, part: Pair, number: int, count: int) -> None:
        """Make a product one of those that `side_by_side` has."""
        us, vs = self._wide(count)[2][number]
        torch._foreach_copy_(us + vs, part[0] + part[1])

    def side_by_side(self, count: int) -> Pair:
        """The U's and V's of so many products, each beside the other."""
        us, vs, _ = self._wide(count)
        return us, vs

    def _wide(self, count: int) -> tuple[list[Tensor], list[Tensor], list[Pair]]:
        """Buffers of so many times the rank, and views of their parts."""

        def make() -> tuple[list[Tensor], list[Tensor], list[Pair]]:
            us, vs = (
                self.buffer([(rows, count * rank) for rows, rank in shapes])[1]
                for shapes in (self.u_shapes, self.v_shapes)
            )
            parts = [
                ([u.chunk(count, dim=1)[n] for u in us], [v.chunk(count, dim=1)[n] for v in vs])
                for n in range(count)
            ]
            return us, vs, parts

        return self._bucket.once(("wide", count), make)


def small_product(tall: Tensor, small: Tensor) -> Tensor:
    """``tall @ small`` for a small square matrix, float32: bit for bit the same on every device, as
    the sum runs in a fixed order in float64."""
    total = torch.zeros(tall.shape, dtype=torch.float64, device=tall.device)
    for column, row in zip(tall.unbind(1), small.double().unbind(), strict=True):
        total += column[:, None].double() * row
    return total.float()
