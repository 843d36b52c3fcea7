"""The state of torch's global generators."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from zo_fused.recording import capturing


class GeneratorStates:
    """The state of torch's global generators, to give all evaluations the same dropout.

    A CUDA graph numbers its random numbers itself, so there only that of the CPU is put back: a
    closure that draws random numbers on a GPU can't be captured.

    Args:
        devices: beside the CPU.

    Attributes:
        gpu_moved: whether an evaluation drew random numbers on a GPU (known at the first rewind).
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        gpus = set() if capturing() else {d for d in devices if d.type == "cuda"}
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in gpus}
        self.gpu_moved: bool | None = None

    def rewind(self) -> None:
        """Put it back."""
        if self.gpu_moved is None:
            self.gpu_moved = any(
                not torch.equal(torch.cuda.get_rng_state(device), state)
                for device, state in self._cuda.items()
            )
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
