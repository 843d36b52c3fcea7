"""LOZO and LOZO-M: zeroth-order SGD along lazily sampled low-rank directions."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from zo_fused.checks import choice, switch, whole
from zo_fused.directions.activations import Activations
from zo_fused.directions.factored.direction import Factored
from zo_fused.directions.low_rank import LowRank
from zo_fused.methods.activations import SeesActivations
from zo_fused.methods.beside import ADAM_EPS, BETAS, adam_of, evaluated_module, rounding_of
from zo_fused.methods.table import Recipe, method
from zo_fused.rules.core_adam import CoreAdam
from zo_fused.rules.factor_momentum import FactorMomentum
from zo_fused.rules.sgd import SGD
from zo_fused.step.hyper import hyper
from zo_fused.step.schedule import StepOptions

INTERVAL = 50
WHOLE_RUN = 1_000_000_000


@method(
    Recipe("lozo", "LOZO"),
    Recipe("lozo-m", "LOZO-M", {"momentum": 0.9}),
    Recipe("agzo", "AGZO", {"basis": "activations", "refresh": INTERVAL}),
    Recipe(
        "zo-act",
        "ZO-Act",
        {
            "basis": "activations",
            "others": "frozen",
            "rank": 1,
            "moments": "adam",
            "interval": WHOLE_RUN,
        },
    ),
)
class LOZO(SeesActivations):
    """Low-rank zeroth-order SGD (Chen et al. 2024, arXiv 2410.07698); with momentum, LOZO-M; with
    ``basis="activations"``, AGZO (2601.17261) or ZO-Act (2607.01125).

    For a matrix (m, n): ``z = U V^T`` with U (m, rank) drawn every step and V (n, rank) every
    ``interval`` steps; one-dimensional parameters get dense z. g as in MeZO, and
    ``theta = theta - lr * (g z + weight_decay * theta)``; with momentum, for the factor N,
    ``N = momentum * N + (1 - momentum) * g * U``,
    ``theta = theta - lr * (N V^T + weight_decay * theta)``, and N is projected on every new V
    (``N = N V_old^T V_new / n``, through the r x r product).

    Two forward passes, three sweeps (two with ``deferred``). No state; with momentum (m, rank)
    float32 a matrix.

    With ``basis="activations"``, V of the matrix of a linear layer is ``sqrt(n) A``, A (n, rank)
    the top right singular vectors of the layer's inputs, in whose span the rows of the gradient
    lie; V^T V = n I, as of the random V in the mean, so eps means the same. It takes 3 evaluations
    at theta before the first step, with `refresh` one more a window (one less with ``one_sided``,
    as it is the baseline), and V as state and in the replay log. Such a step needs a closure.

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
        module: the model that the closure evaluates, for mode "factored" and basis "activations"
            where `params` is not it.
        basis: "random", or "activations": see above. Where the model uses a matrix otherwise than
            as the weight of an `nn.Linear` (an embedding, also one tied to the head), its V is
            random, and the logger "zo_fused" says so.
        refresh: steps after which V is made anew from activations (AGZO), the place of `interval`;
            None: V is made once (ZO-Act), and `interval` is for the random ones, and of windows of
            factored mode.
        others: (activations) all parameters but the matrices of linear layers: "random" as in LOZO,
            or "frozen".
        moments: "adam": Adam on the estimate ``g U`` (ZO-Act), element by element in the factor,
            with moments of shape (m, rank) that begin again with a new window of `interval` steps;
            None: SGD.
        betas, adam_eps: of moments "adam".
        common: eps, weight_decay, seed, one_sided (not paired), queries (with the same V), and for
            mode "inplace" deferred, block_order ("sequential" without momentum only): see
            `ZerothOrderOptimizer`.
    """

    def __init__(  # type: ignore[misc]  # its own default of rounding
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        rank: int = 2,
        interval: int = INTERVAL,
        momentum: float = 0.0,
        divide_by_rank: bool = False,
        rounding: str | None = None,
        distribution: str = "gaussian",
        mode: str = "inplace",
        paired: bool = False,
        module: nn.Module | None = None,
        basis: str = "random",
        refresh: int | None = None,
        others: str = "random",
        moments: str | None = None,
        betas: tuple[float, float] = BETAS,
        adam_eps: float = ADAM_EPS,
        **common: Unpack[StepOptions],
    ) -> None:
        evaluated = evaluated_module("LOZO", params, module, mode, paired, common)
        divide_by_rank = switch("divide_by_rank", divide_by_rank)
        momentum = hyper("momentum", momentum)
        choice("basis", basis, ("random", "activations"))
        choice("others", others, ("random", "frozen"))
        if basis == "random" and (refresh is not None or others != "random"):
            raise ValueError('refresh and others need basis="activations"')
        if refresh is not None:
            refresh = whole("refresh", refresh, 1)
            if interval not in (INTERVAL, WHOLE_RUN, refresh):  # nobody chose the first two
                raise ValueError(
                    f"refresh={refresh} is the interval, too: leave interval out, or change refresh"
                )
            interval = refresh
        of_adam = adam_of(moments, betas, adam_eps)
        if moments and momentum:
            raise ValueError('moments="adam" has a momentum of its own, betas[0]: momentum=0')
        if (momentum or moments) and common.get("block_order") == "sequential":
            raise ValueError(
                "a block would miss the steps at which its momentum moves to a new V: no momentum "
                "or moments, or simultaneous blocks"
            )
        defaults: dict[str, Any] = {
            "lr": lr,
            "rank": rank,
            "interval": interval,
            "rounding": rounding_of(rounding, mode),
            **of_adam,
        }
        if momentum:
            defaults["momentum"] = momentum
        rule = CoreAdam() if moments else FactorMomentum() if momentum else SGD()
        # Groups may set their own momentum; this one chose the rule, so a replay needs it.
        options = {
            "divide_by_rank": divide_by_rank,
            "momentum": momentum,
            "mode": mode,
            "distribution": distribution,
        }
        if moments:
            options["moments"] = moments
        activations = None
        if basis == "activations":
            model = params if isinstance(params, nn.Module) else module
            if model is None:
                raise ValueError(
                    'basis="activations" needs the module whose layers are looked at: '
                    "LOZO(model, ...), or module=model beside param groups"
                )
            options |= {"basis": basis, "refresh": refresh}  # states of "random" have neither
            activations = Activations(model, refresh, still=others == "frozen")
        of_z: dict[str, Any] = {
            "divide_by_rank": divide_by_rank,
            "distribution": distribution,
            "activations": activations,
        }
        direction = LowRank(**of_z) if evaluated is None else Factored(evaluated, paired, **of_z)
        super().__init__(params, direction, rule, defaults, options, **common)
        if others == "frozen":
            self.freeze_others()

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        refresh = None if self._activations is None else self._activations.refresh
        if refresh is not None and group["interval"] != refresh:
            raise ValueError(
                f"V is made anew every refresh={refresh} steps: a group can't have "
                f"interval={group['interval']}"
            )
