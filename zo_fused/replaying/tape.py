"""Sweeps that wait for others, to be made in one pass over the weights.

A replay has no forward passes: nothing looks at the weights between sweeps. So a `Recorder` stands
in for the optimizer's direction, takes down what it is asked for and runs it, many steps at a time,
as one script (`zo_fused.sweeps.script`). Each weight then goes through the same roundings in
registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.directions.factors import Factors
from zo_fused.directions.low_rank import LowRank
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Direction, Term
from zo_fused.step.vectors import Vector, float32, table
from zo_fused.sweeps.functions import int64_tensor

# At a time: 16 steps, or 24 where they are deferred. More would bring a few percent, and Ctrl-C
# waits for the end of a pass.
SWEEPS = 48
# U's at a time. Each takes the memory of a step's factors; after a few steps a pass, reading and
# writing the weights costs little beside the arithmetic.
PRODUCTS = 8


class Tape:
    """Sweeps over a bucket that have not been made yet."""

    def __init__(self, bucket: Bucket, limit: int) -> None:
        self._bucket = bucket
        self._limit = limit
        self._script: list[tuple[int, int, int]] = []  # the keys of roundings numbered apart
        self._coeffs: list[Tensor] = []
        self._decay: list[Tensor] = []
        self._roundings: list[Tensor] = []

    def _write(
        self, which: Sequence[int], coeffs: Tensor, decay: Vector, rounding: Tensor | None
    ) -> None:
        first, second = (*which, -1)[:2]
        if rounding is not None:
            self._roundings.append(rounding)
        key = -1 if rounding is None else len(self._roundings) - 1
        self._script.append((first, second, key))
        self._coeffs.append(coeffs)
        self._decay.append(float32(decay))
        if len(self._script) >= self._limit:
            self.run()

    def _take(self, keys: Tensor) -> tuple[Tensor, ...]:
        """The rows of an operator for all that was written, of which nothing is then left.

        Args:
            keys: of the directions.
        """
        rows = [(a, b, key + len(keys) if key >= 0 else -1) for a, b, key in self._script]
        taken = (
            torch.cat([keys, *self._roundings]),
            torch.tensor(rows, dtype=torch.int64, device="cpu"),
            torch.stack(self._coeffs, dim=1),
            torch.stack(self._decay, dim=1),
        )
        for written in (self._script, self._coeffs, self._decay, self._roundings):
            written.clear()
        return taken

    def add(self, seed: int, terms: Sequence[Term], decay: Vector, rounding: Tensor | None) -> None:
        """Take down a sweep: the arguments of `Direction.sweep`."""
        raise NotImplementedError

    def run(self) -> None:
        """Make the sweeps."""
        raise NotImplementedError


class DenseTape(Tape):
    """Of `Dense` directions."""

    def __init__(self, bucket: Bucket, limit: int, direction: Dense) -> None:
        super().__init__(bucket, limit)
        self._direction = direction
        self._drawn: dict[Any, tuple[int, int, Term]] = {}  # with their numbers and seeds

    def add(self, seed: int, terms: Sequence[Term], decay: Vector, rounding: Tensor | None) -> None:
        if len(terms) > 2:  # as many directions a sweep of a script has
            self.run()
            self._direction.sweep(self._bucket, seed, terms, decay, rounding)
            return
        which = []
        for term in terms:
            name = (seed, term.step, term.query, term.probe)
            which.append(self._drawn.setdefault(name, (len(self._drawn), seed, term))[0])
        columns = self._direction.stretched(seed, terms, [term.coeffs for term in terms])
        columns += [self._bucket.zeros] * (2 - len(terms))
        self._write(which, table(columns), decay, rounding)

    def run(self) -> None:
        if not self._script:
            return
        device = self._bucket.device
        drawn = self._drawn.values()
        keys = [self._direction.keys(seed, [term], device) for _, seed, term in drawn]
        rows = self._take(torch.cat(keys))
        self._drawn.clear()
        self._bucket.prepared("dense_steps_")(*rows, **self._direction.options)


class LowRankTape(Tape):
    """Of `LowRank` directions. A product is a step's U, or a sum of them, and the window's V."""

    def __init__(self, bucket: Bucket, limit: int, direction: LowRank) -> None:
        super().__init__(bucket, limit)
        self._direction = direction
        self._factors: Factors = direction.factors(bucket)
        self._products = min(PRODUCTS, limit)
        shapes = [(self._products * rows, rank) for rows, rank in self._factors.u_shapes]
        self._us = [
            flat.view(self._products, -1, rank)
            for flat, (_, rank) in zip(self._factors.buffer(shapes)[1], shapes, strict=True)
        ]
        self._slots = [[u[product] for u in self._us] for product in range(self._products)]
        self._vs = self._factors.buffer(self._factors.v_shapes)[1]
        self._windows: Any = None  # whose V is in vs
        self._taken: list[Any] = []  # the slots: which query's U is in them; None: a sum

    def add(self, seed: int, terms: Sequence[Term], decay: Vector, rounding: Tensor | None) -> None:
        windows = self._factors.windows(seed, terms[0].step)
        if any(self._factors.windows(seed, term.step) != windows for term in terms):
            self.run()  # two V's in one sweep
            self._direction.sweep(self._bucket, seed, terms, decay, rounding)
            return
        if windows != self._windows:
            self.run()
            torch._foreach_copy_(self._vs, self._factors.of(seed, terms[0].step).vs)
            self._windows = windows
        (us, _, _), coeffs = self._direction.product(self._bucket, seed, terms)
        single = len(terms) == 1 and terms[0].factor is None
        query = (seed, terms[0].step, terms[0].query) if single else None
        self._write([self._product(query, us)], float32(coeffs), decay, rounding)

    def _product(self, query: Any, us: list[Tensor]) -> int:
        """The slot that has these U's."""
        if query is not None and self._taken and self._taken[-1] == query:
            return len(self._taken) - 1
        if len(self._taken) == self._products:
            self.run()
        torch._foreach_copy_(self._slots[len(self._taken)], us)
        self._taken.append(query)
        return len(self._taken) - 1

    def run(self) -> None:
        if not self._script:
            return
        rows = self._take(int64_tensor([], self._bucket.device))
        self._taken.clear()
        self._bucket.prepared("lowrank_steps_", self._us, self._vs)(*rows)


