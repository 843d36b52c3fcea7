"""A tiny model, its loss and its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

INPUT = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))


MIXED = "mixed"  # in the place of a dtype: one layer in bfloat16, one in float32


class Casting(nn.Sequential):
    """Layers of several dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        first, between, last = self
        return last(between(first(x.to(first.bias.dtype))).to(last.bias.dtype))  # type: ignore[no-any-return]


def network(dtype: torch.dtype | str = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    if isinstance(dtype, torch.dtype):
        return nn.Sequential(*layers).to(dtype)
    model = Casting(*layers)
    model[0].bfloat16()
    return model


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    x = INPUT.to(next(model.parameters()).dtype)
    return lambda: model(x).float().square().mean()


def masks_of_two_steps(opt: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    """Where a model that ends in a dropout gave zeros, evaluation by evaluation."""
    masks: list[Tensor] = []

    def closure() -> Tensor:
        out = model(torch.ones(1, 4))
        masks.append(out == 0)
        return out.mean()

    for _ in range(2):
        opt.step(closure)
    return masks


def blocks(model: nn.Module) -> list[dict[str, Any]]:
    """The two layers of `network`."""
    named = list(model.named_parameters())
    return [{"params": named[:2], "block": 0}, {"params": named[2:], "block": 1}]


def snapshot(model: nn.Module) -> list[Tensor]:
    """Copies of the weights, at theta between steps whatever the schedule."""
    return [w.clone() for w in model.state_dict().values()]


def same(a: nn.Module | list[Tensor], b: nn.Module | list[Tensor]) -> bool:
    """Whether the weights are equal."""
    one, two = (list(x.state_dict().values()) if isinstance(x, nn.Module) else x for x in (a, b))
    return all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
