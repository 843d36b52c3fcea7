"""Who may use an optimizer, and who may look at its weights, when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from zo_fused.recording import capturing
from zo_fused.step.capture import Capture
from zo_fused.step.estimates import Estimate
from zo_fused.step.evaluation import Closure, Loss
from zo_fused.step.guard import DISPLACED, Guard
from zo_fused.step.interrupts import uninterrupted
from zo_fused.step.report import Report
from zo_fused.step.weights import Weights

Method = TypeVar("Method", bound=Callable[..., Any])


def plain_tensors(method: Method) -> Method:
    """No gradients, and no inference tensors: state made in a caller's inference mode would
    refuse to be updated outside it."""
    decorated: Method = torch.inference_mode(False)(torch.no_grad()(method))
    return decorated


class Access:
    """One user at a time, and theta for whoever looks at the weights between steps.

    Args:
        optimizer: whose weights these are.

    Attributes:
        pending: makes an estimate that waits for its step, with the weights where it left them.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Weights,
        capture: Capture,
        guard: Guard,
        report: Report,
    ) -> None:
        self.pending: Callable[[], Estimate] | None = None
        self._optimizer = optimizer
        self._weights = weights
        self._capture = capture
        self._guard = guard
        self._report = report
        self._left: tuple[int, int] | None = None  # versions of the parameters, as they were left
        self._busy = threading.Lock()
        self._held: uninterrupted | None = None  # Ctrl-C, by who has the optimizer

    @contextmanager
    def alone(self, wait: bool = False) -> Iterator[None]:
        """Around all that moves weights: one thing at a time, without guard. Ctrl-C waits, but for
        evaluations (`interruptible`).

        Args:
            wait: for who has the optimizer, instead of raising.
        """
        with uninterrupted() as held:
            if not self._busy.acquire(blocking=wait):
                raise RuntimeError(
                    f"this {type(self._optimizer).__name__} is in the middle of a step (or perturb,"
                    " or flush): neither its closure nor another thread may use it meanwhile"
                )
            self._held = held
            try:
                self._capture.ask()
                self._watch_log()
                yield
            finally:
                self._weights.tell_autograd()
                is_open = self._weights.log.is_open
                self._left = self._weights.parameters.versions() if is_open else None
                if self._resting():
                    self._guard.set()
                else:
                    self._guard.lift()
                if self._resting() or not self._weights.place.at:
                    DISPLACED.leave(self._optimizer)
                self._busy.release()

    def _watch_log(self) -> None:
        """A replay log has what the optimizer did."""
        is_open = self._weights.log.is_open
        if is_open and self._left not in (None, self._weights.parameters.versions()):
            self._report.warn(
                "something else than the optimizer has written to parameters while their replay "
                "log is open: the log doesn't have it, so a replay ends in other weights"
            )

    @contextmanager
    def going_away(self) -> Iterator[None]:
        """`alone`, to go away from theta: no perturbation of others may be mixed with this one."""
        with self.alone():
            self._guard.lift()
            DISPLACED.enter(self._optimizer)
            yield

    @contextmanager
    def a_step(self) -> Iterator[None]:
        """`going_away`; whatever goes wrong (the closure, memory for the state, a hyper-parameter),
        the weights are at theta afterwards."""
        weights = self._weights
        with self.going_away():
            weights.half_applied = False
            try:
                yield
            except BaseException:
                # While a graph is captured, nothing has been done that could be taken back.
                if not (weights.half_applied or capturing() or weights.device_step is not None):
                    weights.flush()
                raise

    @plain_tensors
    def flush(self, wait: bool = False) -> None:
        """Put the weights at theta; `wait` for who looks at a parameter, from any thread."""
        with self.alone(wait), torch._C.DisableTorchFunctionSubclass():
            self._weights.flush()

    def drop_pending(self) -> None:
        """No estimate waits any more."""
        if self.pending is not None:
            self.pending = None
            self._weights.flush()

    def interruptible(self, closure: Closure) -> Closure:
        """A closure in which Ctrl-C gets through, and autocast casts the weights anew. If it
        switches gradients on, they are off again for the next."""
        held = self._held
        assert held is not None

        def evaluate() -> Loss:
            torch.clear_autocast_cache()
            with held.released(), torch.no_grad():
                return closure()

        return evaluate

    def _resting(self) -> bool:
        """Whether the weights are not at theta although nobody is at work."""
        if self._weights.place.at:
            return self._weights.ahead or self.pending is not None
        return self._weights.away()
