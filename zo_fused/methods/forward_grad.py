"""ForwardGrad: exact directional derivatives by forward-mode differentiation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_fused.directions.dense import Dense
from zo_fused.directions.factored.stand_ins import Places
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.sgd import SGD
from zo_fused.step.direction import Term
from zo_fused.step.estimates import Estimate
from zo_fused.step.evaluation import Closure
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import Position
from zo_fused.step.vectors import stacked

# By a part of PyTorch's message: how models of transformers do without the operator.
_CURES = {
    "grouped_mm": "; load it with experts_implementation='eager'",
    "attention": "; load it with attn_implementation='sdpa' or 'eager'",
    "flash": "; load it with attn_implementation='sdpa' or 'eager'",
}


class DenseOf(Dense):
    """Dense directions, and the module whose parameters they belong to; None: a replay."""

    def __init__(self, module: nn.Module | None, distribution: str) -> None:
        super().__init__(distribution)
        self.module = module


@method(Recipe("forward-grad", "Forward-Grad"))
class ForwardGrad(ZerothOrderOptimizer):
    """Forward gradient descent (Baydin et al. 2022, arXiv 2202.08587; Forward-Grad in 2402.11592).

    ``z ~ N(0, I)``, ``g = <grad L(theta), z>`` from one forward pass with tangents, exact and
    without a radius; ``theta = theta - lr * (g z + weight_decay * theta)``. The mean of ``g z`` is
    the gradient.

    One forward pass, which computes values and tangents, and one sweep. No state, but while it
    runs every weight has a tangent in its own dtype: as much memory again as the weights, and
    tangents of activations beside the activations. Several queries make as many passes, one after
    the other, and one sweep.

    Attention runs on PyTorch's own operators (the "math" kernels), as fused kernels know no
    tangents. A model must be made of operators that do.

    Args:
        module: the model that the closure evaluates.
        lr: learning rate.
        weight_decay: decay, with the learning rate as factor.
        rounding: of the update in 16-bit weights: "nearest", or "stochastic", without bias. No
            restore dithers this update, so small ones need "stochastic".
        distribution: of the elements of z: "gaussian", "hadamard" or "rademacher".
        seed, parallel, queries: see `ZerothOrderOptimizer`.
    """

    needs_closure = True
    differentiates = True

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 1e-6,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        distribution: str = "gaussian",
        *,
        seed: int = 0,
        parallel: Option = "auto",
        queries: int = 1,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "rounding": rounding}
        direction = DenseOf(module if isinstance(module, nn.Module) else None, distribution)
        options = {"distribution": distribution}
        common: Any = {"seed": seed, "parallel": parallel, "queries": queries}
        super().__init__(module, direction, SGD(), defaults, options, **common)

    def positions(self) -> list[Position]:
        return []  # the weights stay at theta

    @property
    def forwards(self) -> int:
        return self.schedule.queries

    def measure(self, closure: Closure) -> Estimate:
        queries = self.schedule.queries
        rows = self.numbers_at_theta(queries, 2, partial(self._slope, closure))
        slopes, losses = zip(*rows, strict=True)
        device = self.weights.buckets[0].device
        mean = stacked(losses, device).double().mean()
        return Estimate(mean.float(), stacked(slopes, device), losses, losses)

    def _slope(self, closure: Closure, query: int) -> tuple[Tensor, Tensor]:
        """The derivative of the loss along the z of a query, and the loss."""
        direction = self.direction
        assert isinstance(direction, DenseOf)
        if direction.module is None:
            raise ValueError("ForwardGrad needs the module: ForwardGrad(model, ...)")
        places = Places(direction.module)
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals: dict[int, Tensor] = {}
            for bucket in self.weights.buckets:
                term = Term(self.weights.step, bucket.ones, query=query)
                tangents = direction.drawn(bucket, self.seed, term)
                for p, tangent in zip(bucket.params, tangents, strict=True):
                    if p not in places:
                        raise ValueError(
                            f"ForwardGrad: no submodule holds a parameter of shape {tuple(p.shape)}"
                        )
                    duals[id(p)] = forward_ad.make_dual(p.detach(), tangent)
            with places.holding(duals):
                loss = self._differentiable(closure)
            value, tangent = forward_ad.unpack_dual(loss)
        if tangent is None:
            raise ValueError(
                "ForwardGrad: the loss carries no tangent: it must be computed from the module's "
                "parameters, by differentiable operators, and returned as a tensor"
            )
        return tangent, value.detach()

    @staticmethod
    def _differentiable(closure: Closure) -> Any:
        try:
            return closure()
        except NotImplementedError as error:
            reason = str(error)
            if "forward AD" not in reason and "forward mode AD" not in reason:
                raise
            cure = next((cure for name, cure in _CURES.items() if name in reason), "")
            raise NotImplementedError(
                "ForwardGrad: the model uses an operator that has no forward-mode derivative"
                f"{cure}: {reason}"
            ) from error
