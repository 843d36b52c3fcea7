"""ZOSignSGD: steps of one size along the sign of the estimate."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from zo_fused.checks import choice
from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.moments import Sign
from zo_fused.rules.sgd import ScalarSign
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import StepOptions


@method(Recipe("zo-sign", "ZO-SignSGD"))
class ZOSignSGD(ZerothOrderOptimizer):
    """Sign descent on the estimate ``g z`` of MeZO (ZO-signSGD: Liu et al., ICLR 2019; ZO-SGD-Sign
    in arXiv 2402.11592): ``theta = (1 - lr weight_decay) theta - lr sign(g z)``.

    The benchmark's released code takes another one, ``theta - lr sign(g) z``, and by default feeds
    it to AdamW; ``sign="scalar"`` is that step with plain SGD.

    Two forward passes, three sweeps (two with ``deferred``), no state.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate: what each weight moves in a step (element-wise), or the scale of z.
        sign: "element" or "scalar", see above.
        distribution: of the elements of z: "gaussian", "hadamard" or "rademacher", with which both
            signs are the same where there is one query.
        common: eps, weight_decay, rounding, seed, deferred, one_sided, queries, block_order: see
            `ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        sign: str = "element",
        distribution: str = "gaussian",
        **common: Unpack[StepOptions],
    ) -> None:
        choice("sign", sign, ("element", "scalar"))
        defaults = {"lr": lr}
        rule = Sign() if sign == "element" else ScalarSign()
        options = {"sign": sign, "distribution": distribution}
        super().__init__(params, Dense(distribution), rule, defaults, options, **common)
