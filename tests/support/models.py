"""Tiny models and losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    dtype = next(model.parameters()).dtype
    return lambda: model(x.to(dtype)).float().square().mean()
