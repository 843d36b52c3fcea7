"""Directions in the space of an estimated gradient, aligned with it: P-GAP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.factored.direction import Factored
from zo_fused.directions.factors import Factors
from zo_fused.directions.gradient_space import Estimate, space_of
from zo_fused.directions.low_rank import LowRank
from zo_fused.directions.orthonormal import orthonormal
from zo_fused.directions.products import GRID
from zo_fused.noise.keys import Step, Stream, on_device, stream_keys
from zo_fused.noise.streams import Purpose, uniform
from zo_fused.step.buckets import Bucket
from zo_fused.step.vectors import vector
from zo_fused.sweeps.arguments import matrix_shape
from zo_fused.sweeps.conversions import int64_tensor

ALIGNMENTS = ("matrix", "shared", "joint")
LEARNT = "probes"  # in the optimizer's state: the step of the last probes, and what they found


class Aligned(LowRank):
    """``z = scale U Z V^T`` with U and V of the estimated gradient ``G^ ~ U S V^T`` of a window and
    ``Z = Z0 - (<S, Z0> - xi sqrt(delta) |S|) / |S|^2 S``: Z0 (r, r) from stream (core, step,
    query), a sign xi from stream (scalar, step, query). One-dimensional parameters get dense noise.

    G^ is made of the probes that were learnt from last. Before there are any, and where all of them
    found zero, the space is a random one and Z is Z0.

    Args:
        delta: at step 0 and from step `total_steps` on, linear between; None: Z is Z0.
        total_steps: None where delta stays.
        align: "matrix": a sign a matrix; "shared": one sign for all; "joint": also one inner
            product and one norm, over the matrices of a bucket.
        scale: whether scale is sqrt(m n) / r, so that z has elements of variance 1; else it is 1.
    """

    has_basis = True

    def __init__(
        self,
        delta: tuple[float, float] | None,
        total_steps: int | None,
        align: str,
        scale: bool,
    ) -> None:
        super().__init__()
        self.delta = delta
        self.total_steps = total_steps
        self.align = align
        self.scale = scale

    def not_capturable(self, deferred: bool) -> str:
        return "whether a step begins with probes, and delta, are for the host to say"

    def delta_of(self, step: int) -> float | None:
        """delta of a step. Skipped steps count."""
        if self.delta is None or self.total_steps is None:
            return None if self.delta is None else self.delta[0]
        first, last = self.delta
        return first + (last - first) * min(1.0, step / self.total_steps)

    def learn(
        self, buckets: Sequence[Bucket], seed: int, step: int, grads: Sequence[float]
    ) -> None:
        with_matrices = [b for b in buckets if any(p.dim() >= 2 for p in b.params)]
        if self.align == "joint" and len(with_matrices) > 1:
            raise ValueError(
                'align="joint" needs all matrices on one device and, in mode "factored", with a '
                'side path; use align="matrix"'
            )
        self.state[LEARNT] = {"step": step, "grads": list(grads)}
        self.forget(buckets)

    def factors(self, bucket: Bucket) -> Factors:
        return bucket.once("factors", lambda: AlignedFactors(bucket, self))


class BesideAligned(Factored, Aligned):
    """`Aligned` with cores that are kept beside the weights; probes are made in place."""


class AlignedFactors(Factors):
    """The factors of a bucket, in the space of its window."""

    def __init__(self, bucket: Bucket, direction: Aligned) -> None:
        super().__init__(bucket, direction.form, direction.basis, direction.options)
        self._slots[1] = self._slots[0]  # no sweep has the z of two steps
        self._direction = direction
        ranks = [self.u_shapes[i][1] for i in self._matrices]
        self._flat, self._units = self.buffer([(rank, rank) for rank in ranks])  # S / |S|
        self._lengths = [0.0] * len(ranks)  # |S|
        joint = direction.align == "joint"
        owner = int64_tensor([0 if joint else k for k in range(len(ranks))])
        sizes = int64_tensor([rank * rank for rank in ranks])
        self._owner_of_core = on_device(owner.repeat_interleave(sizes), bucket.device)
        self._signs, self._parts = self.buffer([(1, 1)] * len(ranks))

    def windows(self, seed: int, step: Step) -> Any:
        learnt: dict[str, Any] = self._direction.state.get(LEARNT, {})
        return (*super().windows(seed, step), learnt.get("step"))

    def make_basis(self, row: int, seed: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """U, with the scale in it, and V."""
        p, place, rank = self._bucket.params[row], self._matrices.index(row), left.shape[1]
        learnt: dict[str, Any] | None = self._direction.state.get(LEARNT)
        if learnt is None or not any(learnt["grads"]):
            u, v = orthonormal(left), orthonormal(right)
            self._units[place].zero_()
            self._lengths[place] = 0.0
        else:
            shape, id_ = matrix_shape(p), self._bucket.id_list[row]
            estimate = Estimate(shape, id_, seed, learnt["step"], learnt["grads"], p.device)
            u, core, v, self._lengths[place] = space_of(estimate, right)
            self._units[place].copy_(core)
        return (u * (math.sqrt(p.numel()) / rank) if self._direction.scale else u), v

    def shape_cores(self, cores: list[Tensor], seed: int, step: Step, query: int) -> None:
        assert isinstance(step, int)  # it is not captured
        delta = self._direction.delta_of(step)
        if delta is None or not cores:
            return
        unit, drawn = self._direction_of_s(), torch.cat([core.reshape(-1) for core in cores])
        # bit for bit the same everywhere: integers add in any order (|s| <= 1 and |z| < 7, so 2^20
        # products sum below 2^63)
        terms = (unit.double() * drawn.double() * GRID).round().to(torch.int64)
        count = 1 if self._direction.align == "joint" else len(cores)
        sums = torch.zeros(count, dtype=torch.int64, device=drawn.device)
        along = sums.index_add_(0, self._owner_of_core, terms).double() / GRID
        away = self._signs_of(seed, step, query)[:count] * math.sqrt(delta) - along
        drawn += (away[self._owner_of_core] * unit).float()
        for core, part in zip(cores, drawn.split([core.numel() for core in cores]), strict=True):
            core.copy_(part.view_as(core))

    def _direction_of_s(self) -> Tensor:
        """The S of all matrices, flat, of length 1: each, or (joint) all together."""
        if self._direction.align != "joint":
            return self._flat
        total = math.sqrt(sum(length * length for length in self._lengths)) or 1.0
        shares = vector([length / total for length in self._lengths], self._flat.device)
        sizes = int64_tensor([unit.numel() for unit in self._units])
        return self._flat * shares.repeat_interleave(sizes.to(shares.device))

    def _signs_of(self, seed: int, step: int, query: int) -> Tensor:
        """xi of every matrix, float64."""
        if self._direction.align != "matrix":
            sign = math.copysign(1.0, uniform(seed, step, query))
            return torch.full_like(self._signs, sign, dtype=torch.float64)
        key = stream_keys(seed, [Stream(Purpose.SCALAR, step, query=query)], self._bucket.device)
        draw = self._bucket.fill(self._parts, self._matrices, "signs")
        draw(key.expand(len(self._parts)).contiguous(), transform="signs")
        return self._signs.double()
