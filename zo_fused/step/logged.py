"""The replay log of a run: written, and done again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zo_fused.noise.streams import CONTRACT_VERSION
from zo_fused.parallel.groups import Groups
from zo_fused.parallel.telling import known_to_first, on_all
from zo_fused.step import log_lines
from zo_fused.step.access import plain_tensors
from zo_fused.step.between_steps import BetweenSteps
from zo_fused.step.log_bytes import read_by_first, received
from zo_fused.step.log_lines import Event
from zo_fused.step.repeat import repeat
from zo_fused.step.sharded import check_told
from zo_fused.sweeps.shards import is_sharded


class Logged(BetweenSteps):
    """What may be done with a replay log between steps."""

    state_beyond_log = False  # whether `transform` keeps something; logs have what it returns

    @plain_tensors
    def start_log(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        """Write a replay log from here on, a line a step (docs/replay.md).

        Args:
            path: file to write. It is replaced, unless
            resume: the run goes on from a checkpoint at the present step: the log is continued, and
                lines of later steps are dropped.

        Raises:
            ValueError: the log is of another run, or the optimizer already has momentum that a new
                log would lack.
            NotImplementedError: parameters are sharded among processes that don't tell each other
                their losses.

        Where parameters are sharded, all processes call this, and the first of them writes.
        """
        groups, weights = self._told(), self.weights
        if not resume or (weights.place.at and not weights.ahead):
            self.flush()
        self.close_log()
        self.look()
        if not resume and self.step_count > 0 and self.state:
            raise ValueError(
                "a replay log of this method must start with its first step; "
                "pass resume=True to continue the log of this run"
            )
        positions = [] if weights.beside.paired else self.positions()
        if positions and positions[0].sign == 0 and not self.schedule.deferred:
            del positions[0]  # they are there
        at_theta = not weights.away()
        about, writes = self._about(), groups is None or groups.is_first

        def start() -> None:
            buckets = weights.buckets
            weights.log.open(path, resume, at_theta, about, positions, buckets, writes)

        on_all(groups, self._device(), start)

    def _told(self) -> Groups | None:
        """The ranks that parameters are sharded among, if they are."""
        if not any(map(is_sharded, self._groups.params())):
            return None
        groups = self.ranks.groups()
        check_told(self._groups.params(), groups)
        return groups

    def _about(self) -> dict[str, Any]:
        """The method, as a replay log has it."""
        # of a method that names them otherwise, such as a population: readers count by them
        queries = {"queries": n} if (n := self.schedule.queries) > 1 else {}
        about = {
            "transform": self.direction.options.get("transform", "portable"),
            "method": type(self).__name__,
            "options": self._options | queries,
        }
        home = type(self).__module__
        if not home.startswith(("zo_fused.", "__main__")):
            about["module"] = home  # to be imported before a replay
        return about

    @plain_tensors
    def replay(
        self, log: str | os.PathLike[str], until: int | None = None, progress: bool = False
    ) -> int:
        """Make the steps of a replay log that this optimizer has not made yet, without losses. It
        is then as it was right after the last of them: weights (where the schedule rests), momentum
        and moments. So a run goes on from its base weights and its log, and ends in the bits of one
        that was never cut off; ``start_log(log, resume=True)`` continues the log.

        What followed the last step in the log, such as an attempt that was not finished or `flush`
        for an evaluation, is left out. Hyper-parameters of the groups stay as they are: set them,
        or make a scheduler, as at that step. Ctrl-C comes between two steps; another call goes on.

        Args:
            log: path of the log, of this method with these options, seed and parameters. Where
                parameters are sharded, all processes call this, and the first of them reads it.
            until: the step to stop before, so `step_count` afterwards; None: the end of the log.
            progress: show a tqdm bar.

        Returns:
            Number of steps that were made.

        Raises:
            FileNotFoundError: no such log.
            ValueError: the file is no log or damaged (with the line), of another run, from another
                base, or has other steps; nothing has moved.
            RuntimeError: a log is being written.
            NotImplementedError: the method's state is not all in the log, or `start_log` says so.
        """
        self._prepare_replay()
        with self._access.going_away():
            begin, groups = self._groups.step, self._told()
            with read_by_first(groups, self._device(), log) as file:
                events = on_all(groups, self._device(), lambda: self._unseen(file, until))
            self._repeat(events, progress)
            return self._groups.step - begin

    def _device(self) -> torch.device:
        if not self.weights.buckets:
            self.weights.look()
        return self.weights.buckets[0].device

    @plain_tensors
    def join(self, log: str | os.PathLike[str] | None = None, progress: bool = False) -> int:
        """Bring all ranks to the present step of the run by the replay log of the first one, and go
        on writing it. At the start of a program this is all that a run needs to be resumed, on as
        many ranks as there are then; also in one process.

        The first rank decides: is there no log, the run begins and it starts one. The others get
        the bytes from it and never look for a file, as one that looks later may see another. Each
        makes the steps that it has not made, as `replay`, with what that says of hyper-parameters
        and of an attempt that was not finished. The next step compares all weights.

        Where the first rank is in the middle of the run and writes its log (no `log` is given
        then), ranks that are new come to where it is; it does nothing itself.

        Args:
            log: path of the log, on the first rank (of all ranks: of `parallel`'s, the first of
                each dimension); elsewhere it is not looked at.
            progress: show a tqdm bar on the first rank.

        Returns:
            Number of steps that were made on this rank.

        Raises:
            FileNotFoundError: the first rank has made steps and there is no log of them.
            ValueError: as `replay`; or a log is needed and not given, or given and another is open.
            RuntimeError: another rank failed, which is where to look. As long as one can't begin,
                none has moved.
            NotImplementedError: as `replay`; or a rank has a part of the weights alone, so that it
                can't begin anew in the middle of the run.
        """
        weights, begin = self.weights, self.step_count
        self.look()
        groups, device, shards = self.ranks.groups(), self._device(), self._told() is not None
        first = groups is None or groups.is_first
        writes = first and weights.log.is_open

        def prepare() -> None:
            if writes and shards:
                raise NotImplementedError(
                    "parameters are sharded: all ranks begin anew, from base weights and log"
                )
            if not writes:
                self._prepare_replay()

        on_all(groups, device, prepare)
        with self._access.going_away():
            sent = known_to_first(groups, device, lambda: weights.log.to_send(log))

            def check() -> list[Event]:
                with received(sent) as file:
                    return self._unseen(file, None, whole=True) if sent and not writes else []

            events = on_all(groups, device, check)
            on_all(groups, device, lambda: self._repeat(events, progress and first))
        start = partial(self.start_log, log, resume=bool(sent))  # type: ignore[arg-type]
        on_all(groups, device, start if (first or shards) and not writes else lambda: None)
        self.ranks.meet_anew()
        return self._groups.step - begin

    def _prepare_replay(self) -> None:
        if self.state_beyond_log:
            raise NotImplementedError(
                f"{type(self).__name__} has a state that replay logs lack: go on from a saved one "
                "(zo_fused.replay gives the weights)"
            )
        if self.weights.log.is_open:
            raise RuntimeError("a replay log is being written: close_log() first")
        self._told()
        if self.weights.place.at and not self.weights.ahead:
            self.flush()

    def _unseen(self, file: Path, until: int | None, whole: bool = False) -> list[Event]:
        self._access.drop_pending()
        record = log_lines.read(file, CONTRACT_VERSION)
        events = self.weights.log.unseen(record, self._about(), until, whole)
        self.check_events(file, events)
        return events

    def check_events(self, file: Path, events: Iterable[Event]) -> None:
        """Look at the hyper-parameters of events before any is done.

        Raises:
            ValueError: they are none of this method.
        """
        groups, seen = self._groups, None
        before = [dict(group) for group in groups.all]
        try:
            for event in events:
                if event.groups is not seen:
                    seen = event.groups
                    groups.take(seen)
                    for group in groups.all:
                        self.check_group(group)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: of step {event.step}, {error}") from None
        finally:
            for group, values in zip(groups.all, before, strict=True):
                group.clear()
                group.update(values)

    def _repeat(self, events: Iterable[Event], progress: bool) -> None:
        if progress:
            from tqdm import tqdm

            events = tqdm(events, desc="replay", unit="step")
        weights = self.weights
        weights.look()
        moving = weights.log.positions(weights.buckets)
        pause = self._access.interruptible(lambda: 0.0)
        repeat(weights, self.rule, self.update, _with_pauses(events, pause), moving)

    def close_log(self) -> None:
        """Stop writing the replay log."""
        self.weights.log.close()


def _with_pauses(events: Iterable[Any], pause: Callable[[], Any]) -> Iterator[Any]:
    """The events; between two, Ctrl-C gets through."""
    for event in events:
        pause()
        yield event
