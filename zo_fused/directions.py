"""How z is made: one class per distribution of directions. Floor 7.

A direction sweeps ``p = decay * p + sum of coeff * z`` over a bucket, for the z of given steps. It
keeps nothing that the seed and the step do not give back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zo_fused.factors import Factors, StepFactors
from zo_fused.keys import Stream, stream_keys
from zo_fused.parameters import Bucket
from zo_fused.streams import Purpose


class Term(NamedTuple):
    """``coeff * z`` with the z of a step."""

    step: int
    coeffs: Tensor  # [P]
    factor: Tensor | None = None  # low rank: a flat factor instead of the step's U


class Direction:
    """What an optimizer and its update rule need from a direction.

    What follows `update_scale` is for directions that keep a part of the weights beside them
    (`zo_fused.factored`); the others have nothing to do.
    """

    fixed: tuple[str, ...] = ()  # hyper-parameters that shape the noise: see `Bucket.fixed`
    beside = False  # whether matrices get buckets of their own: see `Bucket.beside`
    module: nn.Module | None = None  # that takes part in evaluations
    paired = False  # whether both signs are evaluated at once, by `both`

    def sweep(
        self,
        bucket: Bucket,
        seed: int,
        terms: Sequence[Term],
        decay: Tensor,
        rounding: Tensor | None = None,
    ) -> None:
        """``p = decay * p + sum of the terms`` in one sweep.

        Args:
            terms: of one step, or of it and the next.
            decay: [P].
            rounding: key of a rounding stream, int64 [1]; None: to nearest.
        """
        raise NotImplementedError

    def update_scale(self, bucket: Bucket) -> Tensor | None:
        """Factor of the update relative to z, float64 [P]; None for 1."""
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
        closure: Callable[[], Any],
    ) -> Tensor:
        """The losses at both signs, [2]."""
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


class Dense(Direction):
    """z ~ N(0, I), one stream per step (MeZO, arXiv 2305.17333, algorithm 1)."""

    def sweep(
        self,
        bucket: Bucket,
        seed: int,
        terms: Sequence[Term],
        decay: Tensor,
        rounding: Tensor | None = None,
    ) -> None:
        streams = [Stream(Purpose.DENSE, term.step) for term in terms]
        keys = stream_keys(seed, streams, bucket.device)
        coeffs = torch.stack([term.coeffs for term in terms], dim=-1)
        bucket.sweep("dense_")(keys, coeffs.float(), decay.float(), rounding)


class LowRank(Direction):
    """z = U V^T with U fresh every step and V fixed for a window of ``interval`` steps.

    For a parameter seen as (m, n): U (m, rank) from stream (U, step), V (n, rank) from stream
    (V, step // interval), both N(0, 1), each from its own stream, so the U of the query is the U
    of the update (the released LOZO code loses that at every new V). One-dimensional parameters
    get dense noise from stream (dense, step): U is the noise itself, V is 1.
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
        factors = self.factors(bucket)
        steps = [factors.of(seed, term.step) for term in terms]
        if len(terms) == 1 and terms[0].factor is None:
            us, vs, coeffs = steps[0].us, steps[0].vs, terms[0].coeffs
            key = ("step", steps[0].number)
        else:
            us, vs, key = self._summed(factors, terms, steps)
            coeffs = torch.ones_like(decay)
        bucket.sweep("lowrank_", us, vs, key=key)(coeffs.float(), decay.float(), rounding)

    @staticmethod
    def _summed(
        factors: Factors, terms: Sequence[Term], steps: Sequence[StepFactors]
    ) -> tuple[list[Tensor], list[Tensor], Any]:
        """The terms as one product: U's add up where V is the same, else the ranks do."""
        summands: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        vs = {step.windows: step for step in steps}
        for term, step in zip(terms, steps, strict=True):
            flat = step.flat_u if term.factor is None else term.factor
            summands.setdefault(step.windows, []).append((term.coeffs, flat))
        sums = [factors.total(some, number) for number, some in enumerate(summands.values())]
        if len(sums) == 1:
            return sums[0], steps[0].vs, ("sum", steps[0].number)
        pairs = [(us, vs[window].vs) for us, window in zip(sums, summands, strict=True)]
        return *factors.joined(pairs), "joined"

    def update_scale(self, bucket: Bucket) -> Tensor | None:
        if not self.divide_by_rank:
            return None
        ranks = [rank for _, rank in self.factors(bucket).v_shapes]  # 1 for vectors
        return 1.0 / torch.tensor(ranks, dtype=torch.float64, device=bucket.device)
