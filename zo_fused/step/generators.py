"""The state of torch's global generators."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from zo_fused.recording import capturing


class GeneratorStates:
    """The state of torch's global generators, to give all evaluations the same dropout.

    Args:
        devices: beside the CPU.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        # a graph numbers its random numbers itself; there must be no dropout
        gpus = set() if capturing() else {d for d in devices if d.type == "cuda"}
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in gpus}

    def rewind(self) -> None:
        """Put it back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
