"""Shards: a part of a parameter gets the noise that it has in the whole.

The noise of an element depends on its index in the full parameter. Sweeps count on from the offset
of a tensor's first element, so a shard is swept as the runs of elements that lie one after the
other in the full parameter: one, if it was cut along its first dimension only, else as many as it
has rows. Low-rank sweeps see a shard as a matrix, whose factors are rows of the full factors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from operator import add, le
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_fused.checks import whole


class Run(NamedTuple):
    """Elements that lie one after the other, in a shard and in the full parameter."""

    local: int  # index of the first one in the shard,
    start: int  # and in the full parameter
    length: int


@dataclass(frozen=True)
class Shard:
    """Where a tensor lies in the parameter that it is a part of, a box of its elements.

    Args:
        global_shape: of the full parameter.
        starts: for each dimension, the index of the tensor's first element in the full parameter.

    Raises:
        TypeError, ValueError: these are not as many whole numbers, from 0 on.
    """

    global_shape: tuple[int, ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("global_shape", "starts"):
            given = enumerate(getattr(self, name))
            numbers = tuple(whole(f"{name}[{i}] of a Shard", n, 0, bits=62) for i, n in given)
            object.__setattr__(self, name, numbers)
        if len(self.global_shape) != len(self.starts):
            raise ValueError(
                f"a Shard has a start for each dimension of its global_shape {self.global_shape}, "
                f"got {self.starts}"
            )

    def check(self, shape: Sequence[int], label: str) -> None:
        """Raises:
        ValueError: a tensor of this shape does not lie there.
        """
        dims = len(self.global_shape)
        ends = map(add, self.starts, shape)
        if len(shape) != dims or not all(map(le, ends, self.global_shape)):
            raise ValueError(
                f"zo_fused: {label} has shape {tuple(shape)}, which from {self.starts} on is no "
                f"part of {self.global_shape}"
            )

    def runs(self, shape: Sequence[int]) -> list[Run]:
        """A tensor of this shape as runs, in the order of its elements."""
        if math.prod(shape) == 0:
            return []
        dims = len(shape)
        cut = dims  # dimensions from here on are whole, and the one before is in a run, too
        while cut and shape[cut - 1] == self.global_shape[cut - 1]:
            cut -= 1
        outer = max(cut - 1, 0)
        length = math.prod(shape[outer:])
        strides = [math.prod(self.global_shape[d + 1 :]) for d in range(dims)]
        first = sum(s * stride for s, stride in zip(self.starts, strides, strict=True))
        return [
            Run(i * length, first + sum(map(int.__mul__, place, strides)), length)
            for i, place in enumerate(product(*map(range, shape[:outer])))
        ]

    def rows(self, shape: Sequence[int]) -> list[Run]:
        """The rows of a tensor of this shape, seen as a matrix, among those of the full one."""
        return Shard(self.global_shape[:1], self.starts[:1]).runs(shape[:1])

    def columns(self, shape: Sequence[int]) -> list[Run]:
        """Its columns among those of the full matrix (which has all other dimensions in a row)."""
        return Shard(self.global_shape[1:], self.starts[1:]).runs(shape[1:])


Shards = Sequence[Shard | None]  # of each tensor; None: a whole parameter


def whole_of(tensor: Tensor) -> Shard:
    """Of a tensor that is no part of another."""
    return Shard(tuple(tensor.shape), (0,) * tensor.dim())


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. Who has one has imported its module, which takes a while."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; the tensor itself, unless it is a DTensor."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process has of each tensor; in loops of C, if none is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not any(
        issubclass(kind, module.DTensor) for kind in set(map(type, tensors))
    ):
        return list(tensors)
    return list(map(local, tensors))


def cut_among(tensor: Any) -> tuple[Any, ...]:
    """The process groups whose processes have different parts of a DTensor, one a dimension of its
    mesh."""
    placements = enumerate(tensor.placements)
    cut = [dim for dim, placement in placements if not placement.is_replicate()]
    return tuple(tensor.device_mesh.get_group(dim) for dim in cut)


def shard_of(tensor: Any, label: str) -> Shard:
    """Where the local part of a DTensor lies.

    Raises:
        NotImplementedError: its placements make no box of it: Partial, or a _StridedShard whose
            elements lie apart.
        ValueError: its local tensor is not of the shape that its placements say.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, dims = tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    for number, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard"):
            raise NotImplementedError(
                f"zo_fused: {label} is a DTensor with placement {kind}: a process has no "
                "elements of it, but terms of their sums; redistribute it to Shard or Replicate"
            )
        after = [
            mesh.size(other)
            for other in range(number + 1, len(placements))
            if getattr(placements[other], "dim", None) == placement.dim
        ]
        if kind == "_StridedShard" and placement.split_factor != math.prod(after):
            raise NotImplementedError(
                f"zo_fused: {label} has placements {placements}, with which the elements of a "
                "process don't lie beside each other; those of fully_shard over tensor parallel do"
            )
    shape, starts = compute_local_shape_and_global_offset(dims, mesh, placements)
    part = local(tensor)
    if not starts and dims:  # this process is not of the mesh
        shape, starts = (0,) * len(dims), dims
    if tuple(part.shape) != tuple(shape) and part.numel() + math.prod(shape):
        raise ValueError(
            f"zo_fused: the local part of {label} has shape {tuple(part.shape)}, but its placements"
            f" {placements} say {tuple(shape)}"
        )
    return Shard(dims, tuple(starts))


