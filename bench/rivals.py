"""The published steps as fast as PyTorch makes them: what zo_fused must beat.

Each makes the four sweeps of `published` with the same formula, and draws the noise anew in each,
but writes the weights in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.published import EPS, GRAD, LR, MeZO, gaussian, perturbed, updated


class Rival(MeZO):
    """Over the parameters and the kept factors of a published method."""

    def __init__(self, published: MeZO) -> None:
        super().__init__(published.params)
        self.v = published.v

    def add(self, coeff: float, seed: int) -> None:
        """``p += coeff * z`` for all parameters."""
        raise NotImplementedError

    def perturb(self, scaling_factor: float, seed: int = 0) -> None:
        self.add(scaling_factor * EPS, seed)

    def update(self, seed: int = 0) -> None:
        self.add(-LR * GRAD, seed)


# ---- torch.compile -------------------------------------------------------------------------------


def fused_gaussian(shape: Sequence[int], like: Tensor) -> Tensor:
    """Inductor makes this one part of a kernel; `torch.normal` it calls."""
    return torch.randn(shape, device=like.device, dtype=like.dtype)


def _perturb(p: Tensor, v: Tensor | None, scaling_factor: Tensor) -> None:
    # On a CPU inductor's own random numbers take ten times as long as torch's.
    draw = fused_gaussian if p.is_cuda else gaussian
    p.copy_(perturbed(p, v, scaling_factor, draw))


def _update(p: Tensor, v: Tensor | None) -> None:
    p.copy_(updated(p, v, fused_gaussian if p.is_cuda else gaussian))


class Compiled(Rival):
    """`torch.compile` of what the published code does to a tensor.

    Compiled when it is made, for all sizes, so that no timed call compiles.
    """

    def __init__(self, published: MeZO, backend: str = "inductor") -> None:
        super().__init__(published)
        self._perturb: Any = torch.compile(_perturb, backend=backend, dynamic=True)
        self._update: Any = torch.compile(_update, backend=backend, dynamic=True)
        for dense in (True, False):
            for p, v in [(p, v) for p, v in self._tensors() if (v is None) == dense][:1]:
                few = p[:16].clone()
                self._perturb(few, v, self._factor(1))
                self._update(few, v)

    def _factor(self, number: float) -> Tensor:
        """A tensor, as each number would be compiled anew."""
        return torch.tensor(float(number), device=self.params[0].device)

    def _tensors(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for p in self.params:
            v = self.v.get(id(p))
            yield (p.data.view(-1) if v is None else p.data), v

    def perturb(self, scaling_factor: float, seed: int = 0) -> None:
        torch.manual_seed(seed)
        factor = self._factor(scaling_factor)
        for p, v in self._tensors():
            self._perturb(p, v, factor)

    def update(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        for p, v in self._tensors():
            self._update(p, v)


# ---- torch._foreach ------------------------------------------------------------------------------


class Foreach(Rival):
    """One generator fills one buffer for many tensors, and list operations add it to them."""

    BUFFER = 1 << 26  # elements, unless one tensor has more

    def __init__(self, published: MeZO) -> None:
        super().__init__(published)
        self.generator = torch.Generator(self.params[0].device)
        self.groups: list[list[tuple[Any, torch.Size]]] = []
        left = 0
        for p in self.params:
            v = self.v.get(id(p))
            shape = p.shape if v is None else torch.Size((p.shape[0], v.shape[1]))
            if shape.numel() > left:
                self.groups.append([])
                left = max(self.BUFFER, shape.numel())
            self.groups[-1].append((p, shape))
            left -= shape.numel()

    def add(self, coeff: float, seed: int) -> None:
        self.generator.manual_seed(seed)
        for group in self.groups:
            sizes = [shape.numel() for _, shape in group]
            noise = group[0][0].new_empty(sum(sizes)).normal_(generator=self.generator)
            parts = [
                (p, part.view(shape))
                for (p, shape), part in zip(group, noise.split(sizes), strict=True)
            ]
            dense = [(p.data, z) for p, z in parts if id(p) not in self.v]
            if dense:
                torch._foreach_add_(*map(list, zip(*dense, strict=True)), alpha=coeff)
            for p, u in parts:
                if id(p) in self.v:
                    p.data.addmm_(u, self.v[id(p)].t(), alpha=coeff)


RIVALS: dict[str, Callable[[MeZO], MeZO]] = {"compiled": Compiled, "foreach": Foreach}
