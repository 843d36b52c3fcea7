"""ForwardGrad: exact directional derivatives by forward-mode differentiation."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zo_fused.directions.dense import Dense
from zo_fused.directions.factored.stand_ins import Places
from zo_fused.noise.keys import Stream, stream_keys
from zo_fused.noise.streams import Purpose, as_int64
from zo_fused.rules.sgd import SGD
from zo_fused.step.buckets import Bucket
from zo_fused.step.generators import GeneratorStates
from zo_fused.step.optimizer import Closure, ZerothOrderOptimizer
from zo_fused.step.schedule import Position, Schedule
from zo_fused.step.vectors import Vector, float32_scalar, stacked, to_float32
from zo_fused.sweeps import operators

# By a part of PyTorch's message: how models of transformers do without the operator.
_CURES = {
    "grouped_mm": "; load it with experts_implementation='eager'",
    "attention": "; load it with attn_implementation='sdpa' or 'eager'",
    "flash": "; load it with attn_implementation='sdpa' or 'eager'",
}


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
        seed: base seed of the run.
        queries: directions a step, whose estimates are averaged.
        distribution: of the elements of z: "gaussian", or "rademacher", -1 or 1.
    """

    needs_closure = True

    def __init__(
        self,
        module: nn.Module,
        lr: float | Tensor = 1e-6,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
        queries: int = 1,
        distribution: str = "gaussian",
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "rounding": rounding}
        direction = Dense(distribution)
        direction.module = module if isinstance(module, nn.Module) else None
        schedule = Schedule(queries=queries)
        super().__init__(module, defaults, direction, SGD(), seed, schedule)
        self._options = {"queries": schedule.queries, "distribution": distribution}

    def _usual_path(self) -> list[Any]:
        return []

    def _estimate(self, closure: Closure) -> tuple[Tensor, Vector]:
        self._look_again()
        self._perturb(Position(0.0))  # nothing moves, but parameters are looked at
        if self._direction.module is None:
            raise ValueError("ForwardGrad needs the module: ForwardGrad(model, ...)")
        generators, losses, grads = (
            GeneratorStates(bucket.device for bucket in self._buckets),
            [],
            [],
        )
        for query in range(self._schedule.queries):
            if query:
                generators.rewind()
            loss, grad = self._along(closure, query)
            losses.append(loss)
            grads.append(grad)
        device = self._buckets[0].device
        mean = stacked(losses, device).sum() / len(losses)
        return float32_scalar(mean), to_float32(stacked(grads, device))

    def _along(self, closure: Closure, query: int) -> tuple[Any, Any]:
        """The loss and its derivative along the z of a query."""
        assert self._direction.module is not None
        places = Places(self._direction.module)
        with self._timed("forward"), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals: dict[int, Tensor] = {}
            for bucket in self._buckets:
                for p, tangent in zip(bucket.params, self._tangents(bucket, query), strict=True):
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
        return self._scalar(value), self._scalar(tangent)

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

    def _tangents(self, bucket: Bucket, query: int) -> list[Tensor]:
        """z of a query of the coming step for every parameter, in its dtype."""
        streams = [Stream(Purpose.DENSE, self.step_count, query=query)]
        key = stream_keys(self.seed, streams, bucket.device)
        transform = self._direction.options.get("transform", "portable")
        made = []
        for p, id_ in zip(bucket.params, bucket.id_list, strict=True):
            z = torch.empty(p.shape, dtype=torch.float32, device=p.device)
            ids = bucket.ids.new_full((1,), as_int64(id_))
            operators.normal_([z], ids, torch.zeros_like(ids), key, transform)
            made.append(z.to(p.dtype))
        return made
