"""What an optimizer writes into a replay log: where it was perturbed and what it applied."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_fused.noise.streams import CONTRACT_VERSION
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction
from zo_fused.step.fingerprint import fingerprint
from zo_fused.step.groups import COUNTERS, Groups
from zo_fused.step.log_bytes import bytes_of_steps
from zo_fused.step.log_lines import Event, Log, events_after
from zo_fused.step.log_writer import Writer, check_base, check_checksum, check_same_run
from zo_fused.step.schedule import Position
from zo_fused.sweeps.shards import is_sharded


class StepLog:
    """The replay log of a run, if one is open, and the way of the weights since the last line.

    Attributes:
        path: where the weights were put, in order, as lines have it.
        probes: what the probes on that path found.
    """

    def __init__(self, groups: Groups, direction: Direction) -> None:
        self.path: list[Any] = []
        self.probes: list[float] | None = None
        self._groups = groups
        self._direction = direction
        self._writer: Writer | None = None

    @property
    def is_open(self) -> bool:
        return self._writer is not None

    def open(
        self,
        file: str | os.PathLike[str],
        resume: bool,
        at_theta: bool,
        about: dict[str, Any],
        positions: Sequence[Position],
        buckets: Sequence[Bucket],
        writes: bool = True,
    ) -> None:
        """Start a log, or go on with one.

        Args:
            about: method, its options, the transform.
            at_theta: whether the weights are.
            positions: of an ordinary step, which begins at theta, or one step ahead.
            writes: whether it is this process that does. Where weights are sharded, the others are
                needed for their fingerprint.
        """
        groups = self._groups
        header = {
            **self.about(about),
            "first_step": groups.step,
            "path": [position.to_json() for position in positions],
            **self._settings(buckets),
        }
        base = self._known_base() if at_theta else None
        if not resume:
            groups.count(restores=0)
        if not writes:
            return
        if resume:
            now = groups.step, groups.restores
            self._writer = Writer.resume(file, header, *now, self._saved(), base)
        else:
            assert base is not None
            self._writer = Writer.create(file, {**header, "base": base()})

    def about(self, about: dict[str, Any]) -> dict[str, Any]:
        """What the logs of a run have in common."""
        groups = self._groups
        parameters = parameter_table(groups.all)
        return {
            "contract": CONTRACT_VERSION,
            **about,
            "seed": groups.seed,
            "parameters": parameters,
        }

    def unseen(
        self, log: Log, about: dict[str, Any], until: int | None, whole: bool = False
    ) -> list[Event]:
        """The events of a log of this run that the weights, which are at theta, have not seen.

        Args:
            about: method, its options, the transform.
            until, whole: as `events_after`.

        Raises:
            ValueError: it is not of this run, or not of these steps.
        """
        groups = self._groups
        check_same_run(log.path, log.header, self.about(about))
        base = self._known_base()
        events, checksum = events_after(log, groups.step, groups.restores, until, whole)
        saved = self._saved()
        if saved is not None:
            check_checksum(log.path, groups.step, checksum, saved)
        elif checksum == log.checksum_of_header:
            check_base(log.path, log.header, base())
        return events

    def to_send(self, file: str | os.PathLike[str] | None) -> bytes:
        """What others need to come to where these weights are, or will be when they have seen the
        log of a file; empty: the run begins.

        Raises:
            FileNotFoundError: the weights have made steps, and there is no log of them.
            ValueError: the file is no log or damaged; or it is not said which log.
        """
        if self._writer is not None:
            if file is not None:
                raise ValueError("a replay log is being written: join() sends it, without a path")
            return self._writer.read()
        if file is None:
            raise ValueError("join() needs the path of the run's replay log on the first rank")
        if not (log := bytes_of_steps(Path(file), CONTRACT_VERSION)) and self._groups.step:
            raise FileNotFoundError(
                f"{file} is no log of the {self._groups.step} steps that the optimizer has made"
            )
        return log

    def _saved(self) -> int | None:
        """The checksum that the log had when the present state was saved; None: it is not known."""
        step, restores, checksum = self._groups.shared("log") or (-1, -1, 0)
        same = (step, restores) == (self._groups.step, self._groups.restores)
        return checksum if same else None

    def _known_base(self) -> Callable[[], str]:
        """What gives the fingerprint of the weights at hand. Where they are sharded, all processes
        make it, and not only those that look at it."""
        params = self._groups.params()
        if any(map(is_sharded, params)):
            return partial(str, fingerprint(params))
        return partial(fingerprint, params)

    def save(self) -> tuple[int, ...]:
        """All lines are on the disk when this returns. What a saved state has of the log, so that
        it is continued with none but this one: steps, restores after them, checksum; empty: no log
        is open."""
        if self._writer is None:
            return ()
        with suppress(FileNotFoundError):  # the next line will tell
            self._writer.sync()
        return self._groups.step, self._groups.restores, self._writer.checksum

    def close(self) -> None:
        """Nothing more is written."""
        self.save()
        self._writer = None

    def begin(self) -> tuple[list[Any], list[float] | None]:
        """The way so far; from here on another one begins."""
        way = self.path, self.probes
        self.path, self.probes = [], None
        return way

    def restored(self, path: list[Any], probes: list[float] | None, buckets: list[Bucket]) -> None:
        """The weights were put at theta."""
        if self._writer is not None:
            self._writer.restore(self._groups.step, path, self._settings(buckets), probes)

    def updated(
        self,
        step: int,
        path: list[Any],
        probes: list[float] | None,
        grads: Tensor | None,
        buckets: list[Bucket],
    ) -> None:
        """An update was applied, or skipped (no grads)."""
        if self._writer is not None:
            flat = [] if grads is None else grads.reshape(-1).tolist()
            values = None if grads is None else [float(f"{grad:.9g}") for grad in flat]
            self._writer.update(step, path, values, self._settings(buckets), probes)

    def positions(self, buckets: Sequence[Bucket]) -> list[int]:
        """Of the parameters of buckets."""
        taken = {id(p) for bucket in buckets for p in bucket.owners}
        return [i for i, p in enumerate(self._groups.params()) if id(p) in taken]

    def _settings(self, buckets: Sequence[Bucket]) -> dict[str, Any]:
        """What a replay must know besides the projected gradients."""
        hyper = self._groups.defaults.keys() - {"initial_lr", *COUNTERS}
        return {
            "groups": [
                {name: _plain(value) for name, value in group.items() if name in hyper}
                for group in self._groups.all
            ],
            "trainable": self.positions(buckets),
            "in_place": list(self._groups.shared("in_place")),
            "bases": self._direction.bases(self._groups.params()),
        }


def parameter_table(param_groups: list[dict[str, Any]]) -> list[list[Any]]:
    """Name (or null), shape, dtype and group of every parameter, in optimizer order."""
    table = []
    for number, group in enumerate(param_groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            dtype = str(p.dtype).removeprefix("torch.")
            table.append([name, list(p.shape), dtype, number])
    return table


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON gives it back."""
    if isinstance(value, Tensor):
        return float(value)
    return list(value) if isinstance(value, tuple) else value
