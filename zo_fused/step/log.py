"""What an optimizer writes into a replay log: where it was perturbed and what it applied."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from zo_fused.noise.streams import CONTRACT_VERSION
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction
from zo_fused.step.fingerprint import fingerprint
from zo_fused.step.groups import COUNTERS, Groups
from zo_fused.step.log_writer import Writer
from zo_fused.step.schedule import Position


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
    ) -> None:
        """Start a log, or go on with one.

        Args:
            about: method, its options, the transform.
            at_theta: whether the weights are.
            positions: of an ordinary step, which begins at theta, or one step ahead.
        """
        groups = self._groups
        header = {
            **self.about(about),
            "first_step": groups.step,
            "path": [position.to_json() for position in positions],
            **self._settings(buckets),
        }
        if resume:
            step, restores, checksum = groups.shared("log") or (-1, -1, 0)
            same = (step, restores) == (groups.step, groups.restores)  # as when it was saved
            known, base = checksum if same else None, self._base if at_theta else None
            now = groups.step, groups.restores
            self._writer = Writer.resume(file, header, *now, known, base)
        else:
            groups.count(restores=0)
            self._writer = Writer.create(file, {**header, "base": self._base()})

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

    def _base(self) -> str:
        return fingerprint(self._groups.params())

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

    def _settings(self, buckets: Sequence[Bucket]) -> dict[str, Any]:
        """What a replay must know besides the projected gradients."""
        hyper = self._groups.defaults.keys() - {"initial_lr", *COUNTERS}
        taken = {id(p) for bucket in buckets for p in bucket.owners}
        return {
            "groups": [
                {name: _plain(value) for name, value in group.items() if name in hyper}
                for group in self._groups.all
            ],
            "trainable": [i for i, p in enumerate(self._groups.params()) if id(p) in taken],
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
