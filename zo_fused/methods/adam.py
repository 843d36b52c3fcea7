"""ZOAdam: Adam on zeroth-order estimates."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from zo_fused.checks import choice, whole
from zo_fused.directions.dense import Dense
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.history import AdamOfHistory
from zo_fused.rules.moments import STATE_DTYPES, Adam
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import StepOptions


@method(Recipe("zo-adam", "ZO-Adam", {"lr": 1e-5}))
class ZOAdam(ZerothOrderOptimizer):
    """Adam (Kingma and Ba 2015; decay as in AdamW) with the estimate ``g z`` of MeZO as gradient:
    MeZO-Adam (arXiv 2305.17333, appendix B.2), ZO-Adam (arXiv 2402.11592).

    ``m = b1 m + (1 - b1) g z``, ``v = b2 v + (1 - b2) (g z)^2``,
    ``theta = (1 - lr weight_decay) theta - lr m' / (sqrt(v') + adam_eps)`` with the bias-corrected
    m' and v'; the bias corrections count the steps that were not skipped.

    Two forward passes, three sweeps (two with ``deferred``); the last of them moves weights and
    moments at once. State: m and v, 8 bytes a weight in float32. The benchmark's code keeps both in
    the dtype of the weights, where float16 turns its 1e-8 into 0; here v is float32 always.

    ``history=H`` stores nothing dense (the storage-efficient form of the MeZO paper's appendix):
    m and v are made anew at every step, in registers, from the estimates of the last H steps: each
    is a number and a stream. What is older is dropped, and the bias corrections know it; over the
    first H steps it is ZOAdam. State: 8 H + 8 bytes a parameter tensor. The last sweep of a step
    then draws H directions.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        betas: decay of m and v, each in [0, 1).
        adam_eps: added to the root, > 0.
        state_dtype: of m: "float32", or "param", the dtype of each weight.
        distribution: of the elements of z: "gaussian", "hadamard" or "rademacher".
        history: None, or H: keep the coefficients of the last H steps instead of moments, see
            above.
        common: eps, weight_decay, rounding, seed, deferred, one_sided, queries, block_order: see
            `ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        state_dtype: str = "float32",
        distribution: str = "gaussian",
        history: int | None = None,
        **common: Unpack[StepOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "adam_eps": adam_eps,
        }
        choice("state_dtype", state_dtype, STATE_DTYPES)
        if history is not None:
            history = whole("history", history, 1)
        alone = common.get("queries", 1) == 1 and common.get("block_order") != "sequential"
        if history is not None and not alone:
            raise ValueError("history takes one query a step, of all parameters")
        rule = Adam(state_dtype) if history is None else AdamOfHistory(history)
        options = {"state_dtype": state_dtype, "distribution": distribution, "history": history}
        super().__init__(params, Dense(distribution), rule, defaults, options, **common)
