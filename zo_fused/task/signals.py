"""Signals that ask a run to end: Ctrl-C, and what schedulers send before they kill."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

# SIGTERM: of systemd, Kubernetes and Slurm; SIGUSR1: Slurm's --signal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signalled(KeyboardInterrupt):
    """A signal that asks for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """``with Signals() as signals``: a block in which these signals raise `Signalled`, once: what
    comes after the first one finds the end under way. What the process ignores, as SIGINT in the
    background of a shell, stays ignored. In another thread than the main one it does nothing, as
    Python gives signals to that alone.

    Attributes:
        in_step: whether a step is being made, which only Ctrl-C breaks off; for the others the
            step's end calls `check`.
    """

    def __init__(self) -> None:
        self.in_step = False
        self._caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught is None:
            self._caught = number
            if number == signal.SIGINT or not self.in_step:
                raise Signalled(number)

    def check(self) -> None:
        """Raises:
        Signalled: a signal has come.
        """
        if self._caught is not None:
            raise Signalled(self._caught)
