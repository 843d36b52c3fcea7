"""Dense directions whose weights pass theta on their way from one z to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zo_fused.directions.dense import Dense
from zo_fused.step.direction import Sweep
from zo_fused.step.vectors import float32


def by_theta(sweep: Sweep) -> Sequence[Sweep]:
    """A sweep back along the first z, then one along the second."""
    return [sweep._replace(terms=[term]) for term in sweep.terms]


class Homing(Dense):
    """Weights go from theta + a to theta + b in one pass, but are rounded at theta, in registers.

    In 16 bits ``(w + a) - a`` is w again for most weights, whereas ``(w + a) + (b - a)`` is another
    neighbour of w + b, and with many z in a step such roundings add up to a random walk.
    """

    def legs(self, sweep: Sweep) -> Sequence[Sweep]:
        return by_theta(sweep)

    def move(self, sweep: Sweep) -> None:
        bucket, seed, terms, _, _ = sweep
        if len(terms) != 2:
            self.sweep(sweep)
            return
        keys = self.keys(seed, terms, bucket.device)
        first, second = self.stretched(seed, terms, [term.coeffs for term in terms])
        script, decay = bucket.once("by theta", lambda: _script(float32(bucket.ones)))
        coeffs = torch.stack([float32(c) for c in (first, bucket.zeros, second, bucket.zeros)], -1)
        rows = (keys, script, coeffs.view(-1, 2, 2), decay)
        bucket.prepared("dense_steps_")(*rows, **self.options)

    def not_sharded(self) -> str:
        return ""

    def not_capturable(self, deferred: bool) -> str:
        return "the host has the script of a move from one z to another"


def _script(ones: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sweeps of a direction each, without stochastic rounding; their decay."""
    script = torch.tensor([[0, -1, -1], [1, -1, -1]], dtype=torch.int64, device="cpu")
    return script, torch.stack([ones, ones], dim=1)
