"""Adam with a second moment of every weight that is made of a few numbers: TeZO-Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.diagonal import Diagonal
from zo_fused.directions.low_rank import LowRank
from zo_fused.directions.panels import Lot, panels_of
from zo_fused.rules.core_adam import CoreAdam
from zo_fused.step.direction import Term
from zo_fused.step.rule import Update
from zo_fused.step.vectors import float32, table
from zo_fused.sweeps import operators

# Of a parameter: Q, None if it has none; coordinates; V.
Product = tuple[Tensor | None, Tensor, Tensor]


class SeparableAdam(CoreAdam):
    """``theta = (1 - lr weight_decay) theta - lr M / (sqrt(S) + eps)``, ``M = U diag(m') V^T``,
    ``S = U^2 diag(v') (V^2)^T`` with squares element by element, where m' and v' are the corrected
    moments of the coordinates g tau as in `CoreAdam` (TeZO-Adam, arXiv 2501.19057): Adam of the
    weights, but for the products of two different columns, which S leaves out. One-dimensional
    parameters: Adam.

    The step has full rank. It is made in panels (`zo_fused.directions.panels`), three at a time,
    with the way back and ahead in the same rounding.

    State per parameter: that of `CoreAdam`.
    """

    takes = (Diagonal,)

    def apply(self, update: Update, direction: LowRank, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        (_, m), (_, v), eps, gain = self.averages(u, direction, state)
        step = direction.factors(bucket).of(u.seed, u.number)
        bases = iter(step.qs)
        qs = [next(bases) if p.dim() >= 2 else None for p in bucket.params]
        means, squares = (list(zip(qs, moment, step.vs, strict=True)) for moment in (m, v))
        terms = [Term(u.number, u.back, query=u.displaced)]
        if u.ahead is not None:
            terms.append(Term(u.number + 1, u.ahead))
        (lefts, rights, _), coeffs = direction.product(bucket, u.seed, terms)
        keys = torch.empty(0, dtype=torch.int64, device=bucket.device)  # no noise
        none = torch.empty(len(bucket.params), 0, dtype=torch.float32, device=bucket.device)
        one, zero = bucket.ones, bucket.zeros
        columns = table([one, zero, one, zero, eps, gain])
        for lot in panels_of(bucket).lots():
            first, second = _made(lot, means), _made(lot, squares, squared=True)
            here = [part.panel.zero_() for part in lot.parts]
            rows = none[lot.index], none[lot.index], columns[lot.index], float32(one)[lot.index]
            operators.moments_(here, first, second, lot.ids, lot.offsets, keys, *rows, "adam")
            us = [lefts[part.row][part.rows] for part in lot.parts]
            vs = [rights[part.row] for part in lot.parts]
            operators.lowrank_(here, us, vs, float32(coeffs)[lot.index], rows[-1])
            lot.write(bucket.params, keys, none, float32(u.factor), u.rounding)


def _made(lot: Lot, products: Sequence[Product], squared: bool = False) -> list[Tensor]:
    """``Q diag(coordinates) V^T`` in panels; or with the squares of the elements of Q and V."""
    us, vs = [], []
    for row, rows, _ in lot.parts:
        left, coordinates, right = products[row]
        if left is None:
            us.append(coordinates[rows])
        else:
            left = left[rows]
            us.append((left * left if squared else left) * coordinates)
            right = right * right if squared else right
        vs.append(right)
    panels = lot.another()
    ones = torch.ones(len(us), dtype=torch.float32, device=us[0].device)
    operators.lowrank_(panels, us, vs, ones, ones)
    return panels
