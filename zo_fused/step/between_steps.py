"""What may be done with an optimizer between its steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zo_fused.checks import finite
from zo_fused.step.access import plain_tensors
from zo_fused.step.base import Base
from zo_fused.step.schedule import Position
from zo_fused.sweeps.shards import is_sharded


class BetweenSteps(Base):
    """Where a step takes its losses, and what may be done between two: perturbing by hand, theta
    for evaluations, the replay log."""

    def positions(self) -> list[Position]:
        """Where a step takes its losses, in order."""
        return self.schedule.positions(self.weights.queries())

    def probes(self) -> list[Position]:
        """Where this step takes losses beforehand, for the direction to learn from."""
        return []

    @property
    def forwards(self) -> int:
        """Forward passes over a batch that the next step takes, probes included."""
        self.look()
        return len(self.positions()) + len(self.probes())

    def look(self) -> None:
        """Look at what there is to tune, between steps."""
        with self._access.going_away():  # which lifts the guard
            self.weights.look()

    def forwards_of(self, steps: int) -> int:
        """Forward passes of the first steps of a run. A method whose steps differ, as where some
        have probes, counts them here."""
        return steps * self.forwards

    # ---- perturbations --------------------------------------------------------------------------

    @plain_tensors
    def perturb(self, sign: float, query: int = 0) -> None:
        """Put the weights at ``theta + sign * eps * z`` with z of a query of the coming step, from
        wherever they are.

        One sweep, or none if they are there. `step` with losses merges the way back with the
        update; `flush` goes back without.

        Raises:
            ValueError: a step has no such query.
        """
        sign = finite("sign", sign)
        with self._access.going_away():
            self._access.drop_pending()
            self.weights.look_again()
            if self.schedule.block_order is not None and not self.weights.place.at:
                self.weights.look()  # what blocks there are
            with self._timer("perturb"):
                self.weights.visit(Position(sign, query))

    @contextmanager
    def perturbed(self, sign: float, query: int = 0) -> Iterator[None]:
        """``with opt.perturbed(+1): loss_plus = f()``, for loops that own their forward pass.

        The weights are back at theta after the block, so two blocks and a step cost five sweeps;
        `step` with a closure costs three.
        """
        self.perturb(sign, query)
        try:
            yield
        finally:
            self.perturb(0.0)

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """``with opt.unperturbed(): evaluate(model)``: a block with the weights at theta."""
        self.flush()
        yield

    def eval(self) -> None:
        """Put the weights at theta, as `flush`: the words of schedule-free optimizers, which
        training loops call before they evaluate or save."""
        self.flush()

    def train(self) -> None:
        """Nothing: the next step goes on from theta."""

    # ---- the replay log -------------------------------------------------------------------------

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
            NotImplementedError: parameters are sharded.
        """
        if any(map(is_sharded, self._groups.params())):
            raise NotImplementedError(
                "parameters are sharded, and a process sees none of them whole, by which a log "
                "recognises the weights that it starts from: save with "
                "torch.distributed.checkpoint (docs/sharded.md)"
            )
        weights = self.weights
        if not resume or (weights.place.at and not weights.ahead):
            self.flush()
        self.close_log()
        with self._access.alone():
            weights.look()
        if not resume and self.step_count > 0 and self.state:
            raise ValueError(
                "a replay log of this method must start with its first step; "
                "pass resume=True to continue the log of this run"
            )
        positions = [] if weights.beside.paired else self.positions()
        if positions and positions[0].sign == 0 and not self.schedule.deferred:
            del positions[0]  # they are there
        at_theta = not weights.away()
        weights.log.open(path, resume, at_theta, self._about(), positions, weights.buckets)

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

    def close_log(self) -> None:
        """Stop writing the replay log."""
        self.weights.log.close()
