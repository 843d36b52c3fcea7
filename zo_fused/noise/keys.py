"""Stream keys as tensors: made on the host, or on the device from a step counter there.

A step that is captured in a CUDA graph runs again and again with nothing of the host's: its number
is in a counter on the device (`DeviceStep`), and its keys are made there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_fused.noise import reference
from zo_fused.noise.streams import MASK32, Purpose, as_int64, derive_key


@dataclass(frozen=True, eq=False)  # each is of one captured step
class DeviceStep:
    """The number of a step that only the device knows. It stands where a number of the host may:
    ``step + 1``, `Stream.step`."""

    counter: Tensor  # int64 []
    ahead: int = 0  # added to what the counter says
    made: dict[Any, Tensor] = field(default_factory=dict)  # keys of this captured step

    def __add__(self, steps: int) -> DeviceStep:
        return replace(self, ahead=self.ahead + steps)


Step = int | DeviceStep


class Stream(NamedTuple):
    """What names a stream besides the run's seed."""

    purpose: Purpose
    step: Step
    interval: int = 1  # of a window: its number is step // interval
    query: int = 0


def stream_keys(seed: int, streams: Sequence[Stream], device: torch.device) -> Tensor:
    """`derive_key` of every stream, int64 [len(streams)]. Not to be changed."""
    if any(isinstance(stream.step, DeviceStep) for stream in streams):
        return torch.stack([_made_on_device(seed, stream) for stream in streams])
    host = _made_on_host(seed, tuple(streams))
    return host if device.type == "cpu" else on_device(host, device)


@lru_cache(maxsize=64)  # a step asks for its keys in each of its sweeps
def _made_on_host(seed: int, streams: tuple[Stream, ...]) -> Tensor:
    keys = [derive_key(seed, s.purpose, s.step // s.interval, s.query) for s in streams]  # type: ignore[operator]
    return torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64))


def _made_on_device(seed: int, stream: Stream) -> Tensor:
    purpose, step, interval, query = stream
    assert isinstance(step, DeviceStep)
    name = (seed, purpose, step.ahead, interval, query)
    if name not in step.made:
        number = step.counter + step.ahead
        if interval > 1:
            number = number.div(interval, rounding_mode="floor")
        high_half = as_int64(query | int(purpose) << 32)
        low, high, _, _ = reference.philox(number, high_half, seed)
        step.made[name] = low & MASK32 | high << 32
    return step.made[name]


def on_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a host tensor on a device; the host does not wait for GPUs."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
