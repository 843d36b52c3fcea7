"""Where the weights are, and the sweeps that take them elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_fused.noise.keys import DeviceStep, Step, Stream, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Beside, Direction, Sweep, Term
from zo_fused.step.groups import Groups
from zo_fused.step.log import StepLog
from zo_fused.step.parameters import Parameters
from zo_fused.step.rule import Rule, Update, check_entries
from zo_fused.step.schedule import Position, Schedule
from zo_fused.step.vectors import Flag, Vector, flag_on, judged, vector

_KEEPS_NOTHING = Beside()


class Place(NamedTuple):
    """``theta + at[group] * z`` with the z of a query, or of a probe; no numbers: theta."""

    at: tuple[float, ...] = ()
    query: int = 0
    probe: bool = False


THETA = Place()


class Weights:
    """The parameters of an optimizer and where they are. Knows no losses.

    Attributes:
        direction: whose z they move along.
        place: where they are.
        ahead: whether the last step's sweep has put them there; the present step has not begun.
        log: what is done to them is written there.
        moved: whether they were written since autograd was told.
        half_applied: whether some buckets have made the step and others not.
        device_step: in a step that is captured: its number.
        draws: whether evaluations draw random numbers on a GPU, such as dropout.
    """

    def __init__(
        self,
        groups: Groups,
        direction: Direction,
        schedule: Schedule,
        parameters: Parameters,
    ) -> None:
        self.groups = groups
        self.direction = direction
        self.schedule = schedule
        self.parameters = parameters
        self.log = StepLog(groups, direction)
        self.place = THETA
        self.ahead = False
        self.moved = False
        self.half_applied = False
        self.device_step: DeviceStep | None = None
        self.draws = False

    @property
    def buckets(self) -> list[Bucket]:
        return self.parameters.buckets

    @property
    def beside(self) -> Beside:
        """What the direction keeps beside the weights."""
        return self.direction if isinstance(self.direction, Beside) else _KEEPS_NOTHING

    @property
    def step(self) -> Step:
        """The number of the present step."""
        return self.groups.step if self.device_step is None else self.device_step

    def blocks(self) -> list[int]:
        """The numbers of the blocks, in their order."""
        return sorted({bucket.block for bucket in self.buckets})

    def queries(self) -> int:
        """Queries of a step."""
        return self.schedule.count(self.blocks())

    def away(self) -> bool:
        """Whether theta is not in the weights, or not all of it."""
        return bool(self.place.at) or any(map(self.beside.pending, self.buckets))

    def look(self) -> None:
        """Look at the groups before a step: what requires gradients, and where it lies."""
        self.groups.check_changes()
        self.beside.attach([])  # after a loss at theta it still is
        self.parameters.check_module(self.direction.state)
        if self.parameters.changed(self.direction):
            self.flush()  # over the parameters and in the windows that it began with
            self.tell_autograd()
            self.direction.leave()
            self.parameters.renew(self.direction)
        if not self.buckets:
            raise ValueError("zo_fused: no parameter requires gradients; there is nothing to tune")

    def look_again(self) -> None:
        """User code has run: parameters may have other memory."""
        try:
            for bucket in self.buckets:
                bucket.look_again()
        except (TypeError, ValueError):  # another shape or dtype, so new buckets are needed
            if self.away():
                raise
            self.parameters.forget()

    def tell_autograd(self) -> None:
        """Graphs that were built over the weights before must not be differentiated now."""
        if self.moved:
            self.moved = False
            self.parameters.tell_autograd()

    def visit(self, position: Position) -> None:
        """Put them at a position of the present step."""
        begins = self.ahead or not (self.place.at or self.log.path)
        if self.ahead or not self.place.at:
            self.look()
        else:
            self.groups.check_changes()
        self.groups.hold_eps(begins)
        self.go(self.along(position), position.to_json())

    def along(self, position: Position) -> Place:
        """Where a position is."""
        if position.sign == 0:
            return THETA
        block = None
        if not position.probe:
            block = self.schedule.block_of(self.blocks(), self.groups.step, position.query)
        radii = zip(self.groups.all, self.groups.eps(), strict=True)
        at = [position.sign * eps if block in (None, g["block"]) else 0.0 for g, eps in radii]
        query = position.query if position.probe else position.query % self.schedule.queries
        return Place(tuple(at), query, position.probe)

    def go(self, there: Place, entry: Any = None) -> None:
        """Put them at a place: one sweep, or none if they are there.

        Args:
            entry: what the log says of it, if not the numbers of the place.
        """
        if self._move(there) or self.ahead:
            at = list(there.at or (0.0,) * len(self.groups.all))
            along = {"query": there.query} | ({"probe": True} if there.probe else {})
            along = along if there.at and there[1:] != THETA[1:] else {}  # usually not said
            self.log.path.append({"at": at, **along} if entry is None else entry)
        self.ahead = False

    def flush(self) -> None:
        """Put them at theta, with all that is kept beside them."""
        self.look_again()
        moved = self._move(THETA)
        self.beside.attach([])
        settled = self._settle(self.groups.restores + 1)
        (path, probes), self.ahead = self.log.begin(), False
        if moved or settled or path:
            self.log.restored(path, probes, self.buckets)
            self.groups.count(restores=self.groups.restores + 1)

    def _move(self, there: Place) -> bool:
        """False if they were there."""
        if not any(there.at):
            there = THETA
        if there == self.place:
            return False
        for bucket in self.buckets:
            if terms := _way(self, bucket, there):
                self.moved = True
                self.direction.move(Sweep(bucket, self.groups.seed, terms, bucket.ones))
        self.place = there
        self.beside.attach(self.buckets if there.at else [])
        return True

    def perturbations(self, query: int) -> list[Sweep]:
        """The sweeps that would take them from theta to a query's plus side, one a bucket."""
        eps, seed = [b.hyper(self.groups.all, "eps") for b in self.buckets], self.groups.seed
        terms = [[Term(self.step, e, query=query)] for e in eps]
        return [Sweep(b, seed, t, b.ones) for b, t in zip(self.buckets, terms, strict=True)]

    def _settle(self, query: int) -> bool:
        """Write what the direction keeps beside them; False if there is nothing."""
        beside = self.beside
        done = [beside.settle(b, self._rounding_key(b.device, query)) for b in self.buckets]
        self.moved |= any(done)
        return any(done)

    def learn(self, found: Sequence[float]) -> None:
        """The direction gets the projected gradients of a step's probes."""
        self.log.probes = list(found)
        self.direction.learn(self.buckets, self.groups.seed, self.groups.step, found)

    def update(self, rule: Rule, grads: Vector, state: dict[Any, Any]) -> Flag:
        """Take back the perturbation and apply the update of these projected gradients: the end of
        the step. Returns whether it was skipped, because one is not finite."""
        self.groups.check_changes()
        if self.place.at and not self.ahead:
            self.groups.hold_eps()
        else:
            self.look()
        if self.place.probe or self.place.query >= self.schedule.queries:
            self.go(THETA)  # along none of the z that a rule takes back
        step, (usable, skipped) = self.groups.step, judged(grads)
        self._apply(rule, [u for b in self.buckets if (u := self._of(b, usable, skipped))], state)
        if any(self.beside.window_ends(bucket, step) for bucket in self.buckets):
            self._settle(query=0)
        path, probes = self.log.begin()
        try:
            if self.log.is_open:
                self.log.updated(step, path, probes, None if skipped else grads, self.buckets)
        finally:  # the weights have made the step, also where its line can't be written
            self.groups.count(step=step + 1, restores=0)
        return skipped

    def _of(
        self, bucket: Bucket, grads: Vector, skipped: Flag, every: bool = False
    ) -> Update | None:
        """The update of a bucket; None if no query of this step moves it. `every`: all do."""
        groups, blocks, queries = self.groups.all, self.blocks(), self.schedule.queries
        mine = [
            grad
            for query, grad in enumerate(grads.to(bucket.device, torch.float64).unbind())
            if every
            or self.schedule.block_of(blocks, self.groups.step, query) in (None, bucket.block)
        ]
        if not mine:
            return None
        eps, scale = self.groups.eps(), self.direction.update_scale(bucket)
        return Update(
            bucket=bucket,
            param_groups=groups,
            seed=self.groups.seed,
            step=self.step,
            displaced=self.place.query,
            restore=bucket.constant([-a for a in self.place.at] or [0.0] * len(groups)),
            grads=bucket.shares(mine, eps, queries, scale),
            lr=bucket.hyper(groups, "lr"),
            decay=bucket.decay(groups),
            ahead=bucket.constant(eps) if self.schedule.deferred else None,
            skipped=flag_on(skipped, bucket.device),
            rounding=self._rounding_key(bucket.device),
        )

    def make_state(
        self, rule: Rule, state: dict[Any, Any], updates: Sequence[Update] | None = None
    ) -> None:
        """What a rule keeps of the weights; with no updates to come, of all of them."""
        if updates is None:
            self.look()
            none = vector([0.0] * self.queries(), self.buckets[0].device)
            updates = [u for b in self.buckets if (u := self._of(b, none, False, every=True))]
        for u in updates:
            u.bucket.once("state", partial(rule.prepare, u, self.direction, state))
            check_entries(u.bucket, state)

    def _apply(self, rule: Rule, updates: list[Update], state: dict[Any, Any]) -> None:
        """Restore, update and the next perturbation, in one sweep of every bucket."""
        self.make_state(rule, state, updates)  # if there is no memory, nothing has moved yet
        self.moved = True
        for update in updates:
            rule.apply(update, self.direction, state)
            self.half_applied = True
        self.half_applied = False
        self.ahead = self.schedule.deferred
        first = Place(tuple(self.groups.eps()), probe=self.direction.begins_with_probe)
        self.place = first if self.ahead else THETA
        self.beside.attach(self.buckets if self.ahead else [])

    def _rounding_key(self, device: torch.device, query: int = 0) -> Tensor | None:
        if self.groups.shared("rounding", "nearest") == "nearest":
            return None
        stream = Stream(Purpose.ROUNDING, self.step, query=query)
        return stream_keys(self.groups.seed, [stream], device)


def _way(weights: Weights, bucket: Bucket, there: Place) -> list[Term]:
    """What a bucket's weights lack at the new place."""
    ends = [place for place in (weights.place, there) if place.at and bucket.has(place.at)]
    zeros = (0.0,) * len(weights.groups.all)
    if len(ends) == 2 and ends[0][1:] != ends[1][1:]:
        moves = [([-a for a in ends[0].at], ends[0]), (ends[1].at, ends[1])]
    else:
        distance = zip(weights.place.at or zeros, there.at or zeros, strict=True)
        moves = [([b - a for a, b in distance], place) for place in ends[-1:]]
    return [
        Term(weights.step, bucket.constant(by), query=place.query, probe=place.probe)
        for by, place in moves
        if bucket.has(by)
    ]
