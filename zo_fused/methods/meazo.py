"""MEAZO: one adaptive step length for all weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from zo_fused.checks import bounded
from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.sgd import SGD
from zo_fused.step.buckets import Bucket
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import StepOptions
from zo_fused.step.vectors import Flag, Vector, all_finite, where
from zo_fused.sweeps.arithmetic import square_root


class _Dense(Dense):
    """Directions that stay as they are, whatever a log says that queries found."""

    def not_sharded(self) -> str:
        return ""

    def learn(
        self, buckets: Sequence[Bucket], seed: int, step: int, grads: Sequence[float]
    ) -> None:
        pass


@method(Recipe("meazo", "MEAZO"))
class MEAZO(ZerothOrderOptimizer):
    """Memory-efficient adaptive zeroth-order SGD (arXiv 2605.03869): with z and g as in MeZO and
    one second moment for all weights, ``v = beta v + (1 - beta) g^2``, ``v' = v / (1 - beta^t)``,
    ``theta = theta - lr * (g z / (sqrt(v') + zeta) + weight_decay * theta)``. With several queries
    v is of the mean of their g. t counts steps that were not skipped.

    Two forward passes, three sweeps (two with ``deferred``). State: v and t, two float64 (a pair
    for each block), under ``state["meazo"]``. Replay logs have ``g / (sqrt(v') + zeta)``, and g
    itself, of which v is made, so a step takes some 80 bytes.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate: what a weight moves in a step of the usual slope, times z.
        beta: of v, in [0, 1).
        zeta: what is added to the root, >= 0.
        distribution: of the elements of z: "gaussian", "hadamard" or "rademacher".
        common: eps, weight_decay, rounding, seed, deferred, one_sided, queries, block_order: see
            `ZerothOrderOptimizer`.
    """

    _in_step = False  # whether `transform` has seen what `update` gets; in a replay it has not

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-5,
        beta: float = 0.99,
        zeta: float = 1e-8,
        distribution: str = "gaussian",
        **common: Unpack[StepOptions],
    ) -> None:
        beta = bounded("beta", beta, "a number in [0, 1)", lambda x: 0 <= x < 1)
        zeta = bounded("zeta", zeta, "a number >= 0", lambda x: x >= 0)
        options = {"beta": beta, "zeta": zeta, "distribution": distribution}
        super().__init__(params, _Dense(distribution), SGD(), {"lr": lr}, options, **common)
        self.beta, self.zeta = beta, zeta

    def transform(self, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]) -> Vector:
        """``g / (sqrt(v') + zeta)``."""
        queries = self.schedule.queries
        mean = grads.view(-1, queries).mean(1)  # a row a block
        v, t = self._average(mean, all_finite(grads))
        self._in_step = True
        if self.weights.log.is_open and all(map(math.isfinite, found := mean.tolist())):
            self.weights.log.probes = found
        root = square_root(v / (1 - self.beta**t))
        return grads / (root + self.zeta).repeat_interleave(queries)

    def update(self, grads: Vector) -> None:
        found = None if self._in_step else self.weights.log.probes
        self._in_step = False
        if found is not None:
            mean = torch.tensor(found, dtype=torch.float64, device=grads.device)
            self._average(mean, all_finite(mean))
        super().update(grads)

    def _average(self, mean: Tensor, good: Flag) -> Tensor:
        """v and t of a step's blocks, [2, blocks], after these projected gradients, if they are
        good."""
        kept = [self._kept(block, mean.device) for block in self._blocks()]
        v, t = torch.stack(kept, 1)
        v = where(good, self.beta * v + (1 - self.beta) * mean**2, v)
        t = where(good, t + 1, t)
        for block, now in zip(kept, torch.stack([v, t], 1), strict=True):
            block.copy_(now)
        return torch.stack([v, t])

    def _blocks(self) -> list[int]:
        """The blocks of this step; without blocks, one for all."""
        order, blocks = self.schedule.block_order, self.weights.blocks()
        if order == "simultaneous":
            return blocks
        return [0 if order is None else blocks[self.step_count % len(blocks)]]

    def _kept(self, block: int, device: torch.device) -> Tensor:
        """v and t of a block, float64 [2], which the state has."""
        kept = self.state["meazo"]
        if block not in kept:
            every = [0] if self.schedule.block_order is None else self.weights.blocks()
            new = {b: torch.zeros(2, dtype=torch.float64, device=device) for b in every}
            kept.update(new | kept)
        kept[block] = kept[block].to(device)  # the state may be of a run elsewhere
        found: Tensor = kept[block]
        return found
