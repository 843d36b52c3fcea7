"""ZO-Muon: steps along the matrix sign of an estimate in a random subspace."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zo_fused.checks import switch
from zo_fused.directions.left_basis import BesideLeftBasis, LeftBasis
from zo_fused.methods.beside import evaluated_module, mode_of, rounding_of
from zo_fused.methods.table import Recipe, method
from zo_fused.methods.vectors_apart import vectors_apart
from zo_fused.parallel.options import Option
from zo_fused.rules.muon import Muon
from zo_fused.step.hyper import hyper
from zo_fused.step.optimizer import ZerothOrderOptimizer


@method(
    Recipe("zo-muon", "ZO-Muon"),
    Recipe("zo-mopi", "ZO-MOPI", {"sign": "power", "momentum": 0.9, "one_sided": False}),
)
class ZOMuon(ZerothOrderOptimizer):
    """ZO-Muon (arXiv 2602.17155): zeroth-order steps along the matrix sign of an estimate.

    For a matrix (m, n): ``z = P Psi``, P (m, r) with orthonormal columns drawn every `interval`
    steps, Psi (r, n) ~ N(0, 1) of a query. With one-sided g of q queries,
    ``M = 1/q sum g_i Psi_i`` and ``theta = theta - lr (P msign(M) + weight_decay theta)``, where
    ``msign(M) = (M M^T)^(-1/2) M`` by five steps of Newton-Schulz with Muon's coefficients
    (singular values end in 0.7 to 1.2), all of them of r x r matrices. One-dimensional parameters:
    dense z, ``theta = theta - lr (1/q sum g_i z_i + weight_decay theta)``.

    With momentum, ``M = momentum M + (1 - momentum) 1/q sum g_i Psi_i``, which a new P takes over
    as ``P_new^T P_old M``; with ``sign="power"`` besides, a step of the power iteration in the
    place of Newton-Schulz: ZO-MOPI (arXiv 2605.09034).

    q + 1 forward passes and q + 1 sweeps (deferred: one less; factored: one a window). No state;
    with momentum (r, n) float32 a matrix, with ``sign="power"`` twice that.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate; with a sign that of the paper, whatever the size of the gradient.
        rank: r, or the shorter side of a matrix where that is less.
        interval: steps for which P stays.
        queries: q.
        one_sided: estimates from ``theta + eps z`` and theta; False: from both sides, 2 q forwards.
        momentum: 0 for the mean of a step's queries, else in [0, 1). Whether there is momentum is
            chosen for the run; a group can only set its coefficient.
        sign: True: by Newton-Schulz; "power": by the power iteration, which goes on from step to
            step and needs momentum; False: M in the place of its sign. lr is then one of SGD.
        vector_lr: of one-dimensional parameters, which then have param groups of their own (after
            those of the matrices); None: as the matrices.
        mode: "inplace", or "factored": sums of Psi are kept beside the weights, which one sweep
            writes at a window's end; see `LOZO`. None: "factored" for a rank of 32 or more, where
            the model is known and neither deferred nor block_order is given.
        module: the model that the closure evaluates, for mode "factored", where `params` is not it.
        rounding: see `LOZO`.
        eps, weight_decay, seed, parallel, and for mode "inplace" deferred, block_order: see
            `ZerothOrderOptimizer` ("sequential" without momentum only).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        rank: int = 64,
        interval: int = 100,
        queries: int = 4,
        one_sided: bool = True,
        momentum: float = 0.0,
        sign: bool | str = True,
        vector_lr: float | None = 1e-6,
        mode: str | None = None,
        module: nn.Module | None = None,
        rounding: str | None = None,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        parallel: Option = "auto",
        deferred: bool = False,
        block_order: str | None = None,
    ) -> None:
        schedule = {"deferred": deferred, "block_order": block_order}
        mode = mode_of(mode, rank, params, module, schedule)
        evaluated = evaluated_module("ZOMuon", params, module, mode, False, schedule)
        momentum = hyper("momentum", momentum)
        if sign != "power":
            sign = switch("sign", sign)
        elif not momentum:
            raise ValueError('sign="power" iterates on a moving average: momentum above 0')
        if momentum and block_order == "sequential":
            raise ValueError(
                "a block would miss the steps at which its momentum moves to a new P: no momentum, "
                "or simultaneous blocks"
            )
        self._vector_lr = vector_lr
        defaults: dict[str, Any] = {"lr": lr, "rank": rank, "interval": interval}
        if momentum:
            defaults["momentum"] = momentum
        super().__init__(
            params,
            LeftBasis() if evaluated is None else BesideLeftBasis(evaluated),
            Muon(bool(momentum), sign),
            defaults,
            {"momentum": momentum, "sign": sign, "vector_lr": vector_lr, "mode": mode},
            eps=eps,
            weight_decay=weight_decay,
            rounding=rounding_of(rounding, mode),
            seed=seed,
            parallel=parallel,
            deferred=deferred,
            queries=queries,
            one_sided=one_sided,
            block_order=block_order,
        )

    def in_groups(self, params: Any) -> Any:
        return vectors_apart(params, lr=self._vector_lr)
