"""The numbers of a step, a row a parameter: float64 vectors.

For parameters on the CPU they are NumPy arrays, whose small operations take a third of the time of
torch's (a step has dozens of them). Elsewhere they are tensors on the parameters' device, and
nothing waits for the host. Both know ``+ - * / **`` and comparisons; the rest is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_fused.noise.keys import on_device

Vector = Any  # float64 [P]: numpy.ndarray, or Tensor
Flag = Any  # bool, or Tensor [] of dtype bool


def on_host(device: torch.device) -> bool:
    """Whether the numbers of parameters there are the host's."""
    return device.type == "cpu"


def vector(values: Sequence[float], device: torch.device) -> Vector:
    """Numbers of the host, not to be changed."""
    if on_host(device):
        array = np.array(values, dtype=np.float64)
        array.setflags(write=False)
        return array
    return on_device(torch.tensor(values, dtype=torch.float64, device="cpu"), device)


def stacked(numbers: Sequence[Any], device: torch.device) -> Vector:
    """Numbers of the host, or tensors [] on the device, float64."""
    return np.array(numbers, dtype=np.float64) if on_host(device) else torch.stack(list(numbers))


def on(value: Vector, device: torch.device) -> Vector:
    """A vector as those of another device are."""
    if isinstance(value, Tensor):
        return of_tensor(value.to(device=device, dtype=torch.float64))
    return value if on_host(device) else vector(value.tolist(), device)


def as_tensor(value: Vector) -> Tensor:
    """A vector as a tensor on its device."""
    return value if isinstance(value, Tensor) else torch.from_numpy(value)


def flag_on(flag: Flag, device: torch.device) -> Flag:
    """A flag as vectors of that device go with it."""
    if on_host(device):
        return bool(flag)
    return flag.to(device) if isinstance(flag, Tensor) else torch.tensor(flag, device=device)


def float32_scalar(value: Any) -> Tensor:
    """A number of the host, or a tensor [], as a tensor, float32 []."""
    if isinstance(value, Tensor):
        return value.float()
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def where(condition: Flag, value: Vector, otherwise: Vector | float) -> Vector:
    """The one or the other, for a flag or a vector of them."""
    if isinstance(value, Tensor):
        return torch.where(condition, value, otherwise)
    return np.where(condition, value, otherwise)


def sign(value: Vector) -> Vector:
    """-1, 0 or 1."""
    return value.sign() if isinstance(value, Tensor) else np.sign(value)


def all_finite(values: Vector) -> Flag:
    """Whether there is neither infinity nor NaN."""
    if isinstance(values, Tensor):
        return torch.isfinite(values).all()
    return bool(np.isfinite(values).all())


def to_float32(value: Vector) -> Vector:
    """A vector rounded to float32; what is too large becomes infinite."""
    if isinstance(value, Tensor):
        return value.float()
    with np.errstate(over="ignore"):
        return value.astype(np.float32)


def float32(value: Vector) -> Tensor:
    """A vector as the sweeps take it, float32 [P] on its device."""
    return as_tensor(to_float32(value))


def table(columns: Sequence[Vector]) -> Tensor:
    """Vectors side by side as the sweeps take them, float32 [P, columns] on their device."""
    if isinstance(columns[0], Tensor):
        return torch.stack(list(columns), dim=-1).float()
    rows = np.empty((len(columns[0]), len(columns)), dtype=np.float32)
    for number, column in enumerate(columns):
        rows[:, number] = column
    return torch.from_numpy(rows)


def of_tensor(tensor: Tensor) -> Vector:
    """A float64 tensor as a vector in the same memory."""
    return tensor.numpy() if on_host(tensor.device) else tensor
