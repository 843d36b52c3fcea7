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

from zo_fused.directions.factors import parts_of
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
    """Panels that are filled together, in memory that the next lot overwrites.

    Attributes:
        memory: float32, flat; only while the lot is in turn (`Panels.lots`).
        parts: with the panels, one after the other in `memory`.
        index: which tensors of the bucket they are of, on its device.
        ids, offsets: their streams, as sweeps take them.
    """

    memory: Tensor
    parts: list[Part]

    def __init__(self, bucket: Bucket, cuts: Sequence[tuple[int, slice]]) -> None:
        self._cuts = cuts
        columns = [matrix_shape(bucket.params[row])[1] for row, _ in cuts]
        pairs = [(part, n) for (_, part), n in zip(cuts, columns, strict=True)]
        self._shapes = [(part.stop - part.start, n) for part, n in pairs]
        self.size = sum(m * n for m, n in self._shapes)
        rows = [row for row, _ in cuts]
        self.index = on_device(int64_tensor(rows), bucket.device)
        self.ids = bucket.ids[rows]
        self.offsets = int64_tensor([part.start * n for part, n in pairs])

    def move_to(self, memory: Tensor) -> None:
        """Have panels there, with whatever it holds."""
        self.memory = memory[: self.size]
        panels = zip(self._cuts, parts_of(self.memory, self._shapes), strict=True)
        self.parts = [Part(row, rows, panel) for (row, rows), panel in panels]

    def leave(self) -> None:
        """Have no panels."""
        del self.memory, self.parts

    def another(self) -> list[Tensor]:
        """Zeros, a tensor like each panel."""
        return parts_of(torch.zeros_like(self.memory), self._shapes)

    def draw(self, key: Tensor, **options: Any) -> None:
        """Fill the panels with the normals of these elements, of one stream, int64 [1]."""
        keys = key.expand(len(self.parts)).contiguous()
        panels = [part.panel for part in self.parts]
        operators.normal_(panels, self.ids, self.offsets, keys, **options)

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
        coeffs, decay = coeffs[self.index], decay[self.index]
        one, zero = torch.ones_like(decay), torch.zeros_like(decay)
        stays = torch.stack([one, zero, zero, zero, zero, one], 1)  # as moment; it is added once
        rows = keys, torch.zeros_like(coeffs), coeffs, stays, decay, "momentum", rounding
        panels = [part.panel for part in self.parts]
        operators.moments_(pieces, panels, [], self.ids, self.offsets, *rows, **options)
        for part, piece in zip(self.parts, pieces, strict=True):
            tensor = tensors[part.row].detach()
            if not tensor.is_contiguous():  # the piece is a copy
                whole = tensor.contiguous().view(matrix_shape(tensor))
                whole[part.rows] = piece
                tensor.copy_(whole.view(tensor.shape))


class Panels:
    """The parameters of a bucket, cut into lots of no more elements than `WORKSPACE` or the largest
    parameter has."""

    def __init__(self, bucket: Bucket) -> None:
        self._device = bucket.device
        limit = min(WORKSPACE // 4, max(p.numel() for p in bucket.params))
        self._lots = [Lot(bucket, cuts) for cuts in _cuts(bucket.params, limit)]

    def lots(self) -> Iterator[Lot]:
        """The lots in turn, in scratch memory that is given back after the last."""
        size = max(lot.size for lot in self._lots)
        memory = torch.empty(size, dtype=torch.float32, device=self._device)
        for lot in self._lots:
            lot.move_to(memory)
            yield lot
            lot.leave()


def _cuts(params: Sequence[Tensor], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """All parameters in order, in lots of no more than so many elements, or of one row. Only those
    that are larger are cut."""
    lot: list[tuple[int, slice]] = []
    room = limit
    for row, p in enumerate(params):
        m, n = matrix_shape(p)
        height = max(1, limit // n)
        for first in range(0, m, height):
            rows = slice(first, min(m, first + height))
            size = (rows.stop - first) * n
            if lot and room < size:
                yield lot
                lot, room = [], limit
            lot.append((row, rows))
            room -= size
    yield lot


def panels_of(bucket: Bucket) -> Panels:
    """Those of a bucket."""
    return bucket.once("panels", lambda: Panels(bucket))
