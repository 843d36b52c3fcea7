"""The published algorithms in plain PyTorch: the operations of the released codes, in their order.

MeZO (arXiv 2305.17333): three perturbing sweeps and an update, noise drawn anew in each from a
reseeded generator in the weight's dtype, weights rebound. LOZO (arXiv 2410.07698): the same with
the product of two factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

EPS, LR, GRAD = 1e-3, 1e-6, 0.37


def _gaussian(p: Tensor) -> Tensor:
    return torch.normal(mean=0, std=1, size=p.size(), device=p.device, dtype=p.dtype)


class MeZO:
    """Dense directions."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)

    def z(self, p: nn.Parameter) -> Tensor:
        return _gaussian(p.data)

    def perturb(self, scaling_factor: float, seed: int = 0) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            p.data = p.data + scaling_factor * self.z(p) * EPS

    def update(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            p.data = p.data - LR * (GRAD * self.z(p))

    def step_without_forward(self) -> None:
        self.perturb(1)
        self.perturb(-2)
        self.perturb(1)
        self.update()


class LOZO(MeZO):
    """Low-rank directions; V is kept, U is drawn in every sweep."""

    def __init__(self, params: Iterable[nn.Parameter], rank: int) -> None:
        super().__init__(params)
        self.rank = rank
        self.v = {
            id(p): p.new_empty(p.shape[-1], rank).normal_() for p in self.params if p.dim() > 1
        }

    def z(self, p: nn.Parameter) -> Tensor:
        if p.dim() < 2:
            return _gaussian(p.data)
        u = torch.randn(p.shape[0], self.rank, device=p.device, dtype=p.dtype)
        return u @ self.v[id(p)].t()


METHODS: dict[str, Callable[[Iterable[nn.Parameter]], MeZO]] = {
    "MeZO": MeZO,
    "LOZO": lambda params: LOZO(params, rank=2),
}