def located(
    params: Sequence[Tensor], shards: Shards | None
) -> tuple[list[Tensor], list[Shard] | None]:
    """Tensors of this process and where they lie; None: each is a whole parameter.

    Args:
        params: the local part of a DTensor is taken, and its place is known.
        shards: of each, or None for a whole parameter.

    Raises:
        TypeError, ValueError, NotImplementedError: a shard is none, or not where its tensor lies.
    """
    given = [None] * len(params) if shards is None else list(shards)
    if len(given) != len(params):
        raise ValueError(f"zo_fused: {len(params)} parameters but {len(given)} shards")
    known = any(shard is not None for shard in given)
    if not known and not any(map(is_sharded, params)):
        return list(params), None
    places = []
    for i, (tensor, shard) in enumerate(zip(params, given, strict=True)):
        label, part = f"params[{i}]", local(tensor)
        if shard is not None and not isinstance(shard, Shard):
            raise TypeError(
                f"zo_fused: shards[{i}] must be a zo_fused.Shard or None, got "
                f"{type(shard).__name__}"
            )
        if part is not tensor:
            if shard is not None:
                raise ValueError(f"zo_fused: {label} is a DTensor, which says itself where it lies")
            shard = shard_of(tensor, label)
        elif shard is None:
            shard = whole_of(part)
        else:
            shard.check(part.shape, label)
        places.append(shard)
    return [local(tensor) for tensor in params], places


def pieces(tensor: Tensor, runs: Sequence[Run], label: str) -> list[Tensor]:
    """The runs of a tensor as views; the tensor itself if it is one run.

    Raises:
        ValueError: it is not contiguous, so they are not runs of its memory.
    """
    if len(runs) == 1 and tensor.is_contiguous():
        return [tensor]
    if not tensor.is_contiguous():
        raise ValueError(
            f"zo_fused: {label} is a shard with strides {tensor.stride()}; shards must be "
            "contiguous: .contiguous()"
        )
    flat = tensor.detach().view(-1)
    return [flat[run.local : run.local + run.length] for run in runs]


def of_runs(
    factors: Sequence[Tensor], runs: Sequence[Sequence[Run]]
) -> tuple[list[Tensor], list[int], list[int]]:
    """Factors as their parts, one for each run of rows (or columns) of a matrix.

    Returns:
        The parts; for each, the number of its factor, and the index of its first element in the
        full factor.
    """
    parts, rows, firsts = [], [], []
    for i, (factor, some) in enumerate(zip(factors, runs, strict=True)):
        for run in some:
            parts.append(factor[run.local : run.local + run.length])
            rows.append(i)
            firsts.append(run.start * factor.shape[1])
    return parts, rows, firsts


def blocks(
    params: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], shards: Sequence[Shard]
) -> tuple[list[list[Tensor]], list[int], list[int]]:
    """Matrices and their factors, run by run.

    Returns:
        Parts of the parameters, of the U's and of the V's; for each, the number of its parameter,
        and the index of its first element in the full one.
    """
    lists: list[list[Tensor]] = [[], [], []]
    rows, firsts = [], []
    for i, (p, u, v, shard) in enumerate(zip(params, us, vs, shards, strict=True)):
        runs, columns = shard.runs(p.shape), shard.columns(p.shape)
        of_p = pieces(p, runs, f"params[{i}]")
        if len(runs) == 1:
            parts = [(p, u, v)]
        else:  # a row, or a part of one
            spans = [(c.local, c.local + c.length) for c in columns]
            places = [(row, span) for row in range(len(u)) for span in spans]
            parts = [
                (piece.view(1, -1), u[row : row + 1], v[low:high])
                for piece, (row, (low, high)) in zip(of_p, places, strict=True)
            ]
        for part, run in zip(parts if runs else [], runs, strict=True):
            for tensors, tensor in zip(lists, part, strict=True):
                tensors.append(tensor)
            rows.append(i)
            firsts.append(run.start)
    return lists, rows, firsts


class Cut:
    """Parameters as the tensors that sweeps over noise take: shards run by run.

    Args:
        params: of this process.
        shards: where they lie; None: each is a whole parameter.

    Attributes:
        row: of each tensor, the position of its parameter.
        tensors: in the order of `params`, the runs of each one after the other.
        starts: index of each tensor's first element in its full parameter; None: 0 throughout.
    """

    def __init__(self, params: Sequence[Tensor], shards: Sequence[Shard] | None) -> None:
        self.tensors: list[Tensor] = list(params)
        self.starts: list[int] | None = None
        self.row: list[int] = list(range(len(params)))
        self._runs: list[list[Run]] | None = None
        if shards is not None:
            runs = [shard.runs(p.shape) for p, shard in zip(params, shards, strict=True)]
            self._runs, self.starts = runs, [run.start for some in runs for run in some]
            self.row = [i for i, some in enumerate(runs) for _ in some]
            self.tensors = self.like(params, "params")

    def like(self, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
        """The runs of tensors that have the shapes of the parameters; of none: none."""
        if self._runs is None or not tensors:
            return list(tensors)
        if len(tensors) != len(self._runs):
            raise ValueError(
                f"zo_fused: {len(self._runs)} parameters but {len(tensors)} tensors in {name}"
            )
        return [
            piece
            for i, (tensor, runs) in enumerate(zip(tensors, self._runs, strict=True))
            for piece in pieces(tensor, runs, f"{name}[{i}]")
        ]

    def spread(self, rows: Tensor) -> Tensor:
        """Rows, one a parameter, as rows of the runs."""
        if self._runs is None:
            return rows
        return rows[torch.tensor(self.row, dtype=torch.int64, device=rows.device)]
