"""What an update rule must do: `zo_fused.rules` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zo_fused.noise.keys import Step
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction, Sweep, Term
from zo_fused.step.vectors import Flag, Vector, where
from zo_fused.sweeps.shards import is_sharded


@dataclass
class Update:
    """One step's update of one bucket. Vectors have a row a parameter."""

    bucket: Bucket
    param_groups: list[dict[str, Any]]
    seed: int
    step: Step
    displaced: int  # along the z of this query are the weights,
    restore: Vector  # and this coefficient of it takes them back to theta
    grads: list[Vector]  # a query: projected gradient / queries, times the direction's update scale
    lr: Vector
    decay: Vector  # 1 - lr * weight_decay
    ahead: Vector | None  # coefficient of the next step's z; None: the weights end at theta
    skipped: Flag  # True: no update, because a loss was not finite; then all `grads` are zero
    rounding: Tensor | None  # key of the step's rounding stream, int64 [1]; None: to nearest

    @property
    def number(self) -> int:
        """The step, for rules that can't be captured."""
        assert isinstance(self.step, int)
        return self.step

    @property
    def finite(self) -> Flag:
        """Whether there is an update."""
        return ~self.skipped if isinstance(self.skipped, Tensor) else not self.skipped

    @property
    def back(self) -> Vector:
        """Coefficient of the z that the weights are displaced along which takes them, decayed, back
        to theta, decayed; in a step that is skipped, to theta."""
        if self.decay is self.bucket.ones:
            return self.restore
        return self.if_finite(self.decay * self.restore, self.restore)

    def if_finite(self, value: Vector, otherwise: Vector | float) -> Vector:
        """The value of a good step, or what stands for it in a step that is skipped."""
        return value if self.skipped is False else where(self.finite, value, otherwise)

    @property
    def factor(self) -> Vector:
        """What the weights are multiplied by: `decay`, or 1 in a step that is skipped."""
        return self.decay if self.decay is self.bucket.ones else self.if_finite(self.decay, 1.0)

    def write(self, direction: Direction, *terms: Term) -> None:
        """``p = decay * p + sum of the terms``, and the next perturbation."""
        if self.ahead is not None:
            first = Term(self.step + 1, self.ahead, probe=direction.begins_with_probe)
            terms = (*terms, first)
        direction.sweep(Sweep(self.bucket, self.seed, terms, self.factor, self.rounding))


def check_state(name: str, kept: Tensor, shape: Sequence[int], p: Tensor) -> None:
    """What a state has for a parameter must be of its shape.

    Raises:
        ValueError: it is not: the state is of another model, or the parameter has changed.
    """
    if not isinstance(kept, Tensor):
        raise ValueError(f"the state has {name} that is no tensor, but {type(kept).__name__}")
    if is_sharded(p) and list(shape) == list(p.shape):
        mine, its = (getattr(tensor, "placements", "whole") for tensor in (p, kept))
        if mine != its:
            raise ValueError(
                f"the state has {name} placed as {its} for a parameter placed as {mine}: load it "
                "with torch.distributed.checkpoint, which places it anew"
            )
    if list(kept.shape) != list(shape):
        raise ValueError(
            f"the state has {name} of shape {list(kept.shape)} for a parameter of shape "
            f"{list(p.shape)}, which needs {list(shape)}"
        )


def check_entries(bucket: Bucket, state: dict[Any, Any]) -> None:
    """What a bucket's sweeps take from the state must be what the state has.

    Raises:
        RuntimeError: it was removed or replaced.
    """
    made: list[Any] = bucket.once(
        "state entries", lambda: [state[p] for p in bucket.owners if p in state]
    )
    ids: set[int] = bucket.once("ids of state entries", lambda: set(map(id, made)))
    if not ids.issubset(map(id, state.values())):  # in loops of C
        raise RuntimeError(
            "the optimizer's state was cleared, or replaced for a parameter, between steps: "
            "load_state_dict() takes another state, and a new optimizer has none"
        )


class Rule:
    """What a projected gradient does to the weights. `state` is the optimizer's, by parameter.

    Attributes:
        takes: the kinds of directions that it knows the z of.
        draws: whether it makes sweeps of its own with that z, instead of the direction's `sweep`.
        sweeps_alone: whether all it does to weights are sweeps: a replay makes many at a time.
        together: names in the state of a parameter that mean something together alone.
        not_capturable: why a step can't be captured in a CUDA graph; empty if it can.
    """

    takes: tuple[type[Direction], ...] = (Direction,)
    draws: bool = False
    sweeps_alone: bool = True
    together: tuple[str, ...] = ()
    not_capturable: str = ""

    def not_sharded(self) -> str:
        """As `Direction.not_sharded`."""
        return "its update needs whole tensors"

    def prepare(self, update: Update, direction: Any, state: dict[Any, Any]) -> None:
        """Make the state of a new bucket, before anything moves."""

    def apply(self, update: Update, direction: Any, state: dict[Any, Any]) -> None:
        """Take back the perturbation, apply the update and go ahead, in one sweep."""
        raise NotImplementedError
