"""How z is made: one class per distribution of directions. Floor 6.

A direction sweeps ``p = decay * p + coeff * z`` over a bucket, for the z of a given step. It keeps
nothing that the seed and the step do not give back.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from zo_fused import _ops
from zo_fused.ops import int64_tensor
from zo_fused.parameters import Bucket
from zo_fused.streams import Purpose, derive_key


class Direction(Protocol):
    """What an optimizer and its update rule need from a direction."""

    def sweep(
        self,
        bucket: Bucket,
        groups: list[dict[str, Any]],
        seed: int,
        step: int,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None = None,
    ) -> None:
        """``p = decay * p + coeff * z`` in one call; coeffs, decay: float32 [P]; rounding: the key
        of a rounding stream, int64 [1], or None: to nearest."""

    def update_scale(self, bucket: Bucket, groups: list[dict[str, Any]]) -> Tensor | None:
        """Factor of the update relative to z, float64, one a parameter; None for 1."""


class Dense:
    """z ~ N(0, I), one stream per step (MeZO, arXiv 2305.17333, algorithm 1)."""

    def sweep(
        self,
        bucket: Bucket,
        groups: list[dict[str, Any]],
        seed: int,
        step: int,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None = None,
    ) -> None:
        key = int64_tensor([derive_key(seed, Purpose.DENSE, step)], bucket.device)
        rows = (bucket.ids, bucket.offsets, key, coeffs[:, None], decay)
        _ops.dense_(bucket.params, *rows, rounding)

    def update_scale(self, bucket: Bucket, groups: list[dict[str, Any]]) -> Tensor | None:
        return None


class LowRank:
    """z = U V^T with U fresh every step and V fixed for a window of ``interval`` steps.

    For a parameter seen as (m, n): U (m, rank) from stream (U, step), V (n, rank) from stream
    (V, step // interval), both N(0, 1), each from its own stream, so the U of the query is the U
    of the update (the released LOZO code loses that at every new V). One-dimensional parameters
    get dense noise from stream (dense, step): U is the noise itself, V is 1.
    """

    def __init__(self, divide_by_rank: bool = False) -> None:
        self.divide_by_rank = divide_by_rank

    def sweep(
        self,
        bucket: Bucket,
        groups: list[dict[str, Any]],
        seed: int,
        step: int,
        coeffs: Tensor,
        decay: Tensor,
        rounding: Tensor | None = None,
    ) -> None:
        us, vs = self.factors(bucket, groups, seed, step)
        rows = (coeffs, decay, bucket.ids, bucket.offsets)
        _ops.lowrank_(bucket.params, us, vs, *rows, rounding)

    def update_scale(self, bucket: Bucket, groups: list[dict[str, Any]]) -> Tensor | None:
        if not self.divide_by_rank:
            return None
        scale = [
            1.0 if p.dim() < 2 else 1.0 / groups[g]["rank"]
            for p, g in zip(bucket.params, bucket.group, strict=True)
        ]
        return torch.tensor(scale, dtype=torch.float64, device=bucket.device)

    def factors(
        self, bucket: Bucket, groups: list[dict[str, Any]], seed: int, step: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The factors of a step, in buffers that the bucket owns and the next step overwrites."""
        made = bucket.scratch.get("factors")
        if made is None:
            us = [self._empty(p, 0, groups[g]) for p, g in self._rows(bucket)]
            vs = [self._empty(p, 1, groups[g]) for p, g in self._rows(bucket)]
            no_keys: list[int | None] = [None] * len(us)
            made = bucket.scratch["factors"] = (us, vs, no_keys, list(no_keys))
        us, vs, u_keys, v_keys = made
        if bucket.scratch.get("step") != (seed, step):
            dense = derive_key(seed, Purpose.DENSE, step)
            u = derive_key(seed, Purpose.U, step)
            windows = {g: step // groups[g]["interval"] for g in bucket.group}
            v = {g: derive_key(seed, Purpose.V, window) for g, window in windows.items()}
            new_u: list[int | None] = [dense if p.dim() < 2 else u for p in bucket.params]
            new_v = [None if p.dim() < 2 else v[g] for p, g in self._rows(bucket)]
            self._fill(bucket, us, u_keys, new_u)
            self._fill(bucket, vs, v_keys, new_v)
            bucket.scratch["step"] = (seed, step)
        return us, vs

    def previous_v(
        self, bucket: Bucket, groups: list[dict[str, Any]], seed: int, step: int, row: int
    ) -> Tensor:
        """The V of the window before that of `step`, made anew, for one parameter."""
        group = groups[bucket.group[row]]
        v = self._empty(bucket.params[row], 1, group)
        key = derive_key(seed, Purpose.V, step // group["interval"] - 1)
        self._fill(bucket, [v], [None], [key], rows=[row])
        return v

    @staticmethod
    def _rows(bucket: Bucket) -> Any:
        return zip(bucket.params, bucket.group, strict=True)

    @staticmethod
    def _empty(p: Tensor, side: int, group: dict[str, Any]) -> Tensor:
        rank = 1 if p.dim() < 2 else group["rank"]
        shape = (_ops.matrix_shape(p) if p.dim() >= 2 else (p.numel(), 1))[side]
        return torch.ones(shape, rank, dtype=torch.float32, device=p.device)

    @staticmethod
    def _fill(
        bucket: Bucket,
        outs: list[Tensor],
        made: list[int | None],
        keys: list[int | None],
        rows: list[int] | None = None,
    ) -> None:
        """Draw the factors whose key is not the one they were last drawn from; None: leave."""
        stale = [i for i, key in enumerate(keys) if key is not None and key != made[i]]
        if not stale:
            return
        ids = [bucket.id_list[i if rows is None else rows[i]] for i in stale]
        _ops.normal_(
            [outs[i] for i in stale],
            int64_tensor(ids),
            torch.zeros(len(stale), dtype=torch.int64),
            int64_tensor([keys[i] or 0 for i in stale], bucket.device),
        )
        for i in stale:
            made[i] = keys[i]
