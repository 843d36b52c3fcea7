"""Sweeps that wait for others, to be made in one pass over the weights.

A replay has no forward passes: nothing looks at the weights between sweeps. So a `DenseRecorder`
stands in for the optimizer's direction, takes down what it is asked for and runs it, many steps at
a time, as one script (`zo_fused.sweeps.script`). Each weight then goes through the same roundings
in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Recorder, Sweep, Term
from zo_fused.step.vectors import Vector, float32, table

if TYPE_CHECKING:
    from zo_fused.directions.dense import Dense

# At a time: 16 steps, or 24 where they are deferred. More would bring a few percent, and Ctrl-C
# waits for the end of a pass.
SWEEPS = 48


class Tape:
    """Dense sweeps over a bucket that have not been made yet."""

    def __init__(self, bucket: Bucket, limit: int, direction: Dense) -> None:
        self._bucket = bucket
        self._direction = direction
        self._limit = limit
        self._script: list[tuple[int, int, int]] = []  # the keys of roundings numbered apart
        self._coeffs: list[Tensor] = []
        self._decay: list[Tensor] = []
        self._roundings: list[Tensor] = []
        self._drawn: dict[Any, tuple[int, int, Term]] = {}  # with their numbers and seeds

    def add(self, sweep: Sweep) -> None:
        """Take down a sweep."""
        _, seed, terms, decay, rounding = sweep
        if len(terms) > 2:  # as many directions a sweep of a script has
            self.run()
            self._direction.sweep(sweep)
            return
        which = []
        for term in terms:
            name = (seed, term.step, term.query, term.probe)
            which.append(self._drawn.setdefault(name, (len(self._drawn), seed, term))[0])
        first, second = (*which, -1)[:2]
        self._script.append((first, second, -1 if rounding is None else len(self._roundings)))
        self._roundings += [] if rounding is None else [rounding]
        columns = self._direction.stretched(seed, terms, [term.coeffs for term in terms])
        self._coeffs.append(table(columns + [self._bucket.zeros] * (2 - len(terms))))
        self._decay.append(float32(decay))
        if len(self._script) >= self._limit:
            self.run()

    def run(self) -> None:
        """Make the sweeps."""
        if not self._script:
            return
        device = self._bucket.device
        drawn = self._drawn.values()
        keys = [self._direction.keys(seed, [term], device) for _, seed, term in drawn]
        rows = [(a, b, key + len(keys) if key >= 0 else -1) for a, b, key in self._script]
        waiting = (
            torch.cat([*keys, *self._roundings]),
            torch.tensor(rows, dtype=torch.int64, device="cpu"),
            torch.stack(self._coeffs, dim=1),
            torch.stack(self._decay, dim=1),
        )
        for written in (self._script, self._coeffs, self._decay, self._roundings, self._drawn):
            written.clear()
        self._bucket.prepared("dense_steps_")(*waiting, **self._direction.options)


class DenseRecorder(Recorder):
    """A dense direction whose sweeps wait until there are enough of them, or until `run`.

    Args:
        limit: sweeps that wait at most.
    """

    def __init__(self, direction: Dense, limit: int = SWEEPS) -> None:
        self.direction = direction
        self._limit = limit
        self._tapes: dict[Bucket, Tape] = {}
        self._dense = direction
        self.fixed = direction.fixed
        self.state = direction.state

    def sweep(self, sweep: Sweep) -> None:
        if sweep.bucket not in self._tapes:
            self._tapes[sweep.bucket] = Tape(sweep.bucket, self._limit, self._dense)
        self._tapes[sweep.bucket].add(sweep)

    def legs(self, sweep: Sweep) -> Sequence[Sweep]:
        return self.direction.legs(sweep)

    def run(self) -> None:
        """Make the sweeps that wait."""
        for tape in self._tapes.values():
            tape.run()

    def learn(
        self, buckets: Sequence[Bucket], seed: int, step: int, grads: Sequence[float]
    ) -> None:
        self.direction.learn(buckets, seed, step, grads)

    def update_scale(self, bucket: Bucket) -> Vector | None:
        return self.direction.update_scale(bucket)

    def leave(self) -> None:
        self.run()
        self._tapes = {}
