"""How long the parts of a step take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from zo_fused.step.parameters import Parameters


class Timer:
    """Adds the seconds of a block to `timings`, if there are any; on GPUs it waits for the device.

    Attributes:
        timings: None, or seconds by name.
    """

    def __init__(self, parameters: Parameters) -> None:
        self.timings: dict[str, float] | None = None
        self._parameters = parameters

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.timings is None else self._add(self.timings, name)

    @contextmanager
    def _add(self, timings: dict[str, float], name: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            timings[name] = timings.get(name, 0.0) + time.perf_counter() - start

    def _synchronize(self) -> None:
        for bucket in self._parameters.buckets:
            if bucket.device.type == "cuda":
                torch.cuda.synchronize(bucket.device)
