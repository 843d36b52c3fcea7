"""torch's global generators, and the recording of CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def capturing() -> bool:
    """Whether a CUDA graph is being recorded on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


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
