"""What a direction must do: `zo_fused.directions` has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from zo_fused.step.buckets import Bucket
from zo_fused.step.vectors import Vector


class Term(NamedTuple):
    """``coeff * z`` with the z of a step's query."""

    step: int
    coeffs: Vector
    factor: Tensor | None = None  # low rank: a flat factor instead of the query's U
    query: int = 0


class Direction:
    """What an optimizer and its update rule need from a direction.

    What follows `update_scale` is for directions that keep a part of the weights beside them
    (`zo_fused.directions.factored.direction`); the others have nothing to do.
    """

    fixed: tuple[str, ...] = ()  # hyper-parameters that shape the noise: see `Bucket.fixed`
    beside = False  # whether matrices get buckets of their own: see `Bucket.beside`
    module: nn.Module | None = None  # that takes part in evaluations
    paired = False  # whether both signs are evaluated at once, by `both`

    @property
    def options(self) -> dict[str, Any]:
        """Of the sweeps that draw z themselves."""
        return {}

    def sweep(
        self,
        bucket: Bucket,
        seed: int,
        terms: Sequence[Term],
        decay: Vector,
        rounding: Tensor | None = None,
    ) -> None:
        """``p = decay * p + sum of the terms`` in one sweep.

        Args:
            terms: of one step, then perhaps of the next.
            decay: factor of the weights.
            rounding: key of a rounding stream, int64 [1]; None: to nearest.
        """
        raise NotImplementedError

    def update_scale(self, bucket: Bucket) -> Vector | None:
        """Factor of the update relative to z; None for 1."""
        return None

    def out_of_reach(self, buckets: Sequence[Bucket]) -> list[tuple[Tensor, str]]:
        """Matrices beside which nothing can be kept, and why."""
        return []

    def not_capturable(self, deferred: bool) -> str:
        """Why a step can't be captured in a CUDA graph; empty if it can."""
        return ""

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """The model is to be evaluated with the parameters of these buckets; none: no more."""

    def watching(self) -> AbstractContextManager[None]:
        """Around an evaluation."""
        return nullcontext()

    def both(
        self,
        buckets: Sequence[Bucket],
        groups: list[dict[str, Any]],
        seed: int,
        step: int,
        query: int,
        closure: Callable[[], Any],
    ) -> Tensor:
        """The losses at both signs of a query, [2]."""
        raise NotImplementedError

    def window_ends(self, bucket: Bucket, step: int) -> bool:
        """Whether what is kept beside the weights must be written after this step."""
        return False

    def pending(self, bucket: Bucket) -> bool:
        """Whether something kept beside the weights is not yet in them."""
        return False

    def settle(self, bucket: Bucket, rounding: Tensor | None) -> bool:
        """Write what is kept beside the weights; False if there is nothing."""
        return False


class UsedOtherwise(BaseException):
    """A weight went into a function that has no side path. Raised before anything is computed.

    Not an `Exception`: it is a message from the weight to the optimizer, and a model or a closure
    that catches `Exception` to try something else must not keep it.
    """

    def __init__(self, param: Tensor, function: str) -> None:
        super().__init__(f"a weight of shape {tuple(param.shape)} is used by {function}")
        self.param = param
        self.function = function
