"""State in the coordinates of a low-rank direction (`zo_fused.directions.forms`), which means
something as long as the window that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zo_fused.directions.factors import Factors, Flat
from zo_fused.step.rule import Update, check_state
from zo_fused.sweeps.conversions import int64_tensor


def gathered(
    update: Update, factors: Factors, state: dict[Any, Any], names: Sequence[str], window: str
) -> list[Flat]:
    """What the state has for the parameters of a bucket under some names, float32, in one tensor
    each, and its parts, which the state then holds: zero at first, and for a matrix that was frozen
    over a window's end.

    Args:
        window: under this name the state has the number of the window that a matrix is in.
    """
    bucket = update.bucket
    made = [factors.buffer(factors.shapes) for _ in names]
    for row, (p, g) in enumerate(zip(bucket.params, bucket.group_of, strict=True)):
        interval = bucket.fixed[g]["interval"]
        last = (update.number - 1) // interval  # the window that was left
        known = names[0] in state[p] and int(state[p].get(window, last)) == last
        if not known:
            state[p].pop("step", None)  # the count of steps that a state is of
        for name, (_, parts) in zip(names, made, strict=True):
            if name in state[p]:
                check_state(name, state[p][name], parts[row].shape, p)
            if known:
                parts[row].copy_(state[p][name])
            state[p][name] = parts[row]
        if p.dim() >= 2:
            state[p][window] = int64_tensor([last if known else update.number // interval])[0]
    return made


def entered(update: Update, state: dict[Any, Any], window: str) -> list[int]:
    """Rows of the matrices that enter a window with this step; the state has its number then."""
    bucket = update.bucket
    rows: list[int] = []
    windows = [update.number // group["interval"] for group in bucket.fixed]
    seen: list[list[int]] = bucket.once(("windows", window), list)
    if seen == [windows]:  # so most steps look at no parameter
        return rows
    seen[:] = [windows]
    for row, (p, g) in enumerate(zip(bucket.params, bucket.group_of, strict=True)):
        if p.dim() >= 2 and int(state[p][window]) != windows[g]:
            state[p][window].fill_(windows[g])
            rows.append(row)
    return rows
