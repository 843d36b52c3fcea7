"""Sweeps that add what is no noise: ``p = round(decay * p + sum of c_k z_k + panel)``.

What is added is made in panels: as many rows of parameters as fit into scratch memory, float32, one
lot after the other. The sweep is that of momentum with the panel for a moment that stays as it is:
an element is rounded once, and its bits do not depend on how the parameters are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_fused.noise.keys import on_device
from zo_fused.step.buckets import Bucket
from zo_fused.sweeps import operators
from zo_fused.sweeps.arguments import matrix_shape
from zo_fused.sweeps.conversions import int64_tensor

WORKSPACE = 64 << 20  # bytes of a lot


class Part(NamedTuple):
    """Rows of a parameter, which is seen as a matrix."""

    row: int  # of the parameter in its bucket
    rows: slice
    panel: Tensor  # float32 (rows, columns)

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor like the parameter: a view, or of permuted memory a copy."""
        return tensor.detach().contiguous().view(matrix_shape(tensor))[self.rows]


class Lot:
    """Panels that are filled together, in memory that the next lot overwrites."""

    def __init__(self, bucket: Bucket, cuts: Sequence[tuple[int, slice]], memory: Tensor) -> None:
        shapes = [matrix_shape(bucket.params[row]) for row, _ in cuts]
        sizes = [
            (part.stop - part.start) * n for (_, part), (_, n) in zip(cuts, shapes, strict=True)
        ]
        self.memory = memory[: sum(sizes)]
        self.parts = [
            Part(row, rows, piece.view(-1, n))
            for (row, rows), (_, n), piece in zip(
                cuts, shapes, self.memory.split(sizes), strict=True
            )
        ]
        self.panels = [part.panel for part in self.parts]
        self.rows = [row for row, _ in cuts]
        starts = [rows.start * n for (_, rows), (_, n) in zip(cuts, shapes, strict=True)]
        self.ids, self.offsets = bucket.ids[self.rows], int64_tensor(starts)
        self._index = on_device(int64_tensor(self.rows), bucket.device)
        columns = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float32, device="cpu")
        self._columns = on_device(columns.expand(len(cuts), -1).contiguous(), bucket.device)

    def draw(self, key: Tensor, **options: Any) -> None:
        """Fill the panels with the normals of these elements, of one stream, int64 [1]."""
        keys = key.expand(len(self.parts)).contiguous()
        operators.normal_(self.panels, self.ids, self.offsets, keys, **options)

    def write(
        self,
        tensors: Sequence[Tensor],
        keys: Tensor,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None = None,
        **options: Any,
    ) -> None:
        """The sweep.

        Args:
            tensors: those of the bucket, or others like them.
            keys, coeffs, decay, rounding: as of ``dense_``, a row for each tensor of the bucket.
        """
        pieces = [part.of(tensors[part.row]) for part in self.parts]
        coeffs, decay = coeffs[self._index], decay[self._index]
        grads = torch.zeros_like(coeffs)  # of what goes into the panel
        rows = keys, grads, coeffs, self._columns, decay, "momentum", rounding
        operators.moments_(pieces, self.panels, [], self.ids, self.offsets, *rows, **options)
        for part, piece in zip(self.parts, pieces, strict=True):
            tensor = tensors[part.row].detach()
            if not tensor.is_contiguous():  # the piece is a copy
                whole = tensor.contiguous().view(matrix_shape(tensor))
                whole[part.rows] = piece
                tensor.copy_(whole.view(tensor.shape))


class Panels:
    """The parameters of a bucket, cut into lots."""

    def __init__(self, bucket: Bucket) -> None:
        cuts = list(_cuts(bucket.params, WORKSPACE // 4))
        shapes = [matrix_shape(p) for p in bucket.params]
        sizes = [
            sum((part.stop - part.start) * shapes[row][1] for row, part in lot) for lot in cuts
        ]
        memory = torch.empty(max(sizes), dtype=torch.float32, device=bucket.device)
        self.lots = [Lot(bucket, lot, memory) for lot in cuts]


def _cuts(params: Sequence[Tensor], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """Rows of all parameters in order, in lots of no more than so many elements, or of one row."""
    lot: list[tuple[int, slice]] = []
    room = limit
    for row, p in enumerate(params):
        m, n = matrix_shape(p)
        first = 0
        while first < m:
            if lot and room < n:
                yield lot
                lot, room = [], limit
            last = min(m, first + max(1, room // n))
            lot.append((row, slice(first, last)))
            room -= (last - first) * n
            first = last
    yield lot


def panels_of(bucket: Bucket) -> Panels:
    """Those of a bucket; their scratch memory stays as long as it."""
    return bucket.once("panels", lambda: Panels(bucket))
