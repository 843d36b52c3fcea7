"""Adam without memory: moments made anew from the last steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zo_fused.directions.dense import Dense
from zo_fused.step.buckets import Bucket
from zo_fused.step.direction import Term
from zo_fused.step.rule import Rule, Update
from zo_fused.step.vectors import Vector, float32, table, where
from zo_fused.sweeps.arithmetic import first_powers, square_root, sum_of_columns


class AdamOfHistory(Rule):
    """`Adam` with moments made anew from the estimates of the last H steps:

    ``m = sum of a_s z_s``, ``v = sum of b_s z_s^2`` with ``a_s = beta1^n (1 - beta1) g_s`` and
    ``b_s = beta2^n (1 - beta2) g_s^2``, where n counts the good steps after s; the bias corrections
    divide by what the weights of g add up to. State per parameter: ``projected_grads``: g of the
    last H steps, the last one last, NaN where there was none, float64 [H]; ``step``: the last of
    these steps, int64 [].
    """

    takes = (Dense,)
    draws = True
    together = ("projected_grads", "step")
    not_capturable = "how many steps there are to look back on, is for the host to say"

    def __init__(self, history: int) -> None:
        self.history = history

    def prepare(self, update: Update, direction: Any, state: dict[Any, Any]) -> None:
        self._past(update, state)

    def _past(self, update: Update, state: dict[Any, Any]) -> tuple[Vector, Vector]:
        """g of the last H steps [P, H], and the last of these steps [P], which the state holds."""
        return update.bucket.once("history", lambda: self._gathered(update, state))

    def _gathered(self, update: Update, state: dict[Any, Any]) -> tuple[Vector, Vector]:
        params, device = update.bucket.params, update.bucket.device
        shape = (len(params), self.history)
        grads = torch.full(shape, math.nan, dtype=torch.float64, device="cpu")
        for p, row in zip(params, grads.unbind(), strict=True):
            if not state[p]:
                continue
            known = state[p].get("projected_grads", row[:0])
            if not isinstance(known, Tensor) or known.shape != row.shape:
                other = len(known) if isinstance(known, Tensor) and known.dim() else None
                raise ValueError(
                    f"the state is not of history={self.history}: it was saved by another method, "
                    f"or with history={other}"
                )
            # steps without this parameter: it was frozen
            missed = update.number - 1 - int(state[p]["step"])
            if missed < self.history:
                row[: self.history - missed] = known[missed:].cpu()
        grads = grads.to(device)
        last = torch.full((len(params),), update.number - 1, dtype=torch.int64, device=device)
        for p, row, step in zip(params, grads.unbind(), last.unbind(), strict=True):
            state[p].update(projected_grads=row, step=step)
        return grads, last

    def apply(self, update: Update, direction: Dense, state: dict[Any, Any]) -> None:
        u, bucket = update, update.bucket
        past, last = self._past(u, state)
        past[:, :-1] = past[:, 1:].clone()  # they overlap
        past[:, -1] = u.if_finite(u.grads[0], math.nan)
        last[:] = u.number
        good = past == past  # not NaN
        later = good.sum(1)[:, None] - good.cumsum(1)
        grads = where(good, past, 0.0)
        first, second = (
            where(good, _shares(bucket, [g["betas"][i] for g in u.param_groups], later), 0.0)
            for i in (0, 1)
        )
        root = square_root(sum_of_columns(second))
        columns = (
            bucket.zeros,
            bucket.ones,
            bucket.zeros,
            bucket.zeros,
            u.if_finite(bucket.hyper(u.param_groups, "adam_eps") * root, 1.0),
            u.if_finite(-u.lr * root / sum_of_columns(first), 0.0),
        )
        window = min(self.history, u.number + 1)
        terms = [Term(u.number - back, bucket.zeros) for back in reversed(range(window))]
        terms[-1] = Term(u.number, u.back)
        slots = range(self.history - window, self.history)
        first, second = first * grads, second * grads * grads
        linear = [first[:, slot] for slot in slots]
        squares = [second[:, slot] for slot in slots]
        if u.ahead is not None:
            terms.append(Term(u.step + 1, u.ahead))
            linear.append(bucket.zeros)
            squares.append(bucket.zeros)
        stretched = partial(direction.stretched, u.seed, terms)
        bucket.prepared("moments_", [], [], key="history")(
            direction.keys(u.seed, terms, bucket.device),
            table(stretched(linear)),
            table(stretched([term.coeffs for term in terms])),
            table(columns),
            float32(u.factor),
            "adam",
            u.rounding,
            squares=table(stretched(stretched(squares))),
            **direction.options,
        )


def _shares(bucket: Bucket, betas: Sequence[float], later: Tensor) -> Tensor:
    """``(1 - beta) beta^k``, k the number of good steps after one [rows, history]."""
    count = later.shape[1]
    table = [(1 - beta) * x for beta in betas for x in first_powers(beta, count)]
    of_groups = bucket.numbers(table).view(len(betas), -1)
    return of_groups[bucket.group_index].gather(1, later)
