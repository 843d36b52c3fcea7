"""Quantized linear layers of plain torch: int8 codes, and a scale for every group of a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

INPUT = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


class Int8Linear(nn.Module):
    """``y = x (scales * codes)^T + bias`` with codes int8 (rows, groups, columns of a group)."""

    def __init__(self, linear: nn.Linear, group: int = 4) -> None:
        super().__init__()
        weight = linear.weight.detach().unflatten(1, (-1, group))
        scales = weight.abs().amax(-1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales.squeeze(-1))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def weight(self, scales: Tensor) -> Tensor:
        """The weight with these scales."""
        return (scales.unsqueeze(-1) * self.codes.to(scales.dtype)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight(self.scales), self.bias)


def quantized_network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two quantized layers with a norm between them."""
    torch.manual_seed(0)
    first, last = nn.Linear(8, 12), nn.Linear(12, 4)
    layers = [Int8Linear(first), nn.Tanh(), nn.LayerNorm(12), Int8Linear(last)]
    return nn.Sequential(*layers).to(dtype)


def loss_of(model: nn.Module) -> Tensor:
    """Mean squares of what the model makes of `INPUT`."""
    dtype = next(model.parameters()).dtype
    return model(INPUT.to(dtype)).double().square().mean()
