"""MeZO-GV and MeZO-Greedy: MeZO along directions that losses have chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zo_fused.checks import choice, whole
from zo_fused.directions.dense import Dense
from zo_fused.directions.guided import PRIORS, Guided
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import Position
from zo_fused.step.vectors import Vector, all_finite


def direction_of(prior: str | None, pool: int | None, distribution: str) -> Dense:
    """The direction of these arguments.

    Raises:
        TypeError, ValueError: there is no such prior, or it has not so many candidates.
    """
    if prior is None:
        if pool is not None:
            raise ValueError(f"pool={pool!r} is of a prior: give prior, one of {PRIORS}")
        return Dense(distribution)
    survives = choice("prior", prior, PRIORS) == "survivor"
    pool = (2 if survives else 4) if pool is None else whole("pool", pool, 1)
    if pool < 2 or (survives and pool != 2):
        wanted = "2" if survives else "at least 2"
        raise ValueError(f"pool must be {wanted} with prior={prior!r}, got {pool}")
    return Guided(prior, pool, distribution)


class TakesPrior(ZerothOrderOptimizer):
    """A method whose direction may be `Guided`: it then takes the losses of all candidates before
    those of a step."""

    @property
    def _guided(self) -> Guided | None:
        return self.direction if isinstance(self.direction, Guided) else None

    @property
    def forwards(self) -> int:
        saved = self.schedule.queries if self._guided and self._guided.prior == "greedy" else 0
        return super().forwards - saved

    def probes(self) -> list[Position]:
        pool = self._guided.pool if self._guided else 0
        return [Position(1.0, j, True) for j in range(pool * self.schedule.queries)]

    def known(self, of_probes: Mapping[Position, Any]) -> dict[Position, Any]:
        """Greedy steps go along a candidate: its loss is that on the plus side."""
        if self._guided is None or self._guided.prior != "greedy":
            return {}
        best = enumerate(self._guided.best())
        return {Position(1.0, query): of_probes[Position(1.0, j, True)] for query, j in best}

    def update(self, grads: Vector) -> None:
        super().update(grads)
        if self._guided and self._guided.prior == "survivor" and all_finite(grads):
            self._guided.keep_survivors()
