"""TeZO: zeroth-order steps along a few fixed rank-one matrices."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from zo_fused.checks import switch
from zo_fused.directions.diagonal import BesideDiagonal, Diagonal
from zo_fused.methods.beside import ADAM_EPS, BETAS, adam_of, evaluated_module, mode_of, rounding_of
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.factor_momentum import FactorMomentum
from zo_fused.rules.separable_adam import SeparableAdam
from zo_fused.rules.sgd import SGD
from zo_fused.step.hyper import hyper
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.rule import Rule
from zo_fused.step.schedule import StepOptions

WHOLE_RUN = 1 << 62  # no run has as many steps, and it is an int64


@method(
    Recipe("tezo", "TeZO"),
    Recipe("tezo-m", "TeZO-m", {"momentum": 0.9}),
    Recipe("tezo-adam", "TeZO-Adam", {"moments": "adam", "lr": 1e-5}, "deferred"),
)
class TeZO(ZerothOrderOptimizer):
    """Temporally low-rank zeroth-order SGD (Sun et al. 2025, arXiv 2501.19057); with momentum,
    TeZO-m; with ``moments="adam"``, TeZO-Adam.

    For a matrix (m, n): ``z = s U diag(tau) V^T`` with U (m, rank) and V (n, rank) drawn once for
    the run (or every ``interval`` steps), tau (rank) every step; one-dimensional parameters get
    dense z. g as in MeZO, and ``theta = theta - lr * (g z + weight_decay * theta)``; with momentum,
    ``a = momentum * a + (1 - momentum) * g * tau`` and
    ``theta = theta - lr * (s U diag(a) V^T + weight_decay * theta)``, begun again at a new window.

    Without ``interval`` the change of a matrix in a run is ``U diag(a) V^T``: `rank` numbers of it
    are trained, whatever its size.

    With Adam, ``a = beta1 a + (1 - beta1) g tau``, ``b = beta2 b + (1 - beta2) (g tau)^2``,
    corrected as Adam's, and ``theta = theta - lr * (M / (sqrt(S) + adam_eps) + weight_decay
    theta)`` with ``M = s U diag(a) V^T``, ``S = s^2 U^2 diag(b) (V^2)^T`` (squares of elements):
    a step of full rank, so there is no mode "factored". One-dimensional parameters: Adam.

    Two forward passes, three sweeps (two with ``deferred``); factored one a window, so without
    ``interval`` none before `flush`. Adam's update is made in panels, up to three of 64 MB, with
    two products of `rank` terms a weight. U and V are cached: 8 (m + n) rank bytes a matrix, two
    windows. No state; with momentum 4 rank bytes a matrix and 4 bytes an element of other
    parameters; with Adam twice as much.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        rank: columns of U and V. The paper takes the ranks of layers from their spectra, 32 on
            average.
        interval: None: U and V stay for the run, as in the paper; or the steps for which they stay.
        momentum: 0 for TeZO, else the momentum coefficient of TeZO-m, in [0, 1), as in `LOZO`.
        moments: "adam", or None.
        betas, adam_eps: of moments "adam".
        scale: s = 1 / sqrt(rank), so that eps and lr are those of dense directions; False: 1, the
            paper's.
        rounding: as in `LOZO`.
        mode: "inplace", or "factored": weights are not written within a window, and the
            coefficients of tau are kept beside them in float32 (see `LOZO`). None: "factored" where
            the rank is 32 or more, the model is known and neither deferred nor block_order is
            given.
        paired, module: for mode "factored", as in `LOZO`.
        common: eps, weight_decay, seed, one_sided (not paired), queries, and for mode "inplace"
            deferred and block_order: see `ZerothOrderOptimizer`.
    """

    def __init__(  # type: ignore[misc]  # its own default of rounding
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        rank: int = 24,
        interval: int | None = None,
        momentum: float = 0.0,
        moments: str | None = None,
        betas: tuple[float, float] = BETAS,
        adam_eps: float = ADAM_EPS,
        scale: bool = False,
        rounding: str | None = None,
        mode: str | None = None,
        paired: bool = False,
        module: nn.Module | None = None,
        **common: Unpack[StepOptions],
    ) -> None:
        rank, scale = hyper("rank", rank), switch("scale", scale)
        momentum = hyper("momentum", momentum)
        of_adam = adam_of(moments, betas, adam_eps)
        if moments:
            if momentum:
                raise ValueError('moments="adam" has a momentum of its own, betas[0]: momentum=0')
            if mode == "factored":
                raise ValueError(
                    "the step of Adam has full rank: it can't be kept beside weights, as factored "
                    "and paired steps are"
                )
            mode = "inplace"
        mode = mode_of(mode, rank, params, module, common)
        evaluated = evaluated_module("TeZO", params, module, mode, paired, common)
        defaults: dict[str, Any] = {
            "lr": lr,
            "rank": rank,
            "interval": WHOLE_RUN if interval is None else interval,
            "rounding": rounding_of(rounding, mode),
        }
        rule: Rule = SGD()
        if momentum:
            defaults["momentum"] = momentum
            rule = FactorMomentum()
        if moments:
            defaults |= of_adam
            rule = SeparableAdam()
        direction = Diagonal(scale)
        if evaluated is not None:
            direction = BesideDiagonal(evaluated, paired, scale=scale)
        options: dict[str, Any] = {"scale": scale, "momentum": momentum, "mode": mode}
        if moments:
            options["moments"] = moments
        super().__init__(params, direction, rule, defaults, options, **common)
