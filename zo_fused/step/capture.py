"""A step in a CUDA graph: its number is read on the device, so that each replay is the next step.

The host's record stays as it is while a graph is recorded, for nothing has run yet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zo_fused.noise.keys import DeviceStep, Stream, on_host, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.recording import capturing
from zo_fused.step.rule import Rule
from zo_fused.step.weights import Weights
from zo_fused.sweeps import dispatch


class Capture:
    """The step counter on the device, and the recording of a step.

    Attributes:
        used: whether a step was captured; the device may then have taken steps by itself.
    """

    def __init__(self, weights: Weights) -> None:
        self.used = False
        self._weights = weights
        self._counter: Tensor | None = None  # int64 []: the step

    def follow(self) -> None:
        """The counter gets the step of the host."""
        weights = self._weights
        if weights.device_step is not None or not weights.buckets:
            return
        device = weights.buckets[0].device
        if on_host(device):
            return
        if self._counter is None or self._counter.device != device:
            self._counter = torch.zeros((), dtype=torch.int64, device=device)
            # a kernel must have run before a graph has it
            stream = Stream(Purpose.DENSE, self._step(self._counter))
            stream_keys(weights.groups.seed, [stream], device)
        self._counter.fill_(weights.groups.step)

    def ask(self) -> None:
        """The host gets the step of the counter, which it waits for."""
        if self.used and self._counter is not None and not capturing():
            self._weights.groups.count(step=int(self._counter))

    def record(self, rule: Rule, step: Callable[[], Tensor]) -> Tensor:
        """Record a step.

        Raises:
            RuntimeError: it can't be captured; says why.
        """
        weights, counter = self._weights, self._counter
        self._refuse(rule)
        assert counter is not None
        groups, log = weights.groups, weights.log
        before = weights.place, weights.ahead, list(log.path), groups.step, groups.restores
        try:
            weights.device_step = self._step(counter)
            loss = step()
            counter.add_(1)
        finally:
            weights.device_step = None
            weights.place, weights.ahead, log.path, number, restores = before
            groups.count(step=number, restores=restores)
        self.used = True
        return loss

    @staticmethod
    def _step(counter: Tensor) -> DeviceStep:
        return DeviceStep(counter, dispatch.select(counter.device.type).key_)

    def _refuse(self, rule: Rule) -> None:
        weights = self._weights
        schedule = weights.schedule
        if weights.log.is_open:
            raise RuntimeError("a captured step can't write the replay log: close_log() first")
        reason = weights.direction.not_capturable(schedule.deferred) or rule.not_capturable
        if schedule.block_order == "sequential":
            reason = "whose turn it is, is for the host to say"
        if weights.draws:
            reason = (
                "the closure draws random numbers (dropout?), and a graph gives the two signs "
                "different ones; model.eval()"
            )
        if reason:
            raise RuntimeError(f"this step can't be captured in a graph: {reason}")
        devices = {bucket.device for bucket in weights.buckets}
        if self._counter is None or schedule.deferred != weights.ahead or len(devices) != 1:
            raise RuntimeError(
                "take two steps before you capture one, over parameters on one device"
            )
