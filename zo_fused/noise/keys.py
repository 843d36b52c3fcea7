"""Stream keys as tensors: made on the host, or on the device from a step counter there.

A step that is captured in a CUDA graph runs again and again with nothing of the host's: its number
is in a counter on the device (`DeviceStep`), and its keys are made there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_fused.noise.streams import Purpose, as_int64, derive_key


def on_host(device: torch.device) -> bool:
    """Whether the host has the numbers of parameters there."""
    return device.type == "cpu"


# Writes a key, int64 [1], in one kernel: `zo_fused.sweeps.reference.key_`.
Derive = Callable[[Tensor, Tensor, int, int, int, int], None]


@dataclass(frozen=True, eq=False)  # each is of one captured step
class DeviceStep:
    """The number of a step that only the device knows. It stands where a number of the host may:
    ``step + 1``, `Stream.step`."""

    counter: Tensor  # int64 []
    derive: Derive  # of the backend
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
    step = streams[0].step if streams else 0
    if isinstance(step, DeviceStep):
        return _made_on_device(seed, tuple(streams), step)
    host = _made_on_host(seed, tuple(streams))
    return host if on_host(device) else _copied(seed, tuple(streams), device, _stream(device))


# A step asks for its keys in each of its sweeps.
@lru_cache(maxsize=64)
def _made_on_host(seed: int, streams: tuple[Stream, ...]) -> Tensor:
    keys = [derive_key(seed, s.purpose, s.step // s.interval, s.query) for s in streams]  # type: ignore[operator]
    return torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64))


@lru_cache(maxsize=64)
def _copied(seed: int, streams: tuple[Stream, ...], device: torch.device, stream: int) -> Tensor:
    """The stream that copies is one that nobody else need wait for."""
    return on_device(_made_on_host(seed, streams), device)


def _stream(device: torch.device) -> int:
    """What tells the device's current stream from others."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _made_on_device(seed: int, streams: tuple[Stream, ...], step: DeviceStep) -> Tensor:
    names = [
        (stream.step.ahead, stream.interval, as_int64(stream.query | int(stream.purpose) << 32))
        for stream in streams
        if isinstance(stream.step, DeviceStep)
    ]
    known = (seed, *names)
    if known not in step.made:
        keys = torch.empty(len(streams), dtype=torch.int64, device=step.counter.device)
        for key, name in zip(keys.split(1), names, strict=True):
            step.derive(key, step.counter, *name, as_int64(seed))
        step.made[known] = keys
    return step.made[known]


def on_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a host tensor on a device; the host does not wait for GPUs."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
