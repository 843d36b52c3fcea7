"""The replay log: JSON lines from which a run is rebuilt. Format in docs/replay.md. Floor 5.

One header line, then one line an event:

* ``[step, g]``: an update with projected gradient g, a list of them where a step has several (null:
  a loss was not finite; nothing applied), after the header's usual path of perturbations
* ``[step, g, path]``: the same after other perturbations
* ``[step, "restore", path]``: perturbations that were taken back without an update
* ``{"groups": [...]}``: hyper-parameters of the groups from here on
* ``{"trainable": [...]}``: positions of the trainable parameters from here on
* ``{"in_place": [...]}``: those that a factored run perturbs in place all the same

A line that a killed process left unfinished is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = "zo_fused replay log"
VERSION = 1
USUAL_PATH = [1.0, -1.0]  # where a header has none


@dataclass
class Event:
    """One perturb-and-update (or perturb-and-restore) of the run."""

    step: int
    path: list[Any]  # perturbations before the update or restore
    projected_grads: list[float] | None  # None: nothing was applied
    restored: bool  # True: taken back without an update; the step is still to come
    groups: list[dict[str, Any]]
    trainable: list[int]
    in_place: list[int]


@dataclass
class Log:
    """A log that was read: its header and its events."""

    header: dict[str, Any]
    events: list[Event] = field(default_factory=list)


def _lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Number, text and value of every complete line."""
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                return  # cut off by a kill
            try:
                yield number, text, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def _check_header(path: Path, header: Any, contract: int) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a zo_fused replay log")
    for name, known in (("version", VERSION), ("contract", contract)):
        if header.get(name) != known:
            raise ValueError(
                f"{path} was written with {name} {header.get(name)}; "
                f"this zo_fused reads {name} {known}"
            )


Settings = dict[str, Any]  # the values of these names, as the log has them
_SETTINGS = ("groups", "trainable", "in_place")


def _numbers(value: Any) -> list[float]:
    return [float(x) for x in (value if isinstance(value, list) else [value])]


def _perturbation(value: Any) -> Any:
    return {"at": _numbers(value["at"])} if isinstance(value, dict) else _numbers(value)


def _event(value: Any, settings: Settings, usual_path: list[Any]) -> Event:
    step, what, *rest = value
    path = [_perturbation(x) for x in (rest[0] if rest else usual_path)]
    restored = what == "restore"
    grads = None if restored or what is None else _numbers(what)
    return Event(int(step), path, grads, restored, **settings)


def read(path: str | os.PathLike[str], contract: int) -> Log:
    """Read a log.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a log, of another version, or damaged (with the line number).
    """
    path = Path(path)
    log: Log | None = None
    settings: Settings = {}
    for number, _, value in _lines(path):
        if log is None:
            _check_header(path, value, contract)
            log = Log(value)
            settings = {name: value[name] for name in _SETTINGS}
            log.header.setdefault("path", USUAL_PATH)
            continue
        try:
            if isinstance(value, dict):
                settings = settings | {name: value[name] for name in _SETTINGS if name in value}
            else:
                log.events.append(_event(value, settings, log.header["path"]))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not an event ({error})") from None
    if log is None:
        raise ValueError(f"{path} is not a zo_fused replay log: it has no complete header line")
    return log


class Writer:
    """Writes a log as the run goes. The file is closed between lines, so nothing is left behind."""

    def __init__(self, path: Path, settings: Settings, usual_path: list[Any]) -> None:
        self._path = path
        self._settings = settings
        self._usual_path = usual_path

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: dict[str, Any]) -> Writer:
        """Start a new log, replacing a file of that name."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        writer = cls(path, {name: header[name] for name in _SETTINGS}, header["path"])
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
            ValueError: the log is of another run, or misses steps.
        """
        path = Path(path)
        kept: list[str] = []
        settings: Settings = {}
        usual_path: list[Any] = []  # the file's, whatever the present one is
        next_step = -1
        for number, text, value in _lines(path):
            if number == 1:
                _check_header(path, value, header["contract"])
                for name in ("method", "seed", "options", "parameters"):
                    if value[name] != header[name]:
                        raise ValueError(f"{path} is the log of another run: {name} differs")
                settings = {name: value[name] for name in _SETTINGS}
                usual_path = value.get("path", USUAL_PATH)
                next_step = value["first_step"]
            elif isinstance(value, dict):
                settings |= {name: value[name] for name in _SETTINGS if name in value}
            elif value[0] > step or (value[0] == step and value[1] != "restore"):
                break
            elif value[0] == step:
                if restores == 0:
                    break
                restores -= 1
            elif value[1] != "restore":
                next_step = value[0] + 1
            kept.append(text)
        if next_step != step:
            raise ValueError(
                f"{path} can't be continued at step {step}: its last complete step before that "
                f"leads to step {next_step}"
            )
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        return cls(path, settings, usual_path)

    def update(
        self,
        step: int,
        path: list[Any],
        projected_grads: list[float] | None,
        settings: Settings,
    ) -> None:
        """An update was applied, or skipped (None)."""
        self._set(settings)
        grads: Any = projected_grads
        if projected_grads is not None and len(projected_grads) == 1:
            (grads,) = projected_grads
        event = [step, grads]
        self._write(event if path == self._usual_path else [*event, path])

    def restore(self, step: int, path: list[Any], settings: Settings) -> None:
        """Perturbations were taken back, and what was kept beside the weights written."""
        self._set(settings)
        self._write([step, "restore", path])

    def _set(self, settings: Settings) -> None:
        for name in _SETTINGS:
            if settings[name] != self._settings[name]:
                self._write({name: settings[name]})
        self._settings = settings

    def _write(self, value: Any) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(value, separators=(",", ":")) + "\n")
