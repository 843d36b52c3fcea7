"""The replay log: what its records say, from which a run is rebuilt. Format in docs/replay.md.

One header, then one record an event (as lines of a file: `zo_fused.step.log_records`):

* ``[step, g]``: an update with projected gradient g, a list of them where a step has several (null:
  a loss was not finite; nothing applied), after the header's usual path of perturbations
* ``[step, g, path]``: the same after other perturbations
* ``[step, "restore", path]``: perturbations that were taken back without an update
* ``[.., path, {"probes": [...]}]``: one of these after probes, with their projected gradients; or
  without probes, with what a direction learns from queries
* ``{"groups": [...]}``: hyper-parameters of the groups from here on
* ``{"trainable": [...]}``: positions of the trainable parameters from here on
* ``{"in_place": [...]}``: those that a factored run perturbs in place all the same
* ``{"bases": [...]}``: from here on, what z is made from besides the seed (`Direction.bases`)
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zo_fused.step.log_records import FORMAT, VERSION, records

Settings = dict[str, Any]  # the values of these names, as the log has them
SETTINGS = ("groups", "trainable", "in_place", "bases")
_FORMS = {
    "method": str,
    "base": str,
    "options": dict,
    "parameters": list,
    "groups": list,
    "trainable": list,
    "in_place": list,
    "bases": list,
    "path": list,
    "transform": str,
}
_UNSIGNED = {"seed": 64, "first_step": 63}  # bits
_NUMBERS = {"lr", "eps", "weight_decay", "momentum", "dampening", "adam_eps"}  # none below 0
_PAIRS = {"betas"}
_WHOLE = {"block", "rank", "interval"}
# No run has so many directions, or so high a rank: a damaged header must not fill the memory.
_MOST_QUERIES = 1 << 20
_COUNTS = {"queries", "population", "history", "probes", "pool"}
_RANK = 1024  # or that of the largest matrix
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
    bases: list[Any]
    probes: list[float] | None = None  # what they found; None: there were none
    checksum: int = 0  # of the log up to here


@dataclass
class Log:
    """A log that was read: its header and its events."""

    path: Path
    header: dict[str, Any]
    checksum_of_header: int
    checksum: int  # of all its records
    end: int  # of its last complete line in the file, in bytes
    events: list[Event] = field(default_factory=list)


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
        self._most_rank = max(_RANK, *(_full_rank(row[1]) for row in header["parameters"]))
        options = header["options"]
        for name, value in options.items():
            for one in value if isinstance(value, list) else [value]:
                _scalar(one, name)
            if name in _COUNTS and value is not None:
                _whole(value, name, _MOST_QUERIES)
        self._queries = _whole(options.get("queries", 1), "queries", _MOST_QUERIES)
        self._simultaneous = options.get("block_order") == "simultaneous"
        self.settings = self._changed({name: header[name] for name in SETTINGS}, {})
        self.usual_path = self._path(header["path"])
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
        _must(2 <= len(fields) <= 4, f"it has {len(fields)} values, not two to four")
        step, what, *rest = fields
        restored = what == "restore"
        _must(bool(rest) or not restored, "a restore has no path")
        right = type(step) is int and step == self._next_step
        _must(right, f"step {_short(step)} comes where step {self._next_step} is due")
        path = self._path(rest[0]) if rest else self.usual_path
        grads = None if restored or what is None else self._grads(what)
        self._next_step += not restored
        probes = self._probes_of(rest[1], path) if len(rest) == 2 else None
        return Event(step, path, grads, restored, **self.settings, probes=probes)

    def _changed(self, changes: dict[str, Any], settings: Settings) -> Settings:
        _must(bool(changes), "it changes nothing")
        for name, value in changes.items():
            _must(name in SETTINGS, f"there is no setting {_short(name)}")
            _list(value, name)
            if name == "groups":
                count = f"there are {len(value)} groups, not {self._groups}"
                _must(len(value) == self._groups, count)
                for group in value:
                    _check_group(group, settings["groups"][0] if settings else {})
                    rank = group.get("rank", 1)
                    _must(rank <= self._most_rank, f"rank {rank} is that of no matrix of the run")
            elif name == "bases":
                self._check_bases(value)
            else:
                places = [
                    _whole(place, f"a position in {name}", len(self._owners)) for place in value
                ]
                _must(len(set(places)) == len(places), f"{name} has a position twice")
                _must(bool(places) or name != "trainable", "nothing is trainable")
        return settings | changes

    def _check_bases(self, bases: list[Any]) -> None:
        for entry in bases:
            right = isinstance(entry, list) and len(entry) in (2, 3) and isinstance(entry[1], str)
            _must(right, f"{_short(entry)} is no basis")
            _whole(entry[0], "a position in bases", len(self._owners))
            for row in _list(entry[2], "rows of a basis") if len(entry) == 3 else ():
                _whole(row, "a row of a basis", 2**63)
            try:
                numbers = np.frombuffer(base64.b64decode(entry[1], validate=True), dtype="<f4")
            except ValueError:
                raise ValueError(f"{_short(entry)} is no basis") from None
            _must(bool(np.isfinite(numbers).all()), "a basis has a number that is not finite")

    def _path(self, value: Any) -> list[Any]:
        return [self._perturbation(entry) for entry in _list(value, "the path")]

    def _perturbation(self, entry: Any) -> Any:
        """``[sign, query]``, ``[sign, query, "probe"]`` or ``{"at": [...]}``."""
        if isinstance(entry, dict):
            right = {"at"} <= entry.keys() <= {"at", "query", "probe"}
            _must(right and entry.get("probe", True) is True, f"{_short(entry)} is no perturbation")
            _whole(entry.get("query", 0), "a query", _MOST_QUERIES)
            at = [_number(x, "a coefficient") for x in _list(entry["at"], "at")]
            _must(len(at) == self._groups, f"at has {len(at)} values, not {self._groups}")
            return {**entry, "at": at}
        right = isinstance(entry, list) and (len(entry) == 2 or entry[2:] == ["probe"])
        _must(right, f"{_short(entry)} is no perturbation")
        sign, probe = _number(entry[0], "a sign"), len(entry) == 3
        below = _MOST_QUERIES if probe else self._count()
        number = _whole(entry[1], "a probe" if probe else "a query", below)
        return [sign, number, True] if probe else [sign, number]

    def _count(self) -> int:
        """Queries of a step."""
        return self._queries * (len(self._blocks()) if self._simultaneous else 1)

    def _blocks(self) -> set[int]:
        """Of the parameters that move."""
        groups = self.settings["groups"]
        return {groups[self._owners[p]].get("block", 0) for p in self.settings["trainable"]}

    def _grads(self, value: Any) -> list[float]:
        values = value if isinstance(value, list) else [value]
        wanted = self._count()
        _must(len(values) == wanted, f"it has {len(values)} projected gradients, not {wanted}")
        return [_number(x, "a projected gradient", _FLOAT32_INFINITY) for x in values]

    @staticmethod
    def _probes_of(value: Any, path: list[Any]) -> list[float]:
        right = isinstance(value, dict) and value.keys() == {"probes"}
        _must(right, f"{_short(value)} is not what probes found")
        found = [_number(x, "a probe", _FLOAT32_INFINITY) for x in _list(value["probes"], "probes")]
        probes = {entry[1] for entry in path if isinstance(entry, list) and len(entry) == 3}
        # Without probes they are what the queries found beside g: HiZOO's curvatures.
        fits = not probes or len(found) == len(probes)
        _must(fits, f"it has {len(found)} probes, its path {len(probes)}")
        return found


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


def _full_rank(shape: list[int]) -> int:
    """Of a parameter that is seen as a matrix."""
    return min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 1


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


def check_header(header: dict[str, Any]) -> None:
    """A log that would be refused must not be begun.

    Raises:
        ValueError: its header is none.
    """
    try:
        _Reader(json.loads(json.dumps(header)))
    except ValueError as error:
        raise ValueError(f"this run can have no replay log: {error}") from None


class Line(NamedTuple):
    """A complete line of a log."""

    header: dict[str, Any]
    settings: Settings  # from here on
    event: Event | None  # None: the header, or a change of settings
    usual_path: list[Any]  # of the header
    checksum: int  # of the lines up to here
    end: int  # of the line in the file


def read_lines(path: Path, contract: int) -> Iterator[Line]:
    """The lines one after the other, as far as they are looked at.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a log, of another version, or damaged (with the line number).
    """
    reader: _Reader | None = None
    header: dict[str, Any] = {}
    for number, value, checksum, end in records(path):
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
        yield Line(header, reader.settings, event, reader.usual_path, checksum, end)
    if reader is None:
        raise ValueError(f"{path} is not a zo_fused replay log: it has no complete header line")


def read(path: str | os.PathLike[str], contract: int) -> Log:
    """Read a log.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a log, of another version, or damaged (with the line number).
    """
    lines = read_lines(Path(path), contract)
    first = next(lines)
    log = Log(Path(path), first.header, first.checksum, first.checksum, first.end)
    for line in lines:
        log.checksum, log.end = line.checksum, line.end
        if line.event is not None:
            line.event.checksum = line.checksum
            log.events.append(line.event)
    return log


def is_seen(event: Event, step: int, restores: int) -> bool:
    """Whether weights have seen an event, the next one of a log, that have seen so many steps, and
    so many restores since the last of them that have not come yet."""
    return event.step < step or (event.step == step and event.restored and restores > 0)


def events_after(
    log: Log, step: int, restores: int, until: int | None, whole: bool = False
) -> tuple[list[Event], int]:
    """The events of a log that weights have not seen, and its checksum up to there. Restores behind
    the last step are left out: they are of a step that never came, or of an evaluation that the
    program will make again.

    Args:
        step: steps that the weights have seen.
        restores: restores since the last of them, which they have seen as well.
        until: steps that they shall have seen; None: all.
        whole: with the restores behind the last step.

    Raises:
        ValueError: the log is of other steps.
    """
    first = log.header["first_step"]
    last = next((e.step + 1 for e in reversed(log.events) if not e.restored), first)
    end = last if until is None else until
    if not first <= step <= last or not step <= end <= last:
        raise ValueError(
            f"{log.path} has the steps from {first} to {last}; the optimizer is at step {step}"
            + ("" if until is None else f", and shall go to step {until}")
        )
    checksum, todo = log.checksum_of_header, []
    for event in log.events:
        if is_seen(event, step, restores):
            restores -= event.step == step
            checksum = event.checksum
        elif event.step < end or whole:
            todo.append(event)
    return todo, checksum
