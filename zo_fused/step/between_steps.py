"""What may be done with an optimizer between its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from zo_fused.checks import finite
from zo_fused.step.access import plain_tensors
from zo_fused.step.base import Base
from zo_fused.step.schedule import Position
from zo_fused.step.vectors import Vector


class BetweenSteps(Base):
    """Where a step takes its losses, and what may be done between two: perturbing by hand, theta
    for evaluations."""

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

    @property
    def timings(self) -> dict[str, float] | None:
        return self._timer.timings

    @timings.setter
    def timings(self, timings: dict[str, float] | None) -> None:
        self._timer.timings = timings

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

    def update(self, grads: Vector) -> None:
        """See `ZerothOrderOptimizer`."""
        raise NotImplementedError
