"""The low-rank factors of a bucket: coordinates and V of a step, in flat buffers.

A parameter is seen as a matrix (m, n) with U (m, rank) and V (n, rank), float32; U is made of
coordinates (`zo_fused.directions.forms`), or is them. All coordinates of a bucket lie one after the
other in one tensor, so that a sum of them is one operation for the whole model. A step's noise is
drawn at most once, and the factors of two steps are kept: the next one's, where a schedule looks
ahead, or the last one's, where momentum moves to a new window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.forms import Form
from zo_fused.noise.keys import DeviceStep, Step, Stream, on_device, on_host, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.vectors import Vector, float32
from zo_fused.sweeps import operators
from zo_fused.sweeps.arguments import matrix_shape
from zo_fused.sweeps.conversions import int64_tensor

Pair = tuple[list[Tensor], list[Tensor]]
Flat = tuple[Tensor, list[Tensor]]  # one tensor, and its parts
Basis = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Right = Callable[[Tensor, Tensor, int], None]


@dataclass
class StepFactors:
    """The factors of one step."""

    flat: Tensor  # the coordinates
    flat_v: Tensor
    parts: list[Tensor]  # of the coordinates, a parameter each
    vs: list[Tensor]  # parts of flat_v, (n, rank) each
    number: int  # 0 or 1
    qs: list[Tensor]  # of matrices, where there is a basis: (m, rank) each
    step: Any = None  # what tells whose coordinates are in it: of which step and query
    windows: Any = None  # the same of Q and V, over all groups


class Factors:
    """Coordinates fresh every step and V fixed for a window of ``interval`` steps, from their own
    streams; where the form has a Q, it is made with V.

    One-dimensional parameters get dense noise: U is the noise itself, V is 1.

    Args:
        form: what the coordinates of a matrix are.
        basis: from a matrix and normals of the shapes of Q and V to Q and V.
        options: of the sweeps that draw, as `Direction.options`.
        right: changes the V of a matrix, as it was drawn, for a step.
        fresh: V is drawn anew for each query, from stream (V, step, query).
        rows: from a matrix to the rows that move, or to None where all do.

    Attributes:
        shapes: of the coordinates of each parameter.
        u_shapes, v_shapes: of its U and V.
        whole: whether they are of whole matrices, where a process has a shard.
        together: elements of U that are lifted at once, on the host and on a GPU.
    """

    together = (1 << 16, 1 << 22)

    def __init__(
        self,
        bucket: Bucket,
        form: Form,
        basis: Basis,
        options: Mapping[str, Any] = MappingProxyType({}),
        right: Right | None = None,
        fresh: bool = False,
        rows: Callable[[Tensor], Tensor | None] = lambda p: None,
    ) -> None:
        self._bucket = bucket
        self._rows = rows
        self._some: dict[int, Tensor] | None = None  # of which matrices some rows move
        self._fresh = fresh
        self._options = options
        self.form, self._basis, self._right = form, basis, right
        self.whole = bucket.beside and bucket.rows is not None
        self._forgotten = 0
        sizes = [self._size(row, p) for row, p in enumerate(bucket.params)]
        self.u_shapes = [(m, rank) for m, _, rank in sizes]
        self.v_shapes = [(n, rank) for _, n, rank in sizes]
        self.shapes = [
            form.shape(*shape) if p.dim() >= 2 else shape
            for p, shape in zip(bucket.params, self.u_shapes, strict=True)
        ]
        self._all = list(range(len(sizes)))
        self._matrices = [i for i, p in enumerate(bucket.params) if p.dim() >= 2]
        self._vectors = [i for i, p in enumerate(bucket.params) if p.dim() < 2]
        self._intervals = [1 if fresh else group["interval"] for group in bucket.fixed]
        vector = on_device(int64_tensor([int(p.dim() < 2) for p in bucket.params]), bucket.device)
        self._is_vector, self._group_of_matrix = vector, bucket.group_index[vector == 0]
        elements = int64_tensor([rows * columns for rows, columns in self.shapes])
        # which parameter a coordinate belongs to
        owner = int64_tensor(range(len(elements))).repeat_interleave(elements)
        self._owner = on_device(owner, bucket.device)
        self._slots = [self._slot(0), self._slot(1)]

    @staticmethod
    def sides(p: Tensor) -> tuple[int, int]:
        """The rows of U and V of a matrix."""
        return matrix_shape(p)

    def _size(self, row: int, p: Tensor) -> tuple[int, int, int]:
        """m, n and the rank of a parameter, or of the part of it that is here."""
        if p.dim() < 2:
            return p.numel(), 1, 1
        rank: int = self._bucket.fixed[self._bucket.group_of[row]]["rank"]
        whole = self.sides(self._bucket.owner_of(row))
        m, n = whole if self.whole else self.sides(p)
        return m, n, min(rank, *whole) if self.form.clipped else rank

    def _slot(self, number: int) -> StepFactors:
        flat, parts = self.buffer(self.shapes)
        v, vs = self.buffer(self.v_shapes)
        with_q = self._matrices if self.form.lift else []
        qs = self.buffer([self.u_shapes[i] for i in with_q])[1]
        return StepFactors(flat, v.fill_(1.0), parts, vs, number, qs)  # the ones of vectors stay

    def buffer(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype = torch.float32) -> Flat:
        """Zeros in one tensor, and its parts in these shapes."""
        size = sum(rows * columns for rows, columns in shapes)
        flat = torch.zeros(size, dtype=dtype, device=self._bucket.device)
        return flat, parts_of(flat, shapes)

    def spread(self, per_parameter: Vector) -> Tensor:
        """A number a parameter as a number a coordinate, float32."""
        return float32(per_parameter)[self._owner]

    def of(self, seed: int, step: Step, query: int = 0) -> StepFactors:
        """The factors of a step's query, until the next query of that step is asked for; those of
        the step before it stay as they are."""
        slot = self._slots[step.ahead if isinstance(step, DeviceStep) else step % 2]
        now = (seed, step, query)
        if slot.step != now:
            windows = now if self._fresh else self.windows(seed, step)
            if slot.windows != windows and self._matrices:
                self._draw_v(slot, seed, step, query, windows)
            self._draw(slot, seed, step, query)
            slot.step, slot.windows = now, windows
        return slot

    def forget(self) -> None:
        """What a direction has learnt changes the basis: it is made anew."""
        self._forgotten += 1
        self._some = None
        for slot in self._slots:
            slot.step = slot.windows = None

    def windows(self, seed: int, step: Step) -> Any:
        """What tells whose V a step has."""
        if isinstance(step, DeviceStep):  # only the device knows which window it is
            return (seed, step)
        return (seed, self._forgotten, *(step // interval for interval in self._intervals))

    def _draw(self, slot: StepFactors, seed: int, step: Step, query: int) -> None:
        streams = [Stream(of, step, query=query) for of in (self.form.purpose, Purpose.DENSE)]
        keys = stream_keys(seed, streams, self._bucket.device)[self._is_vector]
        # cores are of whole matrices
        along = "whole" if self.whole else "rows" if self.form.lift is None else "vectors"
        key = ("coordinates", slot.number)
        self._bucket.fill(slot.parts, self._all, key, along)(keys, **self._options)
        if self._some is None:
            found = {i: self._rows(self._bucket.params[i]) for i in self._matrices}
            self._some = {i: rows for i, rows in found.items() if rows is not None}
        for i, rows in self._some.items():
            moving = slot.parts[i][rows]
            slot.parts[i].zero_()[rows] = moving
        if slot.qs:
            self.shape_cores([slot.parts[i] for i in self._matrices], seed, step, query)

    def _draw_v(self, slot: StepFactors, seed: int, step: Step, query: int, windows: Any) -> None:
        vs = [slot.vs[i] for i in self._matrices]
        other = self._slots[1 - slot.number]
        if slot.qs and other.windows == windows:
            torch._foreach_copy_(slot.qs + vs, other.qs + [other.vs[i] for i in self._matrices])
            return
        if slot.qs and self._bucket.rows is not None and not self.whole:
            for i, q in zip(self._matrices, slot.qs, strict=True):
                interval = self._intervals[self._bucket.group_of[i]]
                two = (Stream(of, step, interval) for of in (Purpose.LEFT, self.form.right))
                keys = [stream_keys(seed, [stream], q.device) for stream in two]
                outs = (q, slot.vs[i])
                part_of_bases(self._bucket, i, outs, keys, self._basis, self._options)
            return
        of_query = query if self._fresh else 0
        self._draw_for_window(vs, slot.number, seed, step, self.form.right, of_query)
        self.shape_window(vs)
        if self._right is not None:
            assert isinstance(step, int)
            for i, v in zip(self._matrices, vs, strict=True):
                self._right(self._bucket.params[i], v, step)
        if not slot.qs:
            return
        self._draw_for_window(slot.qs, slot.number, seed, step, Purpose.LEFT)
        for i, q, v in zip(self._matrices, slot.qs, vs, strict=True):
            left, right = self.make_basis(i, seed, q, v)
            q.copy_(left)
            v.copy_(right)

    def make_basis(self, row: int, seed: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Q and V of the matrix in a row of the bucket, from normals of their shapes."""
        return self._basis(self._bucket.owner_of(row), left, right)

    def shape_window(self, vs: list[Tensor]) -> None:
        """Change the V of the matrices, which were drawn for a window, in place."""

    def shape_cores(self, cores: list[Tensor], seed: int, step: Step, query: int) -> None:
        """Change the coordinates in Q, which were drawn for a query, in place."""

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
        along = "whole" if self.whole else "columns" if purpose is self.form.right else "rows"
        self._bucket.fill(outs, self._matrices, (purpose, number), along)(keys, **self._options)

    def add(self, number: int, coeffs: Vector, factor: Tensor, first: bool) -> Flat:
        """``sum += coeff * factor``, from zero at first, in buffer 0 or 1: the sum and its parts.

        Product and sum are rounded one by one, so that every device has the same bits.

        Args:
            factor: coordinates of all parameters, flat.
        """
        flat, parts = self._bucket.once(("sum", number), lambda: self.buffer(self.shapes))
        product = self.spread(coeffs) * factor
        flat.copy_(product) if first else flat.add_(product)
        return flat, parts

    def lifted(self, coordinates: Flat, step: StepFactors, number: int = 0) -> Flat:
        """U of coordinates, with the Q of a step, in buffer 0 or 1; or the coordinates, if they
        are U."""
        lift, (_, parts) = self.form.lift, coordinates
        if lift is None:
            return coordinates
        made, us = self._bucket.once(("lifted", number), lambda: self.buffer(self.u_shapes))
        if self._vectors:
            for_vectors = [us[i] for i in self._vectors], [parts[i] for i in self._vectors]
            torch._foreach_copy_(*for_vectors)
        limit = self.together[0 if on_host(self._bucket.device) else 1]
        shapes = [self.u_shapes[i] for i in self._matrices]
        for rows in self._bucket.once("batches", partial(batches, shapes, limit)):
            q = torch.stack([step.qs[row] for row in rows])
            core = torch.stack([parts[self._matrices[row]] for row in rows])
            outs = [us[self._matrices[row]] for row in rows]
            torch._foreach_copy_(outs, list(lift(q, core).unbind()))
        return made, us

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


