"""The numbers of a step, a row a parameter: float64 tensors on the parameters' device.

On GPUs nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_fused.noise.keys import on_device

Vector = Tensor  # float64 [P]
Flag = bool | Tensor  # a Tensor [] of dtype bool where the host would have to wait for it


def on_host(device: torch.device) -> bool:
    """Whether the host has the numbers of parameters there."""
    return device.type == "cpu"


def vector(values: Sequence[float], device: torch.device) -> Vector:
    """Numbers of the host."""
    return on_device(torch.tensor(values, dtype=torch.float64, device="cpu"), device)


def filled(number: float, device: torch.device) -> Tensor:
    """A number of the host, float64 []: an argument of a kernel, so nothing is copied."""
    return torch.full((), number, dtype=torch.float64, device=device)


def stacked(numbers: Sequence[float | Tensor], device: torch.device) -> Vector:
    """Numbers of the host, or tensors [] on the device."""
    if isinstance(numbers[0], Tensor):
        return torch.stack([torch.as_tensor(number) for number in numbers])
    return vector([float(number) for number in numbers], device)


def flag_on(flag: Flag, device: torch.device) -> Flag:
    """A flag as vectors of that device go with it."""
    if not isinstance(flag, Tensor):
        return flag
    return bool(flag) if on_host(device) else flag.to(device)


def all_finite(values: Vector) -> Flag:
    """Whether there is neither infinity nor NaN."""
    finite = torch.isfinite(values).all()
    return bool(finite) if on_host(values.device) else finite


def where(condition: Flag, value: Vector, otherwise: Vector | float) -> Vector:
    """The one or the other, for a flag or a vector of them."""
    if isinstance(condition, Tensor):
        return torch.where(condition, value, otherwise)
    return value if condition else torch.zeros_like(value) + otherwise


def as_float32(number: float | Tensor) -> Tensor:
    """A number of the host, or a tensor [], as a tensor, float32 []."""
    if isinstance(number, Tensor):
        return number.float()
    return torch.tensor(number, dtype=torch.float32, device="cpu")


def float32(value: Vector) -> Tensor:
    """A vector as the sweeps take it; what is too large becomes infinite."""
    return value.float()


def table(columns: Sequence[Vector]) -> Tensor:
    """Vectors side by side as the sweeps take them, float32 [P, columns]."""
    side_by_side = torch.stack(list(columns), -1) if len(columns) > 1 else columns[0].unsqueeze(-1)
    return side_by_side.float()
