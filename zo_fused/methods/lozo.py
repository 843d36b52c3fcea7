"""LOZO and LOZO-M: zeroth-order SGD along lazily sampled low-rank directions."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from zo_fused.checks import switch
from zo_fused.directions.factored.direction import Factored
from zo_fused.directions.low_rank import LowRank
from zo_fused.methods.beside import evaluated_module, rounding_of
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.factor_momentum import FactorMomentum
from zo_fused.rules.sgd import SGD
from zo_fused.step.hyper import hyper
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import StepOptions


@method(
    Recipe("lozo", "LOZO"),
    Recipe("lozo-m", "LOZO-M", {"momentum": 0.9}),
)
class LOZO(ZerothOrderOptimizer):
    """Low-rank zeroth-order SGD (Chen et al. 2024, arXiv 2410.07698); with momentum, LOZO-M.

    For a matrix (m, n): ``z = U V^T`` with U (m, rank) drawn every step and V (n, rank) every
    ``interval`` steps; one-dimensional parameters get dense z. g as in MeZO, and
    ``theta = theta - lr * (g z + weight_decay * theta)``; with momentum, for the factor N,
    ``N = momentum * N + (1 - momentum) * g * U``,
    ``theta = theta - lr * (N V^T + weight_decay * theta)``, and N is projected on every new V
    (``N = N V_old^T V_new / n``, through the r x r product).

    Two forward passes, three sweeps (two with ``deferred``). No state; with momentum (m, rank)
    float32 a matrix.

    Paper and released code differ: the paper divides the estimate of a matrix by the rank, the code
    does not, so ``lr_code = lr_paper / rank``. The default is the code's.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate. The released scripts use 1e-7 to 1e-6 for OPT models.
        rank: columns of U and V.
        interval: steps (nu) for which V stays.
        momentum: 0 for LOZO, else the momentum coefficient of LOZO-M, in [0, 1). Whether there is
            momentum is chosen for the run; a group can only set its coefficient, and without
            momentum it has none.
        divide_by_rank: scale the update of matrices by 1/rank, as the paper does.
        rounding: of updates in 16-bit weights: "nearest", or "stochastic", without bias. The
            default is "stochastic" in mode "factored", where nothing else would keep updates below
            a weight's last place, else "nearest" (docs/performance.md).
        distribution: of the elements of U and V: see `MeZO`.
        mode: "inplace", or "factored": weights are not written within a window. The forward pass
            adds ``x V (A +- eps U)^T`` beside every use of a matrix, updates add up in A, in
            float32, and each window ends with one sweep. `flush` writes A, so evaluate the model
            under ``with opt.unperturbed():``. Where the model uses a matrix in a way that has no
            such form, it is perturbed in place, and the logger "zo_fused" says so.
        paired: (factored) evaluate both signs in one forward pass over twice the batch, so that
            weights are read once: faster where a batch has few tokens. The closure must be one that
            `torch.vmap` can batch.
        module: the model that the closure evaluates, for mode "factored" where `params` is not it.
        common: eps, weight_decay, seed, one_sided (not paired), queries (with the same V), and for
            mode "inplace" deferred, block_order ("sequential" without momentum only): see
            `ZerothOrderOptimizer`.
    """

    def __init__(  # type: ignore[misc]  # its own default of rounding
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        rank: int = 2,
        interval: int = 50,
        momentum: float = 0.0,
        divide_by_rank: bool = False,
        rounding: str | None = None,
        distribution: str = "gaussian",
        mode: str = "inplace",
        paired: bool = False,
        module: nn.Module | None = None,
        **common: Unpack[StepOptions],
    ) -> None:
        evaluated = evaluated_module("LOZO", params, module, mode, paired, common)
        divide_by_rank = switch("divide_by_rank", divide_by_rank)
        momentum = hyper("momentum", momentum)
        if momentum and common.get("block_order") == "sequential":
            raise ValueError("a block would miss the steps at which its momentum moves to a new V")
        defaults = {
            "lr": lr,
            "rank": rank,
            "interval": interval,
            "rounding": rounding_of(rounding, mode),
        }
        if momentum:
            defaults["momentum"] = momentum
        rule = FactorMomentum() if momentum else SGD()
        # Groups may set their own momentum; this one chose the rule, so a replay needs it.
        options = {
            "divide_by_rank": divide_by_rank,
            "momentum": momentum,
            "mode": mode,
            "distribution": distribution,
        }
        direction = LowRank(divide_by_rank, distribution)
        if evaluated is not None:
            direction = Factored(
                evaluated, paired, divide_by_rank=divide_by_rank, distribution=distribution
            )
        super().__init__(params, direction, rule, defaults, options, **common)