def batches(shapes: Sequence[tuple[int, int]], limit: int) -> list[list[int]]:
    """Numbers of matrices of one shape, of no more elements than that or one matrix, to be lifted
    at once: on a GPU many, which costs few kernels; on the host as few as stay in its caches."""
    alike: dict[tuple[int, int], list[list[int]]] = {}
    for number, (m, rank) in enumerate(shapes):
        found = alike.setdefault((m, rank), [[]])
        if found[-1] and (len(found[-1]) + 1) * m * rank > limit:
            found.append([])
        found[-1].append(number)
    return [batch for found in alike.values() for batch in found]


def part_of_bases(
    bucket: Bucket,
    row: int,
    outs: tuple[Tensor, Tensor],
    keys: Sequence[Tensor],
    basis: Basis,
    options: Mapping[str, Any],
) -> None:
    """Q and V of a whole matrix, and of both the rows that are here.

    Args:
        row: of the matrix in the bucket.
        keys: of the streams of Q and of V.
    """
    assert bucket.rows is not None
    whole, first, rank = bucket.owner_of(row), int64_tensor([0]), outs[0].shape[1]
    pair = [torch.empty(n, rank, device=bucket.device) for n in matrix_shape(whole)]
    for made, key in zip(pair, keys, strict=True):
        operators.normal_([made], bucket.ids[row : row + 1], first, key, **options)
    for out, made, runs in zip(outs, basis(whole, *pair), bucket.rows.sides(row), strict=True):
        torch.cat([made[run.start : run.start + run.length] for run in runs], out=out)


def parts_of(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """A flat tensor as views in these shapes, one after the other."""
    parts = flat.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
