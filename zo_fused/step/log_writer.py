"""Writing a replay log as the run goes: `zo_fused.step.log_lines` says what is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from zo_fused.step.log_lines import FORMAT, SETTINGS, VERSION, Settings, read_lines


class Writer:
    """Writes a log as the run goes. The file is closed between lines, so nothing is left behind;
    but it must stay the file that it was: another would lack the header.

    Raises:
        OSError: from a method, a line can't be written, or the file is gone or was changed.
    """

    def __init__(self, path: Path, settings: Settings, usual_path: list[Any]) -> None:
        self._path = path
        self._settings = settings
        self._usual_path = usual_path
        self._size = path.stat().st_size  # a cheap sign of whether it is still the same file

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> Writer:
        """Start a new log, replacing a file of that name."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        writer = cls(path, {name: header[name] for name in SETTINGS}, header["path"])
        writer._write({"format": FORMAT, "version": VERSION, **header})
        return writer

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], header: dict[str, Any], step: int, restores: int
    ) -> Writer:
        """Go on with a log from `step`, after dropping what was written later than that.

        Args:
            path: the log.
            header: what the present run would write; must describe the same run.
            step: steps that the weights at hand have seen.
            restores: restores since the last of them, which the weights have seen as well.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the log is damaged, of another run, or misses steps.
        """
        path = Path(path)
        kept: list[bytes] = []
        settings: Settings = {}
        usual_path: list[Any] = []  # the file's, whatever the present one is
        next_step = -1
        for line in read_lines(path, header["contract"]):
            event = line.event
            if not kept:
                for name in ("method", "seed", "transform", "options", "parameters"):
                    if line.header[name] != header[name]:
                        raise ValueError(f"{path} is the log of another run: {name} differs")
                usual_path = line.usual_path
                next_step = line.header["first_step"]
            elif event is not None and not event.restored:
                if event.step >= step:
                    break
                next_step = event.step + 1
            elif event is not None and event.step >= step:
                if event.step > step or restores == 0:
                    break
                restores -= 1
            settings = line.settings
            kept.append(line.text)
        if next_step != step:
            raise ValueError(
                f"{path} can't be continued at step {step}: its last complete step before that "
                f"leads to step {next_step}"
            )
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)
        return cls(path, settings, usual_path)

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
        text = (json.dumps(value, separators=(",", ":")) + "\n").encode()
        size, self._size = self._size, -1  # no line may follow one that is not there
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND)  # makes none where it is gone
            try:
                whole = os.fstat(file).st_size == size and os.write(file, text) == len(text)
            finally:
                os.close(file)
        except OSError as error:
            error.filename = str(self._path)
            raise
        if not whole:  # the disk is full, another run's file lies there, or it was edited
            raise OSError(
                f"{self._path}: a line of the replay log could not be written whole, or something "
                "else wrote there"
            )
        self._size = size + len(text)


def _found(probes: list[float] | None) -> list[Any]:
    return [] if probes is None else [{"probes": probes}]
