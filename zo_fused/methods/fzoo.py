"""FZOO: one-sided estimates over the standard deviation of their losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zo_fused.checks import whole
from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.sgd import SGD
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.vectors import Vector, stacked, where

# Losses that differ by less of their size tell nothing: they are rounding.
SMALLEST_SPREAD = 1e-12


@method(Recipe("fzoo", "FZOO"))
class FZOO(ZerothOrderOptimizer):
    """Fast zeroth-order SGD (arXiv 2506.09034), a zeroth-order normalized SGD: with the losses
    ``l_0`` at theta and ``l_i`` at ``theta + eps u_i``, u_i of random signs,
    ``theta = theta - lr * (1/N sum_i (l_i - l_0) / sigma * u_i + weight_decay * theta)``, where
    sigma is the standard deviation of ``l_1 .. l_N``. The step is as long in steep places as in
    flat ones, and does not depend on eps as long as the loss is straight over that distance.

    N + 1 forward passes, 2 N sweeps less one for every perturbation that follows another: N + 1
    (N with ``deferred``). No state. A step whose sigma is below 1e-12 times ``|l_0|`` is skipped
    and counted in `skipped_steps`. Replay logs have ``(l_i - l_0) / sigma``.

    Units are those of the released code: sigma divides by N (population), and there is no 1/eps.
    The paper has 1/(N - 1) in sigma and 1/eps before the sum:
    ``lr = lr_paper / eps * sqrt((N - 1) / N)``.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate. The released scripts use 5e-5 for OPT-13B, with eps 1e-4.
        queries: N, at least 2.
        distribution: of the elements of u: "rademacher", "gaussian" or "hadamard".
        eps, weight_decay, rounding, seed, parallel, deferred, block_order: see
            `ZerothOrderOptimizer`. With blocks, sigma is of the losses of a block.
    """

    why_skipped = "a loss was not finite, or none differed from another (larger batches differ)"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 5e-5,
        queries: int = 8,
        distribution: str = "rademacher",
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "nearest",
        seed: int = 0,
        parallel: Option = "auto",
        deferred: bool = False,
        block_order: str | None = None,
    ) -> None:
        if whole("queries", queries, 1) < 2:
            raise ValueError("FZOO divides by the spread of several losses: queries >= 2")
        super().__init__(
            params,
            Dense(distribution),
            SGD(),
            {"lr": lr},
            {"distribution": distribution},
            eps=eps,
            weight_decay=weight_decay,
            rounding=rounding,
            seed=seed,
            parallel=parallel,
            deferred=deferred,
            one_sided=True,
            queries=queries,
            block_order=block_order,
        )

    def transform(self, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]) -> Vector:
        """``(l_i - l_0) / sigma``."""
        queries = self.schedule.queries
        losses, base = stacked(plus, grads.device), stacked(minus, grads.device)
        by_block = losses.view(-1, queries).std(dim=1, correction=0)
        sigma = by_block.repeat_interleave(queries)
        usable = sigma > SMALLEST_SPREAD * base.abs()
        return where(usable, grads * (float(self.param_groups[0]["eps"]) / sigma), math.nan)
