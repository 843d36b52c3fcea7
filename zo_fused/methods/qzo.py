"""QZO: zeroth-order SGD on the scales of quantized weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import Any

from torch import Tensor, nn

from zo_fused.checks import bounded
from zo_fused.directions.dense import Dense
from zo_fused.methods.scales import moved_away, quantization_scales, scales_of
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.sgd import SGD, Floored
from zo_fused.step.evaluation import Closure
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.vectors import Vector


@method(Recipe("qzo", "QZO"))
class QZO(ZerothOrderOptimizer):
    """Quantized zeroth-order SGD (arXiv 2505.13430). The weights of a quantized layer are
    ``s * code``; theta is the scales s of all of them, the codes stay. ``z ~ N(0, I)``, g as in
    MeZO, and with the directional derivative clipped (DDC)
    ``theta = max(theta - lr * (clamp(g, -clip, clip) z + weight_decay * theta), floor)``.

    Two forward passes, three sweeps over the scales, which are 1/32 to 1/4096 of the weights in
    number, and a clamp. No state. With several queries each g is clipped. `projected_grad` and
    replay logs have the clipped g. All else in the model stays as it is: norms, embeddings, biases,
    zero points. A model in eval or train mode is left in it.

    eps, lr and clip are in units of the scales, which depend on the quantizer: the paper's are for
    four bits in groups of 128. See docs/methods/qzo.md.

    Args:
        params: the module, whose scales are found (`zo_fused.quantization_scales` says which); or
            named tensors, or param groups of them: scales, and parameters that require gradients.
        lr: learning rate.
        clip: the largest magnitude of g, or None.
        floor: the smallest value of an element of theta, or None.
        distribution: of the elements of z: "gaussian", "hadamard" or "rademacher".
        eps, weight_decay, rounding, seed, parallel, one_sided, queries: see
            `ZerothOrderOptimizer`. There is no ``deferred``: weights that rest perturbed are not
            guarded where a layer reads its scale from inside a weight.

    Raises:
        ValueError: the module has no quantized layer, or one whose scales can't be moved; eps of a
            group is, or becomes, above a third of its scales (of a module); floor is not None and
            theta has negative elements.
        RuntimeError: in a step: the module has other scales now, or a layer of its own was
            replaced.
    """

    quantized = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-7,
        clip: float | None = 100.0,
        floor: float | None = 1e-7,
        distribution: str = "gaussian",
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "nearest",
        seed: int = 0,
        parallel: Option = "auto",
        one_sided: bool = False,
        queries: int = 1,
    ) -> None:
        if clip is not None:
            clip = bounded("clip", clip, "a number > 0", lambda x: x > 0)
        if floor is not None:
            floor = bounded("floor", floor, "a finite number >= 0", lambda x: 0 <= x < 1e30)
        scales = scales_of(params) if isinstance(params, nn.Module) else []
        if isinstance(params, nn.Module) and not scales:
            raise ValueError(
                "the model has no quantized layer, whose scales QZO would tune: load it with a "
                "quantization_config, or quantize it (torchao.quantization.quantize_)"
            )
        self.clip = clip
        self._floored = floor is not None
        self._scales = scales
        self._sizes: dict[Tensor, float] = {}  # of what was looked at, when it came
        super().__init__(
            params,
            Dense(distribution),
            SGD() if floor is None else Floored(floor),
            {"lr": lr},
            {"clip": clip, "floor": floor, "distribution": distribution},
            eps=eps,
            weight_decay=weight_decay,
            rounding=rounding,
            seed=seed,
            parallel=parallel,
            one_sided=one_sided,
            queries=queries,
        )
        if scales:
            self.weights.parameters.checks.append(self._check_places)
            self.look()

    @staticmethod
    def found_in(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
        return quantization_scales(module)

    @staticmethod
    def moves(p: Tensor) -> bool:
        """Nobody freezes a buffer, or what is inside a weight."""
        return p.requires_grad or not isinstance(p, nn.Parameter)

    def transform(self, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]) -> Vector:
        """``clamp(g, -clip, clip)``."""
        return grads if self.clip is None else grads.clamp(-self.clip, self.clip)

    def estimate(self, closure: Closure, weight: Any = 1.0) -> Tensor:
        """As that of other optimizers; the scales are at theta afterwards."""
        loss = super().estimate(closure, weight)
        self.flush()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        if self._scales:
            raise TypeError(
                "a QZO of a model can't be copied or pickled, as the scales of the copy would "
                "belong to no model: make one of the copied model, and load_state_dict"
            )
        return super().__getstate__()

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        names = group.get("param_names") or range(len(group["params"]))
        for name, p in zip(names, group["params"], strict=True):
            if p in self._sizes or p.is_meta:
                continue
            if self._floored and bool((p < 0).any()):
                raise ValueError(
                    f"{name!r} has negative elements, which floor would raise: it is no scale, or "
                    "of a quantizer with signed ones; pass floor=None"
                )
            self._sizes[p] = float(p.detach().float().square().mean().sqrt())
        scales = [p for p in group["params"] if not isinstance(p, nn.Parameter)]
        sizes = [self._sizes[p] for p in scales if p in self._sizes]
        if sizes:
            _check_eps(group["eps"], sizes)

    def _check_places(self) -> None:
        for scale in self._scales:
            if moved_away(scale):
                raise RuntimeError(
                    f"the model has another tensor for {scale.name} than when the optimizer was "
                    "made (was its layer replaced, moved to a device or dtype, or packed?): make "
                    "the optimizer anew"
                )


def _check_eps(eps: float, sizes: Sequence[float]) -> None:
    """A perturbation past zero turns around the weights of whole groups: it must take more than
    three standard deviations of z.

    Args:
        sizes: root mean square of the scale of each layer.

    Raises:
        ValueError: it takes less in half of the layers.
    """
    typical = median_low(sizes)
    if 3 * eps > typical:
        raise ValueError(
            f"eps={eps:g} is too large for the scales, {typical:.2g} in the median layer: theta + "
            f"eps z would have other signs than theta. Take a part of them, as {typical / 20:.1g}"
        )
