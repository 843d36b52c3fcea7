"""SubZero and SubZero+: zeroth-order steps in a random subspace of every matrix."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from zo_fused.checks import switch
from zo_fused.directions.subspace import BesideSubspace, Subspace
from zo_fused.methods.beside import ADAM_EPS, BETAS, adam_of, evaluated_module, mode_of, rounding_of
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.core_adam import CoreAdam
from zo_fused.rules.sgd import SGD
from zo_fused.step.hyper import hyper
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.rule import Rule
from zo_fused.step.schedule import StepOptions


@method(
    Recipe("subzero", "SubZero"),
    Recipe("subzero-adam", "SubZero+", {"moments": "adam", "lr": 1e-3}),
)
class SubZero(ZerothOrderOptimizer):
    """Zeroth-order SGD in random subspaces (Yu et al. 2024, arXiv 2410.08989); with
    ``SubZero(queries=K, one_sided=True, moments="adam")`` SubZero+ (arXiv 2608.15665).

    For a matrix (m, n): ``z = s U Z V^T`` with U (m, rank) and V (n, rank) of orthonormal columns,
    drawn every ``interval`` steps, Z (rank, rank) every step, and ``s = sqrt(m n) / rank``; the
    rank of a matrix is ``min(rank, m, n)``. One-dimensional parameters get dense z. g as in MeZO,
    and ``theta = theta - lr * (g z + weight_decay * theta)``.

    With Adam: ``G = mean of g Z`` over the queries, Adam's ``m' / (sqrt(v') + adam_eps)`` of G,
    element by element of the core, and ``theta = theta - lr * s U (m' / ..) V^T`` and the decay.
    The moments begin again at each window. One-dimensional parameters have dense Adam.

    ``2 queries`` forward passes, one-sided ``queries + 1``; three sweeps (two with ``deferred``),
    factored one a window. U and V are made once a window, by a Cholesky factorization (rank, rank)
    a matrix on the host, and cached: 8 (m + n) rank bytes a matrix, two windows. No state; with
    Adam 8 rank^2 bytes a matrix and 8 bytes an element of other parameters.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate. Papers: 1e-7 to 1e-6, as MeZO's; with Adam 2e-2.
        rank: columns of U and V.
        interval: steps for which U and V stay.
        scale: s as above, in perturbation and update, so that eps and lr are those of dense
            directions; False: 1.
        moments: None, or "adam", in the core.
        betas, adam_eps: of Adam, if there is one.
        rounding: as in `LOZO`.
        mode: "inplace", or "factored": weights are not written within a window, and the core is
            kept beside them in float32 (see `LOZO`). None: "factored" where the rank is 32 or more,
            the model is known and neither deferred nor block_order is given.
        paired, module: for mode "factored", as in `LOZO`.
        common: eps, weight_decay, seed, one_sided (not paired), queries (in the same subspace), and
            for mode "inplace" deferred and block_order: see `ZerothOrderOptimizer`.
    """

    def __init__(  # type: ignore[misc]  # its own default of rounding
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        rank: int = 48,
        interval: int = 1000,
        scale: bool = True,
        moments: str | None = None,
        betas: tuple[float, float] = BETAS,
        adam_eps: float = ADAM_EPS,
        rounding: str | None = None,
        mode: str | None = None,
        paired: bool = False,
        module: nn.Module | None = None,
        **common: Unpack[StepOptions],
    ) -> None:
        rank, scale = hyper("rank", rank), switch("scale", scale)
        mode = mode_of(mode, rank, params, module, common)
        evaluated = evaluated_module("SubZero", params, module, mode, paired, common)
        defaults: dict[str, Any] = {
            "lr": lr,
            "rank": rank,
            "interval": interval,
            "rounding": rounding_of(rounding, mode),
        }
        rule: Rule = SGD()
        if of_adam := adam_of(moments, betas, adam_eps):
            defaults |= of_adam
            rule = CoreAdam()
        direction = Subspace(scale)
        if evaluated is not None:
            direction = BesideSubspace(evaluated, paired, scale=scale)
        options = {"scale": scale, "moments": moments, "mode": mode}
        super().__init__(params, direction, rule, defaults, options, **common)
