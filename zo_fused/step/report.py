"""What is said about the steps: how many were skipped, and what looks wrong."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from zo_fused.step.vectors import Flag

logger = logging.getLogger("zo_fused")

# A loss that doesn't change in so many steps in a row is worth a word.
_IDLE_STEPS = 20


class Report:
    """Counts skipped steps and warns.

    Args:
        why_skipped: why a step of this method is skipped.

    Attributes:
        skipped: steps that were not applied; on a GPU a tensor int64 [].
    """

    def __init__(self, why_skipped: str) -> None:
        self._why_skipped = why_skipped
        self.skipped: int | Tensor = 0
        self._idle = 0  # steps in a row whose losses were all equal
        self._told: set[str] = set()  # warnings that were given

    def warn(self, message: str) -> None:
        """Once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)

    def step(self, number: int, grads: Tensor, skipped: Flag, wait: bool) -> None:
        """A step was made.

        Args:
            wait: whether the host looks at what only the device knows.
        """
        if isinstance(skipped, Tensor) and not wait:
            if not isinstance(self.skipped, Tensor):
                self.skipped = torch.full((), self.skipped, dtype=torch.int64, device=grads.device)
            self.skipped.add_(skipped)
            return
        applied = not bool(skipped)
        if not applied:
            self.skipped = self.skipped + 1
            logger.warning("step %d skipped: %s; weights restored", number, self._why_skipped)
        self._watch_idle(applied and not bool(grads.any()))

    def _watch_idle(self, idle: bool) -> None:
        self._idle = self._idle + 1 if idle else 0
        if self._idle == _IDLE_STEPS:
            self.warn(
                f"the losses of a step were equal {_IDLE_STEPS} times in a row, so nothing moved: "
                "eps is too small for the weights' dtype, or the loss does not depend on them (is "
                "it of another model, or a copy?), or it is rounded"
            )
