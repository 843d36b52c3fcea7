"""Where the weights go in a step: perturbations in order, and which losses go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from zo_fused.checks import choice, switch, whole

BLOCK_ORDERS = ("sequential", "simultaneous")


class Position(NamedTuple):
    """``theta + sign * eps * z`` with the z of a query, in one block of parameters or in all."""

    sign: float
    query: int = 0
    block: int | None = None

    def to_json(self) -> Any:
        """The sign, or a list of all that tells the position."""
        if self.block is not None:
            return [self.sign, self.query, self.block]
        return [self.sign, self.query] if self.query else self.sign


@dataclass(frozen=True)
class Schedule:
    """The arguments of optimizers that say which losses a step takes: see `ZerothOrderOptimizer`.

    Raises:
        TypeError: deferred or one_sided is no bool.
        ValueError: one is out of range, or two don't go together.
    """

    deferred: bool = False
    one_sided: bool = False
    queries: int = 1
    block_order: str | None = None

    def __post_init__(self) -> None:
        for name in ("deferred", "one_sided"):
            object.__setattr__(self, name, switch(name, getattr(self, name)))  # it is frozen
        object.__setattr__(self, "queries", whole("queries", self.queries, 1))
        if self.block_order is not None:
            choice("block_order", self.block_order, BLOCK_ORDERS)
        if self.deferred and self.block_order is not None:
            raise ValueError("deferred saves nothing where blocks are perturbed one at a time")

    def turn(self, blocks: Sequence[int], step: int) -> int | None:
        """The only block that a step has to do with; None for all."""
        return blocks[step % len(blocks)] if self.block_order == "sequential" else None

    def positions(self, blocks: Sequence[int]) -> list[Position]:
        """Where a step takes its losses, in the order that costs the fewest sweeps."""
        apart = blocks if self.block_order == "simultaneous" else [None]
        if not self.one_sided:
            return [
                Position(sign, query, block)
                for block in apart
                for query in range(self.queries)
                for sign in (1.0, -1.0)
            ]
        out = [Position(1.0, query, block) for block in apart for query in range(self.queries)]
        # from where the schedule has the weights
        return [out[0], Position(0.0), *out[1:]] if self.deferred else [Position(0.0), *out]

    def pairs(self, losses: Mapping[Position, Any]) -> tuple[list[Any], list[Any]]:
        """The losses that every projected gradient is the difference of, block by block."""
        plus = [position for position in losses if position.sign > 0]
        other = [Position(0.0) if self.one_sided else p._replace(sign=-1.0) for p in plus]
        return [losses[p] for p in plus], [losses[p] for p in other]

    def usual_path(self, blocks: Sequence[int]) -> list[Any]:
        """The perturbations of a step as a log has them; at theta, a first one does nothing."""
        positions = self.positions(blocks)
        if not self.deferred and positions[0].sign == 0:
            del positions[0]
        return [position.to_json() for position in positions]
