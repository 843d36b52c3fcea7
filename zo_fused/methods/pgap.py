"""P-GAP: perturbations in the space of an estimated gradient, aligned with it; SVD-0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from zo_fused.checks import FLOAT32_MAX, bounded, choice, switch, whole
from zo_fused.directions.aligned import ALIGNMENTS, LEARNT, Aligned, BesideAligned
from zo_fused.methods.beside import evaluated_module, mode_of, rounding_of
from zo_fused.methods.table import Recipe, method
from zo_fused.methods.vectors_apart import vectors_apart
from zo_fused.parallel.options import Option
from zo_fused.rules.sgd import SGD
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import Position


@method(
    Recipe("p-gap", "P-GAP"),
    Recipe("svd-0", "SVD-0", {"delta": None, "probes": 1, "interval": 1000}),
)
class PGAP(ZerothOrderOptimizer):
    """Projected gradient-aligned perturbations (arXiv 2510.18228).

    Every `interval` steps, `probes` dense directions estimate the gradient of each matrix (m, n),
    ``G^ = 1/h sum c_j Z_j``, and ``G^ ~ U S V^T`` of rank r. Between, ``z = s U Z V^T`` with

        ``Z = Z0 - (<S, Z0> - xi sqrt(delta) |S|) / |S|^2 S``,  Z0 ~ N(0, 1)^(r, r),  xi = +-1,

    g as in MeZO along the z of all matrices, and ``theta = theta - lr (g z + weight_decay theta)``.
    delta falls linearly from ``delta[0]`` to ``delta[1]`` over `total_steps`. One-dimensional
    parameters get dense z. With ``delta=None, probes=1, interval=1000`` this is SVD-0.

    Two forward passes and three sweeps (factored: none); at a window's start 2 h more of both (with
    `probes_one_sided` h + 1 forwards), and six passes over the noise of G^, which is never in
    memory: 64 MB whatever the layer. Kept beside the weights: (2 m + n + 2 r) r float32 a matrix.
    State: what the probes found.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate.
        rank: r, or the shorter side of a matrix where that is less.
        interval: steps for which a space stays, the same for all groups.
        probes: h.
        delta: at the first step and at step `total_steps`; None: no alignment.
        total_steps: of the run; needed where delta changes. Skipped steps count.
        align: "matrix", the paper's reading: a sign xi a matrix; "shared": the same sign for all;
            "joint": also inner product and norm are those of all matrices together, which must be
            on one device.
        scale: s is ``sqrt(m n) / r``, so that the elements of z have variance 1, and eps and lr are
            of MeZO's size. False, the paper: s = 1, eps near 0.1 and lr near 1e-2 for LoRA; such
            values destroy one-dimensional parameters, which need `vector_lr` and `vector_eps`.
        probes_one_sided: take L(theta) once instead of a second side of every probe.
        vector_lr, vector_eps: of one-dimensional parameters, which then have param groups of their
            own (after those of the matrices); None: as the matrices.
        mode: "inplace", or "factored": within a window cores are kept beside the weights, in
            float32, and the forward pass adds what they stand for: see `LOZO`. Only probes and the
            end of a window sweep over the weights then. None: "factored" for a rank of 32 or more
            where the model is known.
        module: the model that the closure evaluates, for mode "factored" where `params` is not it.
        rounding: of updates in 16-bit weights: "nearest", or "stochastic"; the default is
            "stochastic" in mode "factored".
        eps, weight_decay, seed, parallel, one_sided, queries: see `ZerothOrderOptimizer`. There is
            no `deferred`: a sweep can't go along a z that is not learnt yet; and no `block_order`:
            probes move all blocks.
    """

    needs_closure = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        rank: int = 128,
        interval: int = 100,
        probes: int = 10,
        delta: Sequence[float] | None = (2.0, 0.0),
        total_steps: int | None = None,
        align: str = "matrix",
        scale: bool = True,
        probes_one_sided: bool = False,
        vector_lr: float | None = None,
        vector_eps: float | None = None,
        rounding: str | None = None,
        mode: str | None = None,
        module: nn.Module | None = None,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        parallel: Option = "auto",
        one_sided: bool = False,
        queries: int = 1,
    ) -> None:
        probes = whole("probes", probes, 1)
        if total_steps is not None:
            total_steps = whole("total_steps", total_steps, 1)
        ends = _delta(delta, total_steps)
        scale = switch("scale", scale)
        self.align = choice("align", align, ALIGNMENTS)
        mode = mode_of(mode, rank, params, module, {})
        evaluated = evaluated_module("PGAP", params, module, mode, False, {})
        direction = Aligned(ends, total_steps, align, scale)
        if evaluated is not None:
            direction = BesideAligned(
                evaluated, delta=ends, total_steps=total_steps, align=align, scale=scale
            )
        self._of_vectors = {"lr": vector_lr, "eps": vector_eps}
        probes_one_sided = switch("probes_one_sided", probes_one_sided)
        plus = [Position(1.0, probe, True) for probe in range(probes)]
        self._of_window = [Position(0.0), *plus]
        if not probes_one_sided:
            self._of_window = [p for one in plus for p in (one, one._replace(sign=-1.0))]
        options = {
            "probes": probes,
            "delta": None if ends is None else list(ends),
            "total_steps": total_steps,
            "align": align,
            "scale": scale,
            "probes_one_sided": probes_one_sided,
            "vector_lr": vector_lr,
            "vector_eps": vector_eps,
            "mode": mode,
        }
        super().__init__(
            params,
            direction,
            SGD(),
            {"lr": lr, "rank": rank, "interval": interval},
            options,
            eps=eps,
            weight_decay=weight_decay,
            rounding=rounding_of(rounding, mode),
            seed=seed,
            parallel=parallel,
            one_sided=one_sided,
            queries=queries,
        )

    def in_groups(self, params: Any) -> Any:
        return vectors_apart(params, **self._of_vectors)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        first = self.param_groups[0]
        if group["interval"] != first["interval"]:
            raise ValueError(
                "interval must be the same in all param groups: probes move all of them at once"
            )

    def forwards_of(self, steps: int) -> int:
        windows = -(-steps // self.param_groups[0]["interval"])
        return steps * len(self.positions()) + windows * len(self._of_window)

    def probes(self) -> list[Position]:
        """At a window's start, and until they have found something."""
        self.weights.groups.check_changes()
        learnt: dict[str, Any] | None = self.state.get(LEARNT)
        interval = self.param_groups[0]["interval"]
        if learnt is not None and learnt["step"] // interval == self.step_count // interval:
            return []
        if self.align == "joint":
            self._check_eps()
        return self._of_window

    def _check_eps(self) -> None:
        """Lengths of different matrices are compared, which estimates along another eps don't
        have."""
        groups = self.param_groups
        of_matrices = {
            float(group["eps"]) for group in groups if any(p.dim() >= 2 for p in group["params"])
        }
        if len(of_matrices) > 1:
            raise ValueError(
                f'align="joint" needs one eps for all matrices, not {sorted(of_matrices)}; use '
                'align="matrix"'
            )


def _delta(delta: Sequence[float] | None, total_steps: int | None) -> tuple[float, float] | None:
    """Both ends of delta.

    Raises:
        ValueError: they are not two numbers, or change over a number of steps that is not known.
    """
    if delta is None:
        return None
    two = list(delta) if isinstance(delta, Sequence) else []
    if len(two) != 2:
        raise ValueError(f"delta must be two numbers or None, got {delta!r}")
    first, last = (
        bounded(f"delta[{i}]", end, "a finite number >= 0", lambda x: 0 <= x <= FLOAT32_MAX)
        for i, end in enumerate(two)
    )
    if first != last and total_steps is None:
        raise ValueError(
            f"delta goes from {first:g} to {last:g} over total_steps, which must be given; "
            "delta=(1, 1) would stay"
        )
    return first, last
