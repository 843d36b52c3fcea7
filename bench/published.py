"""The published algorithms in plain PyTorch: the operations of the released codes, in their order.

MeZO (arXiv 2305.17333): three perturbing sweeps and an update, noise drawn anew in each from a
reseeded generator in the weight's dtype, weights rebound. LOZO (arXiv 2410.07698): the same with
the product of two factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

EPS, LR, GRAD = 1e-3, 1e-6, 0.37

Gaussian = Callable[[Sequence[int], Tensor], Tensor]  # of a shape, in another tensor's dtype


def gaussian(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.normal(mean=0, std=1, size=shape, device=like.device, dtype=like.dtype)


def direction(p: Tensor, v: Tensor | None, draw: Gaussian = gaussian) -> Tensor:
    """z of a tensor: dense, or low-rank with the factor v."""
    if v is None:
        return draw(p.shape, p)
    return draw((p.shape[0], v.shape[1]), p) @ v.t()


def perturbed(
    p: Tensor, v: Tensor | None, scaling_factor: float | Tensor, draw: Gaussian = gaussian
) -> Tensor:
    return p + scaling_factor * direction(p, v, draw) * EPS


def updated(p: Tensor, v: Tensor | None, draw: Gaussian = gaussian) -> Tensor:
    return p - LR * (GRAD * direction(p, v, draw))


class MeZO:
    """Dense directions."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)
        self.v: dict[int, Tensor] = {}  # factors that are kept, by the id of the parameter

    def z(self, p: nn.Parameter) -> Tensor:
        return direction(p.data, self.v.get(id(p)))

    def perturb(self, scaling_factor: float, seed: int = 0) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            p.data = perturbed(p.data, self.v.get(id(p)), scaling_factor)

    def update(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            p.data = updated(p.data, self.v.get(id(p)))

    def step_without_forward(self) -> None:
        self.perturb(1)
        self.perturb(-2)
        self.perturb(1)
        self.update()


class LOZO(MeZO):
    """Low-rank directions; V is kept, U is drawn in every sweep. Vectors have dense ones."""

    def __init__(self, params: Iterable[nn.Parameter], rank: int) -> None:
        super().__init__(params)
        self.v = {
            id(p): p.new_empty(p.shape[-1], rank).normal_() for p in self.params if p.dim() > 1
        }


METHODS: dict[str, Callable[[Iterable[nn.Parameter]], MeZO]] = {
    "MeZO": MeZO,
    "LOZO": lambda params: LOZO(params, rank=2),
}
