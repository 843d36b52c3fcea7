"""z = U V^T of low rank: LOZO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from zo_fused.directions.activations import Activations
from zo_fused.directions.dense import Dense
from zo_fused.directions.factors import Factors, Flat, Pair, StepFactors
from zo_fused.directions.forms import CORE, FACTOR, Form
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction, Sweep, Term
from zo_fused.step.vectors import Vector, float32, vector


class LowRank(Direction):
    """z = U V^T with U fresh every step and V fixed for a window of ``interval`` steps.

    For a parameter seen as (m, n): U (m, rank) from stream (U, step, query), V (n, rank) from
    stream (V, step // interval), both N(0, 1), each from its own stream, so the U of the query is
    the U of the update (the released LOZO code loses that at every new V). One-dimensional
    parameters get dense noise from stream (dense, step, query): U is the noise itself, V is 1.

    Args:
        activations: where V comes from instead; None: it is drawn.
    """

    fixed: tuple[str, ...] = ("rank", "interval")
    matrices = True
    together = ("basis", "basis_step")

    def __init__(
        self,
        divide_by_rank: bool = False,
        distribution: str = "gaussian",
        activations: Activations | None = None,
    ) -> None:
        super().__init__(distribution)
        self.divide_by_rank = divide_by_rank
        self.activations = activations

    def not_sharded(self) -> str:
        return "" if self.activations is None else "V is made of the inputs of whole layers"

    def not_capturable(self, deferred: bool) -> str:
        if self.activations is not None:
            return "whether V is to be made from activations is for the host to say"
        if deferred:
            return "whether the next step has the same V is for the host to say; deferred=False"
        return ""

    # Whether U is Q Z with a basis Q of the window (see `basis`) and Z (rank, rank) of the query.
    has_basis = False

    @property
    def form(self) -> Form:
        """What is drawn for every query."""
        return CORE if self.has_basis else FACTOR

    def basis(self, p: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Q (m, rank) and V (n, rank) of a matrix for a window. What was learnt is in `state`
        (`Factors.forget` makes them anew); before that, and in a step that is skipped because a
        probe was not finite, any will do.

        Args:
            left, right: normals of these shapes, from streams (left, window) and (V, window).
        """
        return left, right

    def square(self, n: int) -> float:
        """V^T V of a matrix (m, n) is about this number times the identity."""
        return 1 if self.activations is not None and self.activations.unit else n

    def factors(self, bucket: Bucket) -> Factors:
        """The factors of a bucket."""
        right = None if self.activations is None else self._right
        make = partial(Factors, bucket, self.form, self.basis, self.options, right, rows=self.rows)
        return bucket.once("factors", make)

    def rows(self, p: Tensor) -> Tensor | None:
        """The rows of a matrix that move, int64; None: all."""
        return self.state.get(p, {}).get("rows")

    def _right(self, p: Tensor, drawn: Tensor, step: int) -> None:
        assert self.activations is not None
        if (found := self.activations.right(self.state.get(p, {}), step)) is not None:
            drawn.copy_(found)
        elif self.activations.unit:
            drawn.mul_(1 / math.sqrt(len(drawn)))

    def turned(self, bucket: Bucket, us: list[Tensor], vs: list[Tensor]) -> Pair:
        """Coordinates' U and the window's V as the left and the right factor of weights."""
        return us, vs

    def bases(self, params: Sequence[Tensor]) -> list[Any]:
        return [] if self.activations is None else self.activations.to_json(params, self.state)

    def take_bases(
        self,
        bases: list[Any],
        groups: Sequence[dict[str, Any]],
        buckets: Sequence[Bucket],
        step: int,
    ) -> None:
        if self.activations is None:
            super().take_bases(bases, groups, buckets, step)
            return
        rows = [(p, group["rank"]) for group in groups for p in group["params"]]
        params, ranks = zip(*rows, strict=True)
        if self.activations.from_json(bases, params, ranks, self.state, step):
            self.forget(buckets)

    def forget(self, buckets: Sequence[Bucket]) -> None:
        """Bases have changed."""
        for bucket in buckets:
            self.factors(bucket).forget()

    def after_probes(self, sweep: Sweep) -> Sweep | None:
        """What is left of a sweep when the z of its probes, which are dense, are in the weights;
        None: nothing."""
        if not (probes := [term for term in sweep.terms if term.probe]):
            return sweep
        Dense().sweep(sweep._replace(terms=probes))
        terms = [term for term in sweep.terms if not term.probe]
        return sweep._replace(decay=sweep.bucket.ones, terms=terms) if terms else None

    def sweep(self, sweep: Sweep) -> None:
        rest = self.after_probes(sweep)
        if rest is None or not rest.bucket.params:  # nothing of its parameters is here
            return
        bucket, seed, terms, decay, rounding = rest
        if rounding is not None and bucket.rows is not None:
            bucket.rows.check_rounding()
        (us, vs, key), coeffs = self.product(bucket, seed, terms)
        bucket.prepared("lowrank_", us, vs, key=key)(float32(coeffs), float32(decay), rounding)

    def product(
        self, bucket: Bucket, seed: int, terms: Sequence[Term]
    ) -> tuple[tuple[list[Tensor], list[Tensor], Any], Vector]:
        """The terms as ``coeff * U V^T``: coordinates add up where V is the same, else the ranks
        do.

        Returns:
            U's and V's, a name for where they lie, and the coefficients.
        """
        factors = self.factors(bucket)
        if len(terms) == 1 and terms[0].factor is None:
            step = factors.of(seed, terms[0].step, terms[0].query)
            _, us = factors.lifted((step.flat, step.parts), step)
            return (us, step.vs, ("step", step.number)), terms[0].coeffs
        sums: dict[Any, tuple[Flat, StepFactors]] = {}
        for term in terms:
            step = factors.of(seed, term.step, term.query)  # it holds until the next query is asked
            flat = step.flat if term.factor is None else term.factor
            first = step.windows not in sums
            number = len(sums) if first else list(sums).index(step.windows)
            total = factors.add(number, term.coeffs, flat, first)
            sums.setdefault(step.windows, (total, step))
        pairs = [
            (factors.lifted(total, step, number)[1], step.vs)
            for number, (total, step) in enumerate(sums.values())
        ]
        if len(pairs) == 1:
            ((_, step),) = sums.values()
            return (*pairs[0], ("sum", step.number)), bucket.ones
        return (*factors.joined(pairs), "joined"), bucket.ones

    def update_scale(self, bucket: Bucket) -> Vector | None:
        if not self.divide_by_rank:
            return None
        ranks = [rank for _, rank in self.factors(bucket).v_shapes]  # 1 for vectors
        return bucket.once("1/rank", lambda: vector([1.0 / rank for rank in ranks], bucket.device))
