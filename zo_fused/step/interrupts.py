"""Holding back Ctrl-C while weights and the record of what was done to them change."""

from __future__ import annotations

import threading

# What the module `signal` wraps in conversions to enums, which take longer than a small sweep.
from _signal import getsignal, signal  # type: ignore[import-not-found,unused-ignore]
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGINT
from typing import Any


class uninterrupted:
    """Delay SIGINT until the block has ended, so that a sweep is never half recorded.

    Only the main thread receives Python signals; elsewhere this does nothing.
    """

    def __enter__(self) -> uninterrupted:
        self._pending: list[tuple[Any, ...]] = []
        handler = getsignal(SIGINT)
        main = threading.current_thread() is threading.main_thread()
        self._handler = handler if main and callable(handler) else None
        if self._handler is not None:
            signal(SIGINT, lambda *args: self._pending.append(args))
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal(SIGINT, self._handler)
            if self._pending:
                self._handler(*self._pending[0])

    @contextmanager
    def released(self) -> Iterator[None]:
        """A block in the block in which Ctrl-C gets through, also one that came before."""
        try:
            self.__exit__()
            yield
        finally:
            self.__enter__()
