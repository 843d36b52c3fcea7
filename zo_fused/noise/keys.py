"""Stream keys as tensors: made on the host, or on the device from a step counter there.

A step that is captured in a CUDA graph runs again and again with nothing of the host's: its number
is in a counter on the device, and its keys are made there. What the host knows as step s + k while
it records step s is then counter + k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_fused.noise import reference
from zo_fused.noise.streams import MASK32, Purpose, as_int64, derive_key


class Stream(NamedTuple):
    """What names a stream besides the run's seed."""

    purpose: Purpose
    step: int
    interval: int = 1  # of a window: its number is step // interval
    query: int = 0


@dataclass(frozen=True, eq=False)  # each is one step's
class Clock:
    """A step counter on a device, and what was derived from it in this step."""

    counter: Tensor  # int64 []
    step: int  # what the host takes for the counter's value
    made: dict[Any, Tensor] = field(default_factory=dict)


_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def running(clock: Clock) -> Iterator[None]:
    """In the block, keys come from this clock."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)


def clock() -> Clock | None:
    """The clock that keys come from. While there is one, nothing may depend on the host's number
    of the step, and what was drawn under another clock is of another step."""
    return _clock.get()


def stream_keys(seed: int, streams: Sequence[Stream], device: torch.device) -> Tensor:
    """`derive_key` of every stream, int64 [len(streams)]."""
    now = clock()
    if now is None:
        keys = [derive_key(seed, s.purpose, s.step // s.interval, s.query) for s in streams]
        host = torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64))
        return host if device.type == "cpu" else on_device(host, device)
    for stream in streams:
        if (seed, stream) not in now.made:
            now.made[seed, stream] = _on_device(seed, stream, now)
    return torch.stack([now.made[seed, stream] for stream in streams])


def _on_device(seed: int, stream: Stream, now: Clock) -> Tensor:
    steps = now.counter + (stream.step - now.step)
    if stream.interval > 1:
        steps = steps.div(stream.interval, rounding_mode="floor")
    high_half = as_int64(stream.query | int(stream.purpose) << 32)
    low, high, _, _ = reference.philox(steps, high_half, seed)
    return low & MASK32 | high << 32


def on_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A copy of a host tensor on a device; the host does not wait for GPUs."""
    if torch.device(device).type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
