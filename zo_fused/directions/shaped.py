"""z with a shape: of independent elements, each scaled or left out (docs/noise.md, "Sweeps")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.noise.keys import Stream, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Sweep, Term
from zo_fused.step.rule import check_state
from zo_fused.step.vectors import float32, table
from zo_fused.sweeps import operators
from zo_fused.sweeps.arguments import mask_bytes

CHUNK = 1 << 22  # weights at a time: bounds the scratch memory. A multiple of 8.


class Shaped(Dense):
    """z of `Dense` with a shape for each parameter, which the optimizer's state holds."""

    def shapes(self, bucket: Bucket, sweep: Sweep) -> list[Tensor]:
        """The shapes of a bucket's parameters: the same tensors at each call."""
        raise NotImplementedError

    def sweep(self, sweep: Sweep) -> None:
        bucket, seed, terms, decay, rounding = sweep
        shapes = self.shapes(bucket, sweep)
        keys = self.keys(seed, terms, bucket.device)
        coeffs = table(self.stretched(seed, terms, [term.coeffs for term in terms]))
        made = bucket.prepared("shaped_", shapes)
        made(keys, coeffs, float32(decay), rounding, **self.options)

    def drawn(self, bucket: Bucket, seed: int, term: Term) -> list[Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no z apart from its sweeps")

    def not_capturable(self, deferred: bool) -> str:
        return "the host asks whether a shape is still that of the step"


class Masked(Shaped):
    """z that moves a share of the weights of every parameter, the same ones for `interval` steps.

    ``mask="magnitude"``: those with ``|theta| <= h``, h the smallest threshold that leaves at least
    ``share`` of the tensor's weights below or at it, from theta at the first sweep of a window.
    ``mask="random"``: each with the probability ``share``, from a stream of its own.

    State per parameter: ``mask``, a bit a weight, uint8 [ceil(numel / 8)], and ``mask_window``, the
    number of the window that it was made in, int64 [].
    """

    fixed = ("interval",)
    together = ("mask", "mask_window")

    def __init__(self, distribution: str, share: float, mask: str) -> None:
        super().__init__(distribution)
        self.share = share
        self.mask = mask

    def shapes(self, bucket: Bucket, sweep: Sweep) -> list[Tensor]:
        windows, masks = bucket.once("mask", lambda: self._gathered(bucket))
        step = sweep.terms[0].step
        assert isinstance(step, int)
        for row, (p, g) in enumerate(zip(bucket.params, bucket.group_of, strict=True)):
            window = step // bucket.fixed[g]["interval"]
            if window != windows[row]:
                # The weights rest at theta: this sweep is the first of the window.
                if self.mask == "random":
                    key = stream_keys(sweep.seed, [Stream(Purpose.MASK, window)], bucket.device)
                    where = slice(row, row + 1)
                    chosen = random_mask(p, self.share, bucket.ids[where], key)
                else:
                    chosen = magnitude_mask(p, self.share)
                pack(chosen, masks[row])
                windows[row] = window
                self.state[p]["mask_window"].fill_(window)
        return masks

    def _gathered(self, bucket: Bucket) -> tuple[list[int], list[Tensor]]:
        windows, masks = [], []
        for p in bucket.params:
            state, size = self.state[p], mask_bytes(p.numel(), 0)
            if "mask" not in state:
                state["mask"] = torch.zeros(size, dtype=torch.uint8, device=p.device)
                state["mask_window"] = torch.tensor(-1, dtype=torch.int64, device="cpu")
            check_state("mask", state["mask"], (size,), p)
            windows.append(int(state["mask_window"]))
            masks.append(state["mask"])
        return windows, masks


def _parts(p: Tensor) -> Iterator[Tensor]:
    """The magnitudes of the weights in order, as integers that rise with them, a chunk at a
    time: the bits of float32."""
    flat = p.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        yield flat[start : start + CHUNK].abs().float().view(torch.int32)


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that has the number of this rank (from 1 on), and its rank in the bin."""
    ends = counts.cumsum(0)
    found = int((ends < rank).sum())
    return found, rank - int(ends[found] - counts[found])


def threshold(p: Tensor, rank: int) -> int:
    """The bits of the `rank`-th smallest ``|p|`` (from 1 on), exactly: the bin of the upper halves
    of the bits, then that of the lower halves within it. Counts are integers, so it is the same on
    all devices."""
    counts = sum(torch.bincount(part >> 16, minlength=1 << 15) for part in _parts(p))
    assert isinstance(counts, Tensor)
    high, rank = _bin_of(counts, rank)
    counts = sum(
        torch.bincount(part[part >> 16 == high] & 0xFFFF, minlength=1 << 16) for part in _parts(p)
    )
    assert isinstance(counts, Tensor)
    low, _ = _bin_of(counts, rank)
    return high << 16 | low


def magnitude_mask(p: Tensor, share: float) -> Iterator[Tensor]:
    """bool, a chunk at a time: whether a weight is among the smallest."""
    most = threshold(p, max(math.ceil(share * p.numel()), 1))
    return (part <= most for part in _parts(p))


def random_mask(p: Tensor, share: float, ids: Tensor, key: Tensor) -> Iterator[Tensor]:
    """bool, a chunk at a time: whether an element's word is below ``share * 2**32``."""
    below = round(share * 2**32)
    for start in range(0, p.numel(), CHUNK):
        size = min(CHUNK, p.numel() - start)
        words = torch.empty(size, dtype=torch.int64, device=p.device)
        operators.bits_([words], ids, torch.full_like(ids, start), key)
        yield words < below


def pack(chosen: Iterator[Tensor], mask: Tensor) -> None:
    """Bits in the order of elements, the first one lowest."""
    places = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    at = 0
    for part in chosen:
        eights = torch.nn.functional.pad(part.to(torch.uint8), (0, -part.numel() % 8)).view(-1, 8)
        size = len(eights)
        mask[at : at + size] = (eights * places).sum(1, dtype=torch.uint8)
        at += size


class Scaled(Shaped):
    """``z / sqrt(H)`` with H of the optimizer's state, ones at first (HiZOO, arXiv 2402.15173).

    State per parameter: ``hessian``, float32 of its shape.
    """

    curvatures: Sequence[float] = ()  # of this step's queries

    def shapes(self, bucket: Bucket, sweep: Sweep | None = None) -> list[Tensor]:
        return bucket.once("hessian", lambda: self._gathered(bucket))

    def _gathered(self, bucket: Bucket) -> list[Tensor]:
        for p in bucket.params:
            if "hessian" not in self.state[p]:
                made = torch.ones_like(p, dtype=torch.float32, requires_grad=False)
                self.state[p]["hessian"] = made
            check_state("hessian", self.state[p]["hessian"], p.shape, p)
        return [self.state[p]["hessian"] for p in bucket.params]

    def learn(self, buckets: Any, seed: int, step: int, grads: Sequence[float]) -> None:
        """The curvatures of a step's queries, before its update."""
        self.curvatures = grads
