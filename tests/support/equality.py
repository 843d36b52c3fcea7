"""What tests of backends share: equality bit for bit, and memory that shows stray writes."""

from __future__ import annotations

import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    """The bits of a tensor as integers, on the CPU."""
    x = x.detach().cpu().contiguous()
    return x.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    )


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Whether dtypes and bits are equal (so -0.0 differs from 0.0), on whatever devices."""
    return got.dtype == wanted.dtype and torch.equal(bits(got), bits(wanted))


def assert_same_bits(got: Tensor, wanted: Tensor, case: object = "", any_nan: bool = False) -> None:
    """any_nan: a NaN is a NaN, whatever its bits."""
    assert got.dtype == wanted.dtype, case
    assert got.shape == wanted.shape, case
    unequal = bits(got) != bits(wanted)
    if any_nan:
        unequal &= ~(got.isnan().cpu() & wanted.isnan().cpu())
    different = unequal.flatten().nonzero().flatten()
    assert not len(different), (
        f"{case} {len(different)} of {got.numel()} elements differ, the first at "
        f"{int(different[0])}: {got.flatten()[different[0]]} for {wanted.flatten()[different[0]]}"
    )


def assert_close(got: Tensor, wanted: Tensor, case: object = "") -> None:
    """As close as sweeps of the transform `fast` are: its normals are within 1e-3, coefficients of
    three directions below 6; and a step of stochastic rounding."""
    assert got.dtype == wanted.dtype, case
    rtol = 2 * torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(
        got.cpu(), wanted.cpu(), rtol=rtol, atol=2e-2, equal_nan=True, msg=lambda m: f"{case} {m}"
    )


def in_memory(model: torch.nn.Module) -> Tensor:
    """All weights of a module as they lie in memory, without asking their guards for theta."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class Islands:
    """Tensors in poisoned memory: `check` fails if anything was written beside them."""

    POISON = 77

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: list[tuple[Tensor, int, int]] = []

    def put(self, x: Tensor, misalignment: int = 0) -> Tensor:
        """A copy of x on the device, which begins so many elements past a 16-byte boundary."""
        start, stop = 64 + misalignment, 64 + misalignment + x.numel()
        memory = torch.full((stop + 64,), self.POISON, dtype=x.dtype, device=self.device)
        assert memory.data_ptr() % 16 == 0
        self._parts.append((memory, start, stop))
        view = memory[start:stop].view(x.shape)
        view.copy_(x)
        return view

    def check(self) -> None:
        for memory, start, stop in self._parts:
            assert (memory[:start] == self.POISON).all(), "wrote before a tensor"
            assert (memory[stop:] == self.POISON).all(), "wrote behind a tensor"
