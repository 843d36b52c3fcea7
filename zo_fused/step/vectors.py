"""The numbers of a step, a row a parameter: float64 tensors on the parameters' device.

On GPUs nothing waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.noise.keys import on_device, on_host

Vector = Tensor  # float64 [P]
Flag = bool | Tensor  # a Tensor [] of dtype bool where the host would have to wait for it


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


def judged(grads: Vector) -> tuple[Vector, Flag]:
    """Projected gradients as a step can use them, zeros if one is not finite; and whether that is
    so, for then the step is skipped."""
    if on_host(grads.device):
        skipped = not all(map(math.isfinite, grads.tolist()))
        return torch.zeros_like(grads) if skipped else grads, skipped
    if len(grads) == 1:  # in two kernels
        usable = torch.nan_to_num(grads, nan=0.0, posinf=0.0, neginf=0.0)
        return usable, torch.ne(grads, usable).reshape(())
    finite = torch.isfinite(grads).all()
    return torch.where(finite, grads, 0.0), ~finite


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


def constant(values: Sequence[float], device: torch.device) -> Vector:
    """A vector that is not to be changed. It is rounded for the sweeps once."""
    made = vector(values, device)
    made.in_float32 = made.float()  # type: ignore[attr-defined]
    return made


def as_float64(number: Any) -> Any:
    """A tensor [] in float64; a number of the host as it is."""
    return number.double() if isinstance(number, Tensor) else number


def quotient(value: Tensor, divisor: Tensor) -> Tensor:
    """``value / divisor`` of float64, rounded to float32 in the same kernel."""
    made = torch.empty(value.shape, dtype=torch.float32, device=value.device)
    return torch.div(value, divisor, out=made)


def float32(value: Vector) -> Tensor:
    """A vector as the sweeps take it; what is too large becomes infinite."""
    known: Tensor | None = getattr(value, "in_float32", None)
    return value.float() if known is None else known


def table(columns: Sequence[Vector]) -> Tensor:
    """Vectors side by side as the sweeps take them, float32 [P, columns]."""
    if len(columns) == 1:
        return float32(columns[0]).unsqueeze(-1)
    return torch.stack(list(columns), -1).float()