class Recorder(Direction):
    """A direction whose sweeps wait until there are enough of them, or until `run`.

    Args:
        direction: `Dense` or `LowRank`.
        limit: sweeps that wait at most.
    """

    def __init__(self, direction: Dense | LowRank, limit: int = SWEEPS) -> None:
        self._direction = direction
        self._limit = limit
        self._tapes: dict[Bucket, Tape] = {}
        self.fixed = direction.fixed
        self.state = direction.state

    def _tape(self, bucket: Bucket) -> Tape:
        if isinstance(self._direction, LowRank):
            return LowRankTape(bucket, self._limit, self._direction)
        return DenseTape(bucket, self._limit, self._direction)

    def sweep(
        self,
        bucket: Bucket,
        seed: int,
        terms: Sequence[Term],
        decay: Vector,
        rounding: Tensor | None = None,
    ) -> None:
        if bucket not in self._tapes:
            self._tapes[bucket] = self._tape(bucket)
        self._tapes[bucket].add(seed, terms, decay, rounding)

    def run(self) -> None:
        """Make the sweeps that wait."""
        for tape in self._tapes.values():
            tape.run()

    def update_scale(self, bucket: Bucket) -> Vector | None:
        return self._direction.update_scale(bucket)

    def factors(self, bucket: Bucket) -> Factors:
        """As `LowRank.factors`: momentum is kept in them."""
        assert isinstance(self._direction, LowRank)
        return self._direction.factors(bucket)

    def square(self, n: int) -> float:
        """As `LowRank.square`."""
        assert isinstance(self._direction, LowRank)
        return self._direction.square(n)

    def leave(self) -> None:
        self.run()
        self._tapes = {}
