"""A direction made of candidates whose losses are known: MeZO-GV, MeZO-Greedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from zo_fused.directions.dense import Dense
from zo_fused.noise.keys import Step, Stream, stream_keys
from zo_fused.noise.streams import Purpose
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Sweep, Term
from zo_fused.step.vectors import Vector, float32, table

PRIORS = ("guiding", "greedy", "survivor")
SURVIVORS = "survivors"  # in the optimizer's state: by query, a step and a probe of it


class Guided(Dense):
    """``z = sum_j w_j u_j`` of the `pool` candidates u_j of a query, which are the z of its probes,
    from the streams (probe, step, pool * query + j). The sum is made in registers, wherever z is
    needed. Before a step has learnt, its z is u_0.

    w, by the losses at ``theta + eps u_j``, is of length 1, so that elements of z have variance 1:

    * "guiding": ``1 / sqrt(2 h)`` for the best ``h = pool // 2``, ``-1 / sqrt(2 h)`` for the worst:
      the difference of their means, scaled;
    * "greedy": 1 for the best;
    * "survivor": as "guiding" with two, u_1 the better one of the last step.
    """

    begins_with_probe = True

    def __init__(self, prior: str, pool: int, distribution: str = "gaussian") -> None:
        super().__init__(distribution)
        self.prior, self.pool = prior, pool
        self._ranked = _weights(prior, pool)
        self._learnt: tuple[int, list[list[float]]] | None = None  # a step, and w of its queries

    def not_capturable(self, deferred: bool) -> str:
        return "which candidates are better is for the host to say"

    def learn(
        self, buckets: Sequence[Bucket], seed: int, step: int, grads: Sequence[float]
    ) -> None:
        """`grads` are in the order of the losses; of equal ones the first is better."""
        weights = []
        for first in range(0, len(grads), self.pool):
            found = grads[first : first + self.pool]
            order = sorted(range(self.pool), key=found.__getitem__)
            weights.append([self._ranked[order.index(j)] for j in range(self.pool)])
        self._learnt = step, weights

    def best(self) -> list[int]:
        """The probe with the lowest loss, for every query."""
        assert self._learnt is not None
        _, weights = self._learnt
        return [self.pool * query + w.index(max(w)) for query, w in enumerate(weights)]

    def keep_survivors(self) -> None:
        """The step was made: the better ones go on to the next. Not earlier, as a step that fails
        begins again."""
        assert self._learnt is not None
        step, _ = self._learnt
        names = [self._name(step, probe) for probe in self.best()]
        self.state[SURVIVORS] = dict(enumerate(names))

    def _name(self, step: int, probe: int) -> list[int]:
        """The step that a candidate was drawn in, and its number there."""
        query, j = divmod(probe, self.pool)
        kept: dict[int, list[int]] = self.state.get(SURVIVORS, {}) if j else {}
        return kept.get(query, [step, probe])

    def _candidate(self, step: Step, probe: int) -> Stream:
        assert isinstance(step, int)  # it is not captured
        step, probe = self._name(step, probe)
        return Stream(Purpose.PROBE, step, query=probe)

    def _parts(self, term: Term) -> Iterator[tuple[Stream, float]]:
        """The streams that a z is made of."""
        if term.probe:
            yield self._candidate(term.step, term.query), 1.0
            return
        step, weights = self._learnt or (None, [])
        for j, weight in enumerate(weights[term.query] if step == term.step else [1.0]):
            if weight:
                yield self._candidate(term.step, self.pool * term.query + j), weight

    def sweep(self, sweep: Sweep) -> None:
        bucket, seed, terms, decay, rounding = sweep
        coeffs: dict[Stream, Vector] = {}
        for term in terms:
            for stream, weight in self._parts(term):
                part = term.coeffs if weight == 1.0 else term.coeffs * weight
                coeffs[stream] = coeffs[stream] + part if stream in coeffs else part
        keys = stream_keys(seed, list(coeffs), bucket.device)
        columns = table(list(coeffs.values()))
        bucket.prepared("dense_")(keys, columns, float32(decay), rounding, **self.options)


def _weights(prior: str, pool: int) -> list[float]:
    """w, the best candidate first."""
    if prior == "greedy":
        return [1.0, *[0.0] * (pool - 1)]
    half = pool // 2
    share = 1 / math.sqrt(2 * half)
    return [share] * half + [0.0] * (pool - 2 * half) + [-share] * half
