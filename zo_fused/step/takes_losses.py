"""What a method may use to take the losses of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zo_fused.step.evaluation import Closure
from zo_fused.step.logged import Logged
from zo_fused.step.schedule import Position
from zo_fused.step.vectors import as_float64
from zo_fused.step.weights import Place


class TakesLosses(Logged):
    """Losses where a method wants them; where ranks take a step together, means over the ranks."""

    def losses_at(
        self, positions: Sequence[Position], closure: Closure, again: bool = False
    ) -> dict[Position, Any]:
        """The losses at positions of this step: numbers, or float64 tensors [] on a GPU. `again`:
        others were taken before in this step, whose dropout these have, too."""
        losses = self._evaluation.losses_at(positions, closure, again)
        return {position: as_float64(loss) for position, loss in losses.items()}

    def loss_at(self, place: Place, closure: Closure) -> Any:
        """One more loss of this step, at any place on the line along a z, with the dropout of the
        others. The log has the place; the weights stay there."""
        return as_float64(self._evaluation.loss_at(place, closure))

    def numbers_at_theta(
        self, queries: int, width: int, take: Callable[[int], Sequence[Any]]
    ) -> list[Sequence[Any]]:
        """Other numbers than a loss, `width` for each query, that a forward pass at theta gives."""
        return self._evaluation.at_theta(queries, width, take)
