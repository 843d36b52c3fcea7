"""What tests of backends share: equality bit for bit, and memory that shows stray writes."""

from __future__ import annotations

import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    """The bits of a tensor as integers, on the CPU."""
    return x.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(got: Tensor, wanted: Tensor, case: object = "") -> None:
    assert got.dtype == wanted.dtype, case
    assert got.shape == wanted.shape, case
    different = (bits(got) != bits(wanted)).flatten().nonzero().flatten()
    assert not len(different), (
        f"{case} {len(different)} of {got.numel()} elements differ, the first at "
        f"{int(different[0])}: {got.flatten()[different[0]]} for {wanted.flatten()[different[0]]}"
    )


def in_memory(model: torch.nn.Module) -> Tensor:
    """All weights of a module as they lie in memory, without asking their guards for theta."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


class Islands:
    """Tensors in poisoned memory: `check` fails if anything was written beside them.

    Each starts ``misalignment`` elements past a 16-byte boundary.
    """

    POISON = 77

    def __init__(self, device: torch.device, misalignment: int = 0) -> None:
        self.device, self.misalignment = device, misalignment
        self._parts: list[tuple[Tensor, int, int]] = []

    def put(self, x: Tensor) -> Tensor:
        """A copy of x on the device."""
        start, stop = 64 + self.misalignment, 64 + self.misalignment + x.numel()
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
