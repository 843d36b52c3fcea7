"""Writing a replay log as the run goes: `zo_fused.step.log_lines` says what is in it.

A line is with the system when its step returns: it survives the death of the process. It is on the
disk, so that it survives that of the machine, `SYNC_SECONDS` later, and when the state of the
optimizer is saved or the log closed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zo_fused.step.log_lines import SETTINGS, Settings, check_header, is_seen, read_lines
from zo_fused.step.log_records import FORMAT, VERSION, line_of

SYNC_SECONDS = 10.0


class Writer:
    """Writes a log as the run goes. The file is closed between lines, so nothing is left behind;
    but it must stay the file that it was: another would lack the header.

    Raises:
        OSError: from a method, a line can't be written, or the file is gone or was changed.
    """

    def __init__(
        self, path: Path, settings: Settings, usual_path: list[Any], checksum: int
    ) -> None:
        self._path = path
        self._settings = settings
        self._usual_path = usual_path
        self._size = path.stat().st_size  # a cheap sign of whether it is still the same file
        # by the system: no line may follow one that is missing
        self._refused: OSError | None = None
        self._synced = -SYNC_SECONDS  # the next line is
        self.checksum = checksum  # of the lines so far

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> Writer:
        """Start a new log, replacing a file of that name.

        Raises:
            ValueError: readers would refuse it.
        """
        check_header(header)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        writer = cls(path, {name: header[name] for name in SETTINGS}, header["path"], 0)
        writer._write({"format": FORMAT, "version": VERSION, **header})
        _sync(path.parent, os.O_RDONLY)  # which has the name
        return writer

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        header: dict[str, Any],
        step: int,
        restores: int,
        checksum: int | None,
        base: Callable[[], str] | None,
    ) -> Writer:
        """Go on with a log from `step`, after dropping what was written later than that.

        Args:
            path: the log.
            header: what the present run would write; must describe the same run.
            step: steps that the weights at hand have seen.
            restores: restores since the last of them, which the weights have seen as well.
            checksum: of the log up to there, if it is known.
            base: gives the fingerprint of the weights at hand, if they are at theta.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the log is damaged, of another run, or misses steps.
        """
        path = Path(path)
        first = None
        for line in read_lines(path, header["contract"]):
            event = line.event
            if first is None:
                check_same_run(path, line.header, header)
                first, next_step = line, line.header["first_step"]
            elif event is None:
                continue  # kept with the event that it is for
            elif not is_seen(event, step, restores):
                break
            elif event.restored:
                restores -= event.step == step
            else:
                next_step = event.step + 1
            last = line
        assert first is not None  # a log has a header
        if next_step != step:
            raise ValueError(
                f"{path} can't be continued at step {step}: its last complete step before that "
                f"leads to step {next_step}"
            )
        if checksum is not None:
            check_checksum(path, step, last.checksum, checksum)
        if last is first and base is not None:
            check_base(path, first.header, base())
        os.truncate(path, last.end)
        writer = cls(path, last.settings, first.usual_path, last.checksum)
        writer.sync()
        return writer

    def update(
        self,
        step: int,
        path: list[Any],
        projected_grads: list[float] | None,
        settings: Settings,
        probes: list[float] | None = None,
    ) -> None:
        """An update was applied, or skipped (None)."""
        self._set(settings)
        grads: Any = projected_grads
        if projected_grads is not None and len(projected_grads) == 1:
            (grads,) = projected_grads
        event = [step, grads]
        if path != self._usual_path or probes is not None:
            event += [path, *_found(probes)]
        self._write(event)

    def restore(
        self, step: int, path: list[Any], settings: Settings, probes: list[float] | None = None
    ) -> None:
        """Perturbations were taken back, and what was kept beside the weights written."""
        self._set(settings)
        self._write([step, "restore", path, *_found(probes)])

    def _set(self, settings: Settings) -> None:
        for name in SETTINGS:
            if settings[name] != self._settings[name]:
                self._write({name: settings[name]})
        self._settings = settings

    def _write(self, value: Any) -> None:
        if self._refused is not None:
            raise self._refused
        text, checksum = line_of(value, self.checksum)
        size, self._size = self._size, -1  # until it is written, which Ctrl-C may prevent
        now = time.monotonic()
        due = now - self._synced >= SYNC_SECONDS
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND)  # makes none where it is gone
            try:
                whole = os.fstat(file).st_size == size and os.write(file, text) == len(text)
                if due and whole:
                    os.fsync(file)
            finally:
                os.close(file)
            if not whole:  # the disk is full, another run's file lies there, or it was edited
                raise OSError(
                    f"{self._path}: a line of the replay log could not be written whole, or "
                    "something else wrote there"
                )
        except OSError as error:
            if error.errno is not None:
                error.filename = str(self._path)
            self._refused = error
            raise
        self._size, self.checksum = size + len(text), checksum
        if due:
            self._synced = now

    def read(self) -> bytes:
        """All lines so far."""
        return self._path.read_bytes()

    def sync(self) -> None:
        """All lines so far are on the disk when this returns."""
        _sync(self._path, os.O_WRONLY)
        self._synced = time.monotonic()


def check_same_run(path: Path, header: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises:
    ValueError: the log at this path is of another run than a header of mine.
    """
    for name in ("method", "seed", "transform", "options", "parameters"):
        if header[name] != mine[name]:
            raise ValueError(f"{path} is the log of another run: {name} differs")


def check_checksum(path: Path, step: int, found: int, saved: int) -> None:
    """Raises:
    ValueError: the log at this path has another checksum than that of a saved state.
    """
    if found != saved:
        raise ValueError(
            f"{path} is not the log that the state was saved with: up to step {step} its checksum "
            f"is {found:08x}, in the state {saved:08x}; it is of a run from another base, or of "
            "other losses"
        )


def check_base(path: Path, header: dict[str, Any], base: str) -> None:
    """Raises:
    ValueError: the log at this path is from other base weights than those of a fingerprint.
    """
    if header["base"] != base:
        raise ValueError(
            f"the log was written for other base weights than these (fingerprint {header['base']} "
            f"in {path}, {base} here): load those that the run began with, in their dtype"
        )


def _sync(path: Path, mode: int) -> None:
    file = os.open(path, mode)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _found(probes: list[float] | None) -> list[Any]:
    return [] if probes is None else [{"probes": probes}]
