"""What a direction must do: `zo_fused.directions` has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from zo_fused.checks import choice
from zo_fused.noise.keys import Step
from zo_fused.step.buckets import Bucket
from zo_fused.step.vectors import Vector


class Term(NamedTuple):
    """``coeff * z`` with the z of a step's query, or of a probe."""

    step: Step
    coeffs: Vector
    factor: Tensor | None = None  # low rank: a flat factor instead of the query's U
    query: int = 0
    probe: bool = False


class Sweep(NamedTuple):
    """``p = decay * p + sum of the terms`` for the parameters of a bucket, at once."""

    bucket: Bucket
    seed: int
    terms: Sequence[Term]  # of one step, then perhaps of the next
    decay: Vector  # factor of the weights
    rounding: Tensor | None = None  # key of a rounding stream, int64 [1]; None: to nearest


# Of the elements of z, or of its factors; and the transforms that make them.
DISTRIBUTIONS = {"gaussian": "portable", "hadamard": "hadamard", "rademacher": "signs"}


class Direction:
    """How z is made.

    Args:
        distribution: of the numbers that it draws: "gaussian", N(0, 1); "hadamard", nearly that and
            cheaper (docs/noise.md); "rademacher", -1 or 1.

    Attributes:
        matrices: whether its sweeps see shards as matrices; else run by run.
        fixed: names of the hyper-parameters that z depends on (`Bucket.fixed` has their values).
        begins_with_probe: whether every step takes its first loss along its first probe, whose z
            does not depend on what is learnt: a deferred sweep then goes there.
        together: as of a `Rule`.
        state: the optimizer's, by parameter. What a direction learns and can't make anew from the
            seed and the step belongs there: `state_dict` then saves it.
    """

    fixed: tuple[str, ...] = ()
    begins_with_probe = False
    matrices = False
    together: tuple[str, ...] = ()
    state: dict[Any, Any]

    def __init__(self, distribution: str = "gaussian") -> None:
        self.transform = DISTRIBUTIONS[choice("distribution", distribution, DISTRIBUTIONS)]

    def sweep(self, sweep: Sweep) -> None:
        """Make a sweep."""
        raise NotImplementedError

    def move(self, sweep: Sweep) -> None:
        """Make the sweeps that take the weights from one place to another."""
        for leg in self.legs(sweep):
            self.sweep(leg)

    def legs(self, sweep: Sweep) -> Sequence[Sweep]:
        """What a move consists of: after each, weights are rounded."""
        return (sweep,)

    @property
    def options(self) -> dict[str, Any]:
        """What sweeps, replay logs and states are told of z beyond the method."""
        return {} if self.transform == "portable" else {"transform": self.transform}

    def update_scale(self, bucket: Bucket) -> Vector | None:
        """Factor of the update relative to z; None for 1."""
        return None

    def learn(
        self, buckets: Sequence[Bucket], seed: int, step: int, grads: Sequence[float]
    ) -> None:
        """What a step's probes found, before its queries: a projected gradient each.

        Raises:
            NotImplementedError: this direction learns nothing.
        """
        raise NotImplementedError(
            f"a step has probes, and {type(self).__name__} learns nothing from them: it has no "
            "learn()"
        )

    def bases(self, params: Sequence[Tensor]) -> list[Any]:
        """What z is made from besides the seed, for the replay log: JSON, a new list when it has
        changed.

        Args:
            params: of the optimizer, in its order.
        """
        return []

    def take_bases(
        self,
        bases: list[Any],
        groups: Sequence[dict[str, Any]],
        buckets: Sequence[Bucket],
        step: int,
    ) -> None:
        """In a replay: what `bases` was in a step.

        Args:
            groups: of the optimizer.

        Raises:
            ValueError: it is not of these parameters, or not of this direction.
        """
        if bases:
            raise ValueError(f"the log has bases, which {type(self).__name__} has none of")

    def leave(self) -> None:
        """The buckets so far will not be used again."""

    def recorder(self) -> Recorder | None:
        """What stands in for this in a replay, to make many sweeps at a time. None: there is no
        such thing."""
        return None

    def not_sharded(self) -> str:
        """Why parameters may not be DTensors; empty if they may. Every class says it itself, for
        one that inherits from it may look at whole tensors."""
        return "its z is made of whole tensors"

    def not_capturable(self, deferred: bool) -> str:
        """Why a step can't be captured in a CUDA graph; empty if it can."""
        return ""


class Recorder(Direction):
    """A direction whose sweeps wait for others. The weights are right after `run`.

    Attributes:
        direction: whose sweeps they are.
    """

    direction: Direction

    def run(self) -> None:
        """Make the sweeps that wait."""
        raise NotImplementedError


class Beside(Direction):
    """A direction that keeps a part of the weights beside them, and adds it in the forward pass
    (`zo_fused.directions.factored.direction`). For all others, nothing is to be done.

    Attributes:
        module: the model that takes part in evaluations.
        paired: whether both signs are evaluated at once, by `both`.
    """

    module: nn.Module | None = None
    paired = False

    def out_of_reach(self, buckets: Sequence[Bucket]) -> list[tuple[Tensor, str]]:
        """Matrices beside which nothing can be kept, and why."""
        return []

    def attach(self, buckets: Sequence[Bucket]) -> None:
        """The model is to be evaluated with the parameters of these buckets; none: no more."""

    def watching(self) -> AbstractContextManager[None]:
        """Around an evaluation."""
        return nullcontext()

    def both(self, sweeps: Sequence[Sweep], closure: Callable[[], Any]) -> Tensor:
        """The losses at the end of these sweeps, one a bucket, and at the other sign, [2]."""
        raise NotImplementedError

    def window_ends(self, bucket: Bucket, step: int) -> bool:
        """Whether what is kept must be written after this step."""
        return False

    def pending(self, bucket: Bucket) -> bool:
        """Whether something that is kept is not yet in the weights."""
        return False

    def settle(self, bucket: Bucket, rounding: Tensor | None) -> bool:
        """Write what is kept; False if there is nothing."""
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
