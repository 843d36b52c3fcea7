"""MeZO: zeroth-order SGD along dense Gaussian directions."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from zo_fused.checks import choice
from zo_fused.directions.guided import Guided
from zo_fused.methods.prior import TakesPrior, direction_of
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.moments import STATE_DTYPES, Momentum
from zo_fused.rules.sgd import SGD
from zo_fused.step.hyper import hyper
from zo_fused.step.schedule import StepOptions


@method(
    Recipe("mezo", "MeZO"),
    Recipe("mezo-m", "MeZO-M", {"lr": 1e-7, "momentum": 0.9}),
    Recipe("mezo-gv", "MeZO-GV", {"lr": 4e-7, "prior": "guiding"}),
    Recipe("mezo-greedy", "MeZO-Greedy", {"lr": 2e-7, "prior": "greedy"}),
)
class MeZO(TakesPrior):
    """Memory-efficient zeroth-order SGD (Malladi et al. 2023, arXiv 2305.17333, algorithm 1).

    ``z ~ N(0, I)``, ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)``,
    ``theta = theta - lr * (g z + weight_decay * theta)``. With momentum (MeZO-M; ZO-SGD-MMT in
    arXiv 2402.11592) ``m = momentum * m + (1 - dampening) * g z`` takes the place of ``g z``.

    Two forward passes, three sweeps (two with ``deferred``). No state; with momentum m. The
    released code decays parameters by name (all but biases and layer norms); here the param groups
    decide.

    With a prior (MeZO-GV, MeZO-Greedy; arXiv 2601.04710), z is made of `pool` candidates
    ``u_j ~ N(0, I)``, whose losses are taken at ``theta + eps u_j`` first: the mean of the better
    half minus that of the worse ("guiding"), the best ("greedy"), or the better of two minus the
    worse, one of them the better one of the last step ("survivor"); in each case with elements of
    variance 1. ``pool + 2`` forward passes and ``pool + 3`` sweeps, the last ones with `pool`
    directions ("greedy": ``pool + 1``, ``pool + 2`` and one; all one sweep less with ``deferred``).
    The host waits for the losses of the candidates, once a step, which needs a closure. No state;
    with "survivor" the name of a candidate.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate. The paper uses 1e-7 to 1e-6 for whole OPT models.
        momentum: 0, or the coefficient of m, in [0, 1). Whether there is momentum is chosen for the
            run; a group can only set its coefficient, and without momentum it has none.
        dampening: 0 is the heavy ball; ``dampening=momentum`` the exponential moving average.
        state_dtype: of m: "float32", or "param", the dtype of each weight.
        distribution: of the elements of z: "gaussian"; "hadamard", nearly that and cheaper to make;
            or "rademacher", -1 or 1.
        prior: None, "guiding", "greedy" or "survivor": see above. Without momentum.
        pool: candidates of a query, at least 2; 4 by default. With two, "guiding" is MeZO at twice
            its price; "survivor" always has two.
        common: eps, weight_decay, rounding, seed, deferred, one_sided, queries, block_order (not
            with a prior: candidates move all weights): see `ZerothOrderOptimizer`.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        momentum: float = 0.0,
        dampening: float = 0.0,
        state_dtype: str = "float32",
        distribution: str = "gaussian",
        prior: str | None = None,
        pool: int | None = None,
        **common: Unpack[StepOptions],
    ) -> None:
        momentum, dampening = hyper("momentum", momentum), hyper("dampening", dampening)
        choice("state_dtype", state_dtype, STATE_DTYPES)
        defaults = {"lr": lr}
        if momentum:
            defaults |= {"momentum": momentum, "dampening": dampening}
        rule = Momentum(state_dtype) if momentum else SGD()
        options = {"momentum": momentum, "state_dtype": state_dtype, "distribution": distribution}
        direction = direction_of(prior, pool, distribution)
        if isinstance(direction, Guided):
            if momentum:
                raise ValueError("a prior makes z anew in each step, without momentum: momentum=0")
            if common.get("block_order") is not None:
                raise ValueError("the candidates of a prior move all weights: no block_order")
            options |= {"prior": prior, "pool": direction.pool}  # states without have neither
        super().__init__(params, direction, rule, defaults, options, **common)
