"""How z is made: one class per distribution of directions. Floor 7.

A direction sweeps ``p = decay * p + sum of coeff * z`` over a bucket, for the z of given steps. It
keeps nothing that the seed and the step do not give back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from zo_fused.checks import choice
from zo_fused.factors import Factors, StepFactors
from zo_fused.keys import Stream, stream_keys
from zo_fused.parameters import Bucket
from zo_fused.streams import Purpose
from zo_fused.vectors import Vector, float32, table, vector


class Term(NamedTuple):
    """``coeff * z`` with the z of a step's query."""

    step: int
    coeffs: Vector
    factor: Tensor | None = None  # low rank: a flat factor instead of the query's U
    query: int = 0


class Direction:
    """What an optimizer and its update rule need from a direction.

    What follows `update_scale` is for directions that keep a part of the weights beside them
    (`zo_fused.factored`); the others have nothing to do.
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


DISTRIBUTIONS = {"gaussian": "portable", "rademacher": "rademacher"}  # and their transforms


class Dense(Direction):
    """z of independent elements, one stream a query (MeZO, arXiv 2305.17333, algorithm 1).

    Args:
        distribution: "gaussian", N(0, 1), or "rademacher", -1 or 1.
    """

    def __init__(self, distribution: str = "gaussian") -> None:
        self._transform = DISTRIBUTIONS[choice("distribution", distribution, DISTRIBUTIONS)]

    @property
    def options(self) -> dict[str, Any]:
        return {} if self._transform == "portable" else {"transform": self._transform}

    def sweep(
        self,
        bucket: Bucket,
        seed: int,
        terms: Sequence[Term],
        decay: Vector,
        rounding: Tensor | None = None,
    ) -> None:
        streams = [Stream(Purpose.DENSE, term.step, query=term.query) for term in terms]
        keys = stream_keys(seed, streams, bucket.device)
        coeffs = table([term.coeffs for term in terms])
        bucket.sweep("dense_")(keys, coeffs, float32(decay), rounding, **self.options)


class LowRank(Direction):
    """z = U V^T with U fresh every step and V fixed for a window of ``interval`` steps.

    For a parameter seen as (m, n): U (m, rank) from stream (U, step, query), V (n, rank) from
    stream (V, step // interval), both N(0, 1), each from its own stream, so the U of the query is
    the U of the update (the released LOZO code loses that at every new V). One-dimensional
    parameters get dense noise from stream (dense, step, query): U is the noise itself, V is 1.
    """

    fixed: tuple[str, ...] = ("rank", "interval")

    def __init__(self, divide_by_rank: bool = False) -> None:
        self.divide_by_rank = divide_by_rank

    def not_capturable(self, deferred: bool) -> str:
        if deferred:
            return "whether the next step has the same V is for the host to say; deferred=False"
        return ""

    def factors(self, bucket: Bucket) -> Factors:
        """The factors of a bucket."""
        return bucket.once("factors", lambda: Factors(bucket))

    def sweep(
        self,
        bucket: Bucket,
        seed: int,
        terms: Sequence[Term],
        decay: Tensor,
        rounding: Tensor | None = None,
    ) -> None:
        (us, vs, key), coeffs = self.product(bucket, seed, terms)
        bucket.sweep("lowrank_", us, vs, key=key)(float32(coeffs), float32(decay), rounding)

    def product(
        self, bucket: Bucket, seed: int, terms: Sequence[Term]
    ) -> tuple[tuple[list[Tensor], list[Tensor], Any], Vector]:
        """The terms as ``coeff * U V^T``: U's add up where V is the same, else the ranks do.

        Returns:
            U's and V's, a name for where they lie, and the coefficients.
        """
        factors = self.factors(bucket)
        if len(terms) == 1 and terms[0].factor is None:
            step = factors.of(seed, terms[0].step, terms[0].query)
            return (step.us, step.vs, ("step", step.number)), terms[0].coeffs
        sums: dict[Any, tuple[list[Tensor], StepFactors]] = {}
        for term in terms:
            step = factors.of(seed, term.step, term.query)  # its U until the next query is asked
            flat = step.flat_u if term.factor is None else term.factor
            first = step.windows not in sums
            number = len(sums) if first else list(sums).index(step.windows)
            parts = factors.add(number, term.coeffs, flat, first)
            sums.setdefault(step.windows, (parts, step))
        if len(sums) == 1:
            ((us, step),) = sums.values()
            return (us, step.vs, ("sum", step.number)), bucket.ones
        pairs = [(us, step.vs) for us, step in sums.values()]
        return (*factors.joined(pairs), "joined"), bucket.ones

    def update_scale(self, bucket: Bucket) -> Vector | None:
        if not self.divide_by_rank:
            return None
        ranks = [rank for _, rank in self.factors(bucket).v_shapes]  # 1 for vectors
        return bucket.once("1/rank", lambda: vector([1.0 / rank for rank in ranks], bucket.device))
