"""An actor of a Ray cluster (`zo_fused.ray.driver`). Nothing of Ray is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from zo_fused.methods.es import ES
from zo_fused.step.fingerprint import fingerprint
from zo_fused.step.log_bytes import received

# The base model, and the reward at the number of a step: higher is better, of the model as it is.
Make = Callable[[], tuple[nn.Module, Callable[[int], float]]]


class Actor:
    """A process with weights of its own, which evaluates members. They go back to a copy of theta
    after each, so all actors have the same bits, whichever members they had."""

    def __init__(self, make: Make, log: bytes, options: dict[str, Any]) -> None:
        self._model, self._reward = make()
        self._optimizer = ES(self._model, parallel=None, **options)
        with received(log) as file:
            self._optimizer.replay(file)

    @torch.no_grad()
    def evaluate(self, step: int, members: Sequence[int]) -> list[float]:
        """The rewards of members of a step, which must be the present one."""
        optimizer, params = self._optimizer, list(self._model.parameters())
        if optimizer.step_count != step:
            raise RuntimeError(f"this actor is at step {optimizer.step_count}, not {step}")
        theta, rewards = [p.clone() for p in params], []
        for position in map(optimizer.positions().__getitem__, members):
            try:
                optimizer.perturb(position.sign, position.query)
                rewards.append(float(self._reward(step)))
            finally:
                optimizer.flush()
                for p, kept in zip(params, theta, strict=True):
                    p.copy_(kept)
        return rewards

    def follow(self, grads: list[float]) -> None:
        """The step that the driver made."""
        self._optimizer.follow(grads)

    def fingerprint(self) -> str:
        """A short hash of every weight. The first answer says that the actor has caught up."""
        return fingerprint([p.detach() for p in self._model.parameters()])
