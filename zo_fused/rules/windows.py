"""State in the coordinates of a low-rank direction (`zo_fused.directions.forms`), which means
something as long as the window that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zo_fused.directions.factors import Factors, Flat
from zo_fused.step.rule import Update, check_state
from zo_fused.step.sharded import rows_like
from zo_fused.sweeps.conversions import int64_tensor
from zo_fused.sweeps.shards import is_sharded, local


def gathered(
    update: Update, factors: Factors, state: dict[Any, Any], names: Sequence[str], window: str
) -> list[Flat]:
    """What the state has for the parameters of a bucket under some names, float32, in one tensor
    each, and its parts, which the state then holds: zero at first, and for a matrix that was frozen
    over a window's end. Of a DTensor that was cut along its rows, the state is one, too, but for
    factors of whole matrices (mode "factored"): all processes have the same.

    Args:
        window: under this name the state has the number of the window that a matrix is in.

    Raises:
        NotImplementedError: a matrix was cut along its columns.
    """
    bucket = update.bucket
    made = [factors.buffer(factors.shapes) for _ in names]
    empty = torch.empty(0, 1, device=bucket.device)
    for owner, (p, g) in enumerate(zip(bucket.owners, bucket.owner_groups, strict=True)):
        interval, row = bucket.fixed[g]["interval"], bucket.row_of(owner)
        last = (update.number - 1) // interval  # the window that was left
        known = names[0] in state[p] and int(state[p].get(window, last)) == last
        if not known:
            state[p].pop("step", None)  # the count of steps that a state is of
        for name, (_, parts) in zip(names, made, strict=True):
            part = empty if row is None else parts[row]
            if is_sharded(p) and not factors.whole:
                if factors.form.lift is not None:
                    raise NotImplementedError(
                        "what is kept in the coordinates of a basis is no part of a sharded "
                        "parameter: do without momentum and moments"
                    )
                columns = bucket.fixed[g]["rank"] if p.dim() >= 2 else 1
                part = rows_like(p, part if part.numel() else part.expand(0, columns))
            if name in state[p]:
                check_state(name, state[p][name], part.shape, p)
            if known:
                local(part).copy_(local(state[p][name]))
            state[p][name] = part
        if p.dim() >= 2:
            state[p][window] = int64_tensor([last if known else update.number // interval])[0]
    return made


def entered(update: Update, state: dict[Any, Any], window: str) -> list[int]:
    """Owners in the bucket, matrices, that enter a window with this step; the state has its number
    then."""
    bucket = update.bucket
    owners: list[int] = []
    windows = [update.number // group["interval"] for group in bucket.fixed]
    seen: list[list[int]] = bucket.once(("windows", window), list)
    if seen == [windows]:  # so most steps look at no parameter
        return owners
    seen[:] = [windows]
    for owner, (p, g) in enumerate(zip(bucket.owners, bucket.owner_groups, strict=True)):
        if p.dim() >= 2 and int(state[p][window]) != windows[g]:
            state[p][window].fill_(windows[g])
            owners.append(owner)
    return owners
