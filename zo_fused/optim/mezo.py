"""MeZO: zeroth-order SGD along dense Gaussian directions. Floor 9."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_fused.directions import Dense
from zo_fused.optim.base import ZerothOrderOptimizer
from zo_fused.rules import SGD


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).

    ``z ~ N(0, I)``, ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)``,
    ``theta = theta - lr * (g z + weight_decay * theta)``.

    Two forward passes, three sweeps (two with ``deferred``), no state. The released code decays
    parameters by name (all but biases and layer norms); here the param groups decide.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate. The paper uses 1e-7 to 1e-6 for whole OPT models.
        eps: perturbation radius.
        weight_decay: decay, with the learning rate as factor.
        rounding: of the update in 16-bit weights: "nearest", or "stochastic", without bias.
        seed: base seed of the run.
        deferred: two sweeps a step instead of three; weights rest perturbed between steps, see
            `ZerothOrderOptimizer` and `flush`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "nearest",
        seed: int = 0,
        deferred: bool = False,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rounding": rounding}
        super().__init__(params, defaults, Dense(), SGD(), seed, deferred)
