"""The replay log: JSON lines from which a run is rebuilt. Format in docs/replay.md.

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
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "zo_fused replay log"
VERSION = 1
USUAL_PATH = [1.0, -1.0]  # where a header has none


Settings = dict[str, Any]  # the values of these names, as the log has them
_SETTINGS = ("groups", "trainable", "in_place")
_FORMS = {
    "method": str,
    "base": str,
    "options": dict,
    "parameters": list,
    "groups": list,
    "trainable": list,
    "in_place": list,
}
_UNSIGNED = {"seed": 64, "first_step": 63}  # bits
_NUMBERS = {"lr", "eps", "weight_decay", "momentum", "dampening", "adam_eps"}  # none below 0
_PAIRS = {"betas"}
_WHOLE = {"block", "rank", "interval"}
# No run has so many directions a step: a damaged header must not fill the memory.
_MOST_QUERIES = 1 << 20
_FLOAT32_INFINITY = float((2**24 - 0.5) * 2.0**104)  # from here on a number rounds to it


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


# ---- reading ------------------------------------------------------------------------------------


def _must(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _whole(value: Any, what: str, below: int) -> int:
    # not isinstance: True is no number here
    inside = type(value) is int and 0 <= value < below
    _must(inside, f"{what} must be a whole number in [0, {below}), got {_short(value)}")
    return int(value)


def _number(value: Any, what: str, below: float = sys.float_info.max) -> float:
    finite = type(value) in (int, float) and abs(value) < below
    _must(finite, f"{what} must be a finite number, got {_short(value)}")
    return float(value)


def _list(value: Any, what: str) -> list[Any]:
    _must(isinstance(value, list), f"{what} must be a list, got {_short(value)}")
    return list(value)


class _Reader:
    """What the lines after a header must be."""

    def __init__(self, header: dict[str, Any]) -> None:
        for name, form in _FORMS.items():
            _must(name in header, f"{name} is missing")
            right = isinstance(header[name], form)
            _must(right, f"{name} must be a {form.__name__}, got {_short(header[name])}")
        for name, bits in _UNSIGNED.items():
            _whole(header.get(name), name, 1 << bits)
        self._groups = len(header["groups"])
        _must(self._groups > 0, "groups must not be empty")
        self._owners = [self._owner(row) for row in header["parameters"]]
        _must(bool(self._owners), "parameters must not be empty")
        options = header["options"]
        for name, value in options.items():
            _scalar(value, name)
        self._queries = _whole(options.get("queries", 1), "queries", _MOST_QUERIES)
        self._simultaneous = options.get("block_order") == "simultaneous"
        self.settings = self._changed({name: header[name] for name in _SETTINGS}, {})
        self.usual_path = self._path(header.get("path", USUAL_PATH))
        self._next_step: int = header["first_step"]

    def _owner(self, row: Any) -> int:
        """The group of a parameter."""
        right = (
            isinstance(row, list)
            and len(row) == 4
            and isinstance(row[0], str | None)
            and isinstance(row[1], list)
            and isinstance(row[2], str)
        )
        _must(right, f"a parameter must be [name, shape, dtype, group], got {_short(row)}")
        for length in row[1]:
            _whole(length, "a length in a shape", 1 << 63)
        return _whole(row[3], "the group of a parameter", self._groups)

    def line(self, value: Any) -> Event | None:
        """The event of a line; None: from here on the settings are others."""
        if isinstance(value, dict):
            self.settings = self._changed(value, self.settings)
            return None
        fields = _list(value, "a line")
        _must(len(fields) in (2, 3), f"it has {len(fields)} values, not two or three")
        step, what, *rest = fields
        restored = what == "restore"
        _must(bool(rest) or not restored, "a restore has no path")
        right = type(step) is int and step == self._next_step
        _must(right, f"step {_short(step)} comes where step {self._next_step} is due")
        path = self._path(rest[0]) if rest else self.usual_path
        grads = None if restored or what is None else self._grads(what)
        self._next_step += not restored
        return Event(step, path, grads, restored, **self.settings)

    def _changed(self, changes: dict[str, Any], settings: Settings) -> Settings:
        _must(bool(changes), "it changes nothing")
        for name, value in changes.items():
            _must(name in _SETTINGS, f"there is no setting {_short(name)}")
            _list(value, name)
            if name == "groups":
                count = f"there are {len(value)} groups, not {self._groups}"
                _must(len(value) == self._groups, count)
                for group in value:
                    _check_group(group, settings["groups"][0] if settings else {})
            else:
                places = [
                    _whole(place, f"a position in {name}", len(self._owners)) for place in value
                ]
                _must(len(set(places)) == len(places), f"{name} has a position twice")
                _must(bool(places) or name != "trainable", "nothing is trainable")
        return settings | changes

    def _path(self, value: Any) -> list[Any]:
        return [self._perturbation(entry) for entry in _list(value, "the path")]

    def _perturbation(self, entry: Any) -> Any:
        if isinstance(entry, dict):
            _must(entry.keys() == {"at"}, f"{_short(entry)} is no perturbation")
            at = [_number(x, "a coefficient") for x in _list(entry["at"], "at")]
            _must(len(at) == self._groups, f"at has {len(at)} values, not {self._groups}")
            return {"at": at}
        if not isinstance(entry, list):
            return [_number(entry, "a sign")]
        _must(len(entry) in (2, 3), f"{_short(entry)} is no perturbation")
        sign, query = _number(entry[0], "a sign"), _whole(entry[1], "a query", self._queries)
        if len(entry) == 2:
            return [sign, query]
        known = type(entry[2]) is int and entry[2] in self._blocks()
        _must(known, f"there is no block {_short(entry[2])}")
        return [sign, query, entry[2]]

    def _blocks(self) -> set[int]:
        """Of the parameters that move."""
        groups = self.settings["groups"]
        return {groups[self._owners[p]].get("block", 0) for p in self.settings["trainable"]}

    def _grads(self, value: Any) -> list[float]:
        values = value if isinstance(value, list) else [value]
        wanted = self._queries * (len(self._blocks()) if self._simultaneous else 1)
        _must(len(values) == wanted, f"it has {len(values)} projected gradients, not {wanted}")
        return [_number(x, "a projected gradient", _FLOAT32_INFINITY) for x in values]


def _check_group(group: Any, example: dict[str, Any]) -> None:
    """Refuses hyper-parameters with which a step would fail or destroy the weights."""
    _must(isinstance(group, dict), f"a group must be an object, got {_short(group)}")
    _must(group.keys() >= example.keys() | {"lr"}, f"a group lacks one of {list(example)}")
    for name, value in group.items():
        if name in _WHOLE:
            whole = type(value) is int and (value > 0 or name == "block")
            _must(whole, f"{name} must be a whole number, got {_short(value)}")
        elif name in _PAIRS:
            _must(len(_list(value, name)) == 2, f"{name} must be two numbers, got {_short(value)}")
            for one in value:
                _number(one, name)
        elif name in _NUMBERS:
            # an eps of 0 would be divided by
            right = _number(value, name) > 0 or (value == 0 and name != "eps")
            _must(right, f"{name} is {_short(value)}")
        else:
            _scalar(value, name)


def _scalar(value: Any, what: str) -> None:
    if not isinstance(value, str | bool | None):
        _number(value, what)


def _check_format(path: Path, header: Any, contract: int) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a zo_fused replay log")
    for name, known in (("version", VERSION), ("contract", contract)):
        if header.get(name) != known:
            raise ValueError(
                f"{path} was written with {name} {_short(header.get(name))}; "
                f"this zo_fused reads {name} {known}"
            )


class Line(NamedTuple):
    """A complete line of a log."""

    text: bytes
    header: dict[str, Any]
    settings: Settings  # from here on
    event: Event | None  # None: the header, or a change of settings


def _lines(path: Path, contract: int) -> Iterator[Line]:
    """The lines one after the other, as far as they are looked at.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a log, of another version, or damaged (with the line number).
    """
    reader: _Reader | None = None
    header: dict[str, Any] = {}
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break  # cut off by a kill
            try:
                value = json.loads(text.decode())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if reader is None:
                _check_format(path, value, contract)
            event = None
            try:
                if reader is None:
                    header, reader = value, _Reader(value)
                else:
                    event = reader.line(value)
            except (ValueError, RecursionError) as error:
                what = "a header" if reader is None else "an event"
                raise ValueError(f"{path}, line {number}: not {what} ({error})") from None
            yield Line(text, header, reader.settings, event)
    if reader is None:
        raise ValueError(f"{path} is not a zo_fused replay log: it has no complete header line")


def read(path: str | os.PathLike[str], contract: int) -> Log:
    """Read a log.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a log, of another version, or damaged (with the line number).
    """
    lines = _lines(Path(path), contract)
    log = Log({"path": USUAL_PATH} | next(lines).header)
    log.events += [line.event for line in lines if line.event is not None]
    return log


# ---- writing ------------------------------------------------------------------------------------


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
            FileNotFoundError: no such file.
            ValueError: the log is damaged, of another run, or misses steps.
        """
        path = Path(path)
        kept: list[bytes] = []
        settings: Settings = {}
        usual_path: list[Any] = []  # the file's, whatever the present one is
        next_step = -1
        for line in _lines(path, header["contract"]):
            event = line.event
            if not kept:
                for name in ("method", "seed", "options", "parameters"):
                    if line.header[name] != header[name]:
                        raise ValueError(f"{path} is the log of another run: {name} differs")
                usual_path = line.header.get("path", USUAL_PATH)
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
