"""Where the weights go in a step: perturbations in order, and which losses go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import Parameter, Signature
from typing import Any, NamedTuple, TypedDict, get_type_hints

from zo_fused.checks import choice, switch, whole
from zo_fused.parallel.options import Option
from zo_fused.step.vectors import as_float64

BLOCK_ORDERS = ("sequential", "simultaneous")


class Position(NamedTuple):
    """``theta + sign * eps * z`` with the z of a query of the step, or of a probe."""

    sign: float
    query: int = 0
    probe: bool = False

    def to_json(self) -> list[Any]:
        """As a replay log has it."""
        return [self.sign, self.query, "probe"] if self.probe else [self.sign, self.query]


# The losses that a projected gradient is the difference of (numbers, or tensors [] on a device),
# and how many eps they were taken apart.
Side = tuple[Any, Any, int]


@dataclass(frozen=True)
class Schedule:
    """The arguments of optimizers that say which losses a step takes: see `ZerothOrderOptimizer`.

    Blocks have queries of their own: with the blocks b0, b1, .. in order, those of b0 come first.

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
        object.__setattr__(self, "queries", whole("queries", self.queries, 1, bits=32))
        if self.block_order is not None:
            choice("block_order", self.block_order, BLOCK_ORDERS)
        if self.deferred and self.block_order is not None:
            raise ValueError("deferred saves nothing where blocks are perturbed one at a time")

    def count(self, blocks: Sequence[int]) -> int:
        """Queries of a step, and so projected gradients."""
        return self.queries * (len(blocks) if self.block_order == "simultaneous" else 1)

    def block_of(self, blocks: Sequence[int], step: int, query: int = 0) -> int | None:
        """The only block that a query moves; None: it moves all.

        Raises:
            ValueError: a step has no such query.
        """
        count = self.count(blocks)
        if not 0 <= query < count:
            raise ValueError(f"query must lie in [0, {count}), got {query}; see queries=")
        if self.block_order is None:
            return None
        turn = step % len(blocks) if self.block_order == "sequential" else query // self.queries
        return blocks[turn]

    def positions(self, count: int) -> list[Position]:
        """Where a step takes its losses, in the order that costs the fewest sweeps."""
        if not self.one_sided:
            return [Position(sign, query) for query in range(count) for sign in (1.0, -1.0)]
        out = [Position(1.0, query) for query in range(count)]
        # from where the schedule has the weights
        return [out[0], Position(0.0), *out[1:]] if self.deferred else [Position(0.0), *out]


class StepOptions(TypedDict, total=False):
    """Keywords that most methods take: see `ZerothOrderOptimizer`."""

    eps: float
    weight_decay: float
    rounding: str
    seed: int
    deferred: bool
    one_sided: bool
    queries: int
    block_order: str | None
    parallel: Option


GROUP_DEFAULTS: dict[str, Any] = {"eps": 1e-3, "weight_decay": 0.0, "rounding": "nearest"}
STEP_DEFAULTS: dict[str, Any] = {
    **GROUP_DEFAULTS,
    "seed": 0,
    **asdict(Schedule()),
    "parallel": "auto",
}
_STEP_PARAMETERS = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=STEP_DEFAULTS[name], annotation=hint)
    for name, hint in get_type_hints(StepOptions).items()
]


def spelled_out(own: Signature, parent: Signature | None) -> Signature:
    """A constructor's signature with names in the place of its ``**keywords``: those of
    `StepOptions`, where that is their annotation or there is no parent, else what the constructor
    of the parent takes besides."""
    named = list(own.parameters.values())
    if not named or named[-1].kind is not Parameter.VAR_KEYWORD:
        return own
    last = named.pop()
    more = _STEP_PARAMETERS
    if parent is not None and StepOptions.__name__ not in str(last.annotation):
        more = list(parent.parameters.values())[1:]  # the first: what to tune
    known = {parameter.name for parameter in named}
    more = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in more if p.name not in known]
    return own.replace(parameters=[*named, *more])


def pairs(losses: Mapping[Position, Any]) -> list[Side]:
    """The two sides of every query: theta + eps z and theta - eps z, or else theta. Of losses at
    theta + eps z alone, several of them, each has the mean of the others on the other side
    (leave-one-out), which on average is no nearer to its own z than to any.

    Raises:
        ValueError: a loss has no other to be compared with.
    """
    if len(losses) > 1 and all(position.sign > 0 for position in losses):
        found = [as_float64(loss) for loss in losses.values()]
        total, others = sum(found), len(found) - 1
        return [(loss, (total - loss) / others, 1) for loss in found]
    sides = []
    for position in losses:
        if position.sign > 0:
            other = position._replace(sign=-1.0)
            two_sided = other in losses
            if not two_sided and Position(0.0) not in losses:
                raise ValueError(
                    f"{position} needs a loss at the other sign or at Position(0.0), or of another "
                    "query if there are none"
                )
            away = losses[other] if two_sided else losses[Position(0.0)]
            sides.append((losses[position], away, 2 if two_sided else 1))
    return sides
