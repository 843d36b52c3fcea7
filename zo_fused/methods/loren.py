"""LOREN: directions that are shorter along an estimated curvature."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_fused.checks import bounded, whole
from zo_fused.directions.curved import Curved
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.curved import CurvedSGD
from zo_fused.step.hyper import hyper
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import Position


@method(Recipe("loren", "LOREN"))
class LOREN(ZerothOrderOptimizer):
    """Low-rank curvature for zeroth-order optimization (arXiv 2511.07971), as in
    the released code: with ``u_k ~ N(0, I)`` and a vector a of every parameter,
    ``d_k = u_k - (1 + sqrt(rho) / s) (a . u_k) / |a|^2 a``, ``s = sqrt(rho + |a|^2)``, whose
    covariance is ``rho (rho I + a a^T)^-1``. From K losses ``f_k = L(theta + eps d_k)`` and no
    other, each with the mean of the rest for a baseline (leave-one-out),
    ``w_k = (f_k - mean) / (K - 1)``, ``g d = 1/eps sum w_k d_k``,
    ``m = momentum m + (1 - momentum) g d``, ``theta = theta - lr * (m + weight_decay * theta)`` and
    ``a = a - lr_cov sum w_k (a / (rho + |a|^2) - (a . d_k) d_k / rho)``, which is the slope of the
    mean loss over d.

    For a matrix (m, n) a has n numbers and stands in every row; sums are over the whole matrix.
    Others have one of their own shape.

    K forward passes, K + 1 sweeps (K with ``deferred``) and, for ``a . u_k``, K passes over the
    noise alone. Sweeps are made in panels of 64 MB, which costs more traffic than a sweep of MeZO.
    State: m, 4 bytes a weight (none with ``momentum=0``), and a, 4 n bytes a matrix.

    The released code makes K updates a step, changes a in between, so that it updates along other
    directions than it looked along, and multiplies the slope of a by eps^2, with which a stays.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        queries: K, at least 2.
        momentum: of m, in [0, 1), as in `LOZO`. Whether there is momentum is chosen for the run; a
            group can only set its coefficient.
        lr_cov: learning rate of a, >= 0.
        rho: damping, > 0: directions along a have variance ``rho / (rho + |a|^2)``, others 1.
        distribution: of the elements of u: "gaussian", "hadamard" or "rademacher".
        eps, weight_decay, rounding, seed, parallel, deferred, block_order: see
            `ZerothOrderOptimizer`.
    """

    needs_closure = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        queries: int = 5,
        momentum: float = 0.9,
        lr_cov: float = 1e-3,
        rho: float = 0.1,
        distribution: str = "gaussian",
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
            raise ValueError("LOREN compares each loss with the others of a step: queries >= 2")
        momentum = hyper("momentum", momentum)
        lr_cov = bounded("lr_cov", lr_cov, "a finite number >= 0", lambda x: 0 <= x < float("inf"))
        rho = bounded("rho", rho, "a finite number > 0", lambda x: 0 < x < float("inf"))
        super().__init__(
            params,
            Curved(rho, distribution),
            CurvedSGD(lr_cov, bool(momentum)),
            {"lr": lr} | ({"momentum": momentum} if momentum else {}),
            {"momentum": momentum, "lr_cov": lr_cov, "rho": rho, "distribution": distribution},
            eps=eps,
            weight_decay=weight_decay,
            rounding=rounding,
            seed=seed,
            parallel=parallel,
            deferred=deferred,
            queries=queries,
            block_order=block_order,
        )

    def positions(self) -> list[Position]:
        return [Position(1.0, query) for query in range(self.weights.queries())]
