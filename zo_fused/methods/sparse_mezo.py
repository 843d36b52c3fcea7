"""Sparse MeZO: steps of a share of the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_fused.checks import bounded, choice
from zo_fused.directions.shaped import Masked
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.sgd import SGD
from zo_fused.step.optimizer import ZerothOrderOptimizer

MASKS = ("magnitude", "random")


@method(Recipe("sparse-mezo", "Sparse MeZO"))
class SparseMeZO(ZerothOrderOptimizer):
    """Sparse MeZO (arXiv 2402.15751): ``z = m u`` with ``u ~ N(0, I)`` and a mask m of zeros and
    ones, g as in MeZO, and ``theta = theta - lr * (g z + weight_decay m theta)``.

    With ``mask="magnitude"`` the small weights move: in every tensor those with ``|theta| <= h``
    where h is the exact quantile of its magnitudes. With ``mask="random"`` each weight moves with
    the probability `share` (the baseline that the benchmark of others calls by the same name). The
    mask is made anew every `interval` steps, from theta before the step's first perturbation: one
    made from perturbed weights would be another at each side. A weight that is not in the mask
    keeps its bits, weight decay and rounding included.

    Two forward passes and three sweeps, which read a bit a weight besides. State: the mask, 1/8
    byte a weight. A new mask costs four passes over the magnitudes and waits for the device.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate; where only a share of the weights moves, larger ones than MeZO's hold.
        share: of the weights of every tensor that move, in (0, 1].
        mask: "magnitude" or "random".
        interval: steps that a mask is kept for.
        distribution: of the elements of u: "gaussian", "hadamard" or "rademacher".
        eps, weight_decay, rounding, seed, parallel, one_sided, queries, block_order: see
            `ZerothOrderOptimizer`. There is no deferred: between its steps there is no theta that a
            new mask could be made from.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        share: float = 0.25,
        mask: str = "magnitude",
        interval: int = 100,
        distribution: str = "gaussian",
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "nearest",
        *,
        seed: int = 0,
        parallel: Option = "auto",
        one_sided: bool = False,
        queries: int = 1,
        block_order: str | None = None,
    ) -> None:
        share = bounded("share", share, bound="a number in (0, 1]", holds=lambda x: 0 < x <= 1)
        choice("mask", mask, MASKS)
        defaults = {
            "lr": lr,
            "interval": interval,
            "eps": eps,
            "weight_decay": weight_decay,
            "rounding": rounding,
        }
        options = {"share": share, "mask": mask, "distribution": distribution}
        direction = Masked(distribution, share, mask)
        super().__init__(
            params,
            direction,
            SGD(),
            defaults,
            options,
            seed=seed,
            parallel=parallel,
            one_sided=one_sided,
            queries=queries,
            block_order=block_order,
        )
