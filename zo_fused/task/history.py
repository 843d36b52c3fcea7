"""``history.jsonl``: what happened in a run, a line as it happens.

Lines ``{"step", "loss", "projected_grad", "forwards", "seconds"}`` for a training step, counted
from 1, with its number of forward passes over a batch, and
``{"step", "<split>_accuracy", "<split>_loss"}`` for an evaluation after so many steps; where the
model writes answers, the accuracy is the share of exact matches, and ``"<split>_f1"`` is there too.
A number that is not finite is null. The projected gradients of several directions are a list.
"""

from __future__ import annotations

import errno
import json
import math
import os
from itertools import takewhile
from pathlib import Path
from typing import Any

from zo_fused.task.errors import UserError, first_line
from zo_fused.task.files import to_json, write_text, writing

Entry = dict[str, Any]
_OF_ALL: dict[str, tuple[type, ...]] = {"step": (int,)}  # what a line must have
_OF_A_STEP = _OF_ALL | {
    "loss": (float, int, type(None)),
    "projected_grad": (float, int, list, type(None)),
    "forwards": (int,),
    "seconds": (float, int),
}


def read_history(path: Path, last_step: int | None = None) -> list[Entry]:
    """Entries up to a step; a torn last line is left out.

    Raises:
        UserError: there is no such file, or a line that is no entry.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"can't read the history {path}: {error.strerror}") from error
    entries = [
        _entry(f"{path}:{number}", line)
        for number, line in enumerate(lines, start=1)
        if line.endswith(b"\n")
    ]
    return [entry for entry in entries if last_step is None or entry["step"] <= last_step]


def _entry(where: str, line: bytes) -> Entry:
    try:
        entry = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: not a line of a history")
    needed = dict(_OF_A_STEP if "loss" in entry else _OF_ALL)
    needed |= {name: (float, int) for name in entry if name.endswith(("_accuracy", "_f1"))}
    needed |= {name: _OF_A_STEP["loss"] for name in entry if name.endswith("_loss")}
    if any(type(entry.get(name)) not in types for name, types in needed.items()):
        raise UserError(f"{where}: not a line of a history")
    return entry


def accuracies(
    entries: list[Entry], split: str, measure: str = "accuracy"
) -> list[tuple[int, float]]:
    """(step, accuracy) of a split's evaluations, or another measure: "f1"."""
    key = f"{split}_{measure}"
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


def losses(entries: list[Entry], split: str) -> list[tuple[int, float]]:
    """(step, loss) of a split's evaluations; infinity where it was not finite."""
    key = f"{split}_loss"
    found = [(entry["step"], entry[key]) for entry in entries if key in entry]
    return [(step, math.inf if loss is None else loss) for step, loss in found]


def spent(entries: list[Entry]) -> dict[int, int]:
    """The forward passes of all training steps up to a step, by step from 0 on."""
    total, sums = 0, {0: 0}
    for entry in entries:
        if "forwards" in entry:
            total += entry["forwards"]
            sums[entry["step"]] = total
    return sums


def _is_finite(entry: Entry) -> bool:
    """Of a training step."""
    grads = entry["projected_grad"]
    values = grads if isinstance(grads, list) else [grads]
    return all(value is not None and math.isfinite(value) for value in values)


class History:
    """Entries in memory and in the file, which is flushed after every line.

    Args:
        path: of ``history.jsonl``.
        step: where the run goes on: later entries of an earlier attempt are dropped. None starts
            an empty history.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.entries = [] if step is None else read_history(path, step)
        write_text(path, "".join(to_json(entry) + "\n" for entry in self.entries))
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def add(self, **entry: Any) -> None:
        """Appends an entry.

        Raises:
            OSError: it can't be written, or the file was removed or replaced.
        """
        self.entries.append(entry)
        with writing(self._path):
            self._file.write(to_json(entry) + "\n")
            self._file.flush()
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))

    def sync(self) -> None:
        """All lines so far are on the disk when this returns."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, with all lines on the disk; the entries stay."""
        self.sync()
        with writing(self._path):
            self._file.close()

    @property
    def last_step(self) -> int:
        """Training steps so far."""
        return next((e["step"] for e in reversed(self.entries) if "loss" in e), 0)

    @property
    def skipped_in_a_row(self) -> int:
        """Training steps up to the last one that had a projected gradient which was not finite."""
        steps = (entry for entry in reversed(self.entries) if "loss" in entry)
        return sum(1 for _ in takewhile(lambda entry: not _is_finite(entry), steps))

    def accuracies(self, split: str, measure: str = "accuracy") -> list[tuple[int, float]]:
        """(step, accuracy) of a split's evaluations, or another measure: "f1"."""
        return accuracies(self.entries, split, measure)

    def losses(self) -> list[tuple[int, float | None]]:
        """(step, loss) of the training steps."""
        return [(entry["step"], entry["loss"]) for entry in self.entries if "loss" in entry]
