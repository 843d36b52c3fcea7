"""What a run shows as it goes: lines and, on a terminal, a bar below them."""

from __future__ import annotations

import sys
from typing import Any

from zo_fused.task.errors import optional


class Console:
    """``with Console(steps, done) as console``: plain lines where the output is no terminal."""

    def __init__(self, steps: int, done: int = 0) -> None:
        self._bar: Any = None
        if sys.stdout is not None and sys.stdout.isatty():
            progress = optional("rich.progress")
            self._bar = progress.Progress(
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.description}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("to go"),
                progress.TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> Console:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """Prints a line, above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, shown: str) -> None:
        """A step is done; `shown` stands beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=shown.replace("[", r"\["))


def duration(seconds: float) -> str:
    """A time as one says it: "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes <= 90 else f"{minutes // 60} h {minutes % 60} min"


def in_words(size: int | None) -> str:
    """A number of bytes."""
    if size is None:
        return "unknown"
    if size < 10 * 2**10:
        return f"{size} B"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 2**10:.0f} KiB"
